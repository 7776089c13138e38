"""kill -9, SIGTERM, Ctrl-C, a terminal that is gone: at moments that the run does not choose."""

import json
import random
import shutil
import signal
import time

import pytest
from harness import assert_same, contents, leftovers

from minillm.base.files import clean_leftovers
from minillm.storage.checkpoints import latest_checkpoint, verify_checkpoint


def seconds_of(zygote, data, folder, **settings):
    start = time.monotonic()
    code, output = zygote.do("run", run_dir=folder, data=data, **settings)
    assert code == 0, output
    return time.monotonic() - start


def test_kill_9_at_random_moments(zygote, data, rounds, table, tmp_path):
    """A run of 60 steps that saves after every second one is killed again and again."""
    settings = {"steps": 60, "save_every": 2}
    takes = seconds_of(zygote, data, tmp_path / "whole", **settings)
    expected = contents(tmp_path / "whole")
    dice, kills, in_saving, runs = random.Random(1), 0, 0, 0
    while kills < rounds:
        run_dir, runs = tmp_path / f"run-{runs}", runs + 1
        while True:
            child = zygote.start("run", run_dir=run_dir, data=data, **settings)
            if dice.random() < 0.8:  # the others are killed while they start
                child.until(lambda text: "\n" in text, or_its_end=True)  # there may be no step left
            code = child.wait(dice.uniform(0, 0.3 * takes)) if kills < rounds else child.wait()
            if code is None:
                child.send(signal.SIGKILL)
                code = child.wait()
                assert code in (0, -signal.SIGKILL), child.output()  # 0: it ended just before
            if code == 0:
                break
            kills += 1
            in_saving += any("step-" in name for name in leftovers(run_dir))
        assert_same(run_dir, expected)
    table(
        "`kill -9` at a random moment",
        kills,
        f"{runs} runs, each resumed to the same bits; {in_saving} of the kills fell into a save",
    )


def test_kill_9_at_every_step_of_a_save(zygote, data, whole, rounds, table, tmp_path):
    """Before each request that a save makes of the file system; with a single checkpoint kept, which must not be lost."""
    base, report = tmp_path / "base", tmp_path / "report"
    child = zygote.start("run", run_dir=base, data=data, keep=1, pause=0.02)
    child.until(lambda text: "9\n" in text)
    child.send()
    assert child.wait() == -signal.SIGKILL
    shutil.copytree(base, tmp_path / "counted")
    code, output = zygote.do(
        "die_in_save", run_dir=tmp_path / "counted", data=data, event=0, report=report, keep=1
    )
    assert code == 0, output
    n, found = int(report.read_text()), set()
    assert n > 30
    events = range(1, n + 1) if rounds >= 20 else [*range(1, n, 3), n]
    for event in events:
        run_dir = tmp_path / f"at-{event}"
        shutil.copytree(base, run_dir)
        before = latest_checkpoint(run_dir / "checkpoints").name
        code, _ = zygote.do("die_in_save", run_dir=run_dir, data=data, event=event, report=report, keep=1)
        assert code == -signal.SIGKILL, f"event {event} of {n}"
        there = latest_checkpoint(run_dir / "checkpoints").name
        assert there in (before, "step-00000012")
        found.add(there)
        if event % 8 == 1 or event == n:
            code, output = zygote.do("run", run_dir=run_dir, data=data)
            assert code == 0, output
            assert_same(run_dir, whole)
        shutil.rmtree(run_dir)
    assert found == {"step-00000008", "step-00000012"}
    table(
        "`kill -9` before each file operation of a save",
        len(events),
        "the old checkpoint or the new one is there, undamaged; never neither",
    )


@pytest.mark.parametrize("swap", [True, False], ids=["swap", "two renames"])
def test_kill_9_while_a_folder_is_replaced(zygote, swap, table, tmp_path):
    def write(folder, text, event):
        return zygote.do(
            "replace_folder", folder=folder, text=text, event=event, report=tmp_path / "n", swap=swap
        )

    assert write(tmp_path / "first", "old", 0)[0] == 0
    shutil.copytree(tmp_path / "first", tmp_path / "counted")
    assert write(tmp_path / "counted", "new", 0)[0] == 0
    n, seen = int((tmp_path / "n").read_text()), set()
    for event in range(1, n + 1):
        folder = tmp_path / str(event) / "folder"
        shutil.copytree(tmp_path / "first", folder)
        assert write(folder, "new", event)[0] == -signal.SIGKILL
        if swap:  # at no moment is there nothing
            assert folder.exists()
        clean_leftovers(folder.parent)  # as the next start does
        assert [path.name for path in folder.parent.iterdir()] == ["folder"]
        texts = {(folder / name).read_text() for name in "abc"}
        assert len(texts) == 1
        seen |= texts
    assert seen == {"old", "new"}
    how = "in one step" if swap else "in two, where the system has no swap"
    table(
        f"`kill -9` while a folder is replaced {how}",
        n,
        "the old folder or the new one, whole; the rest is cleaned up",
    )


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=lambda x: str(x),
)
def test_a_signal_saves_and_the_exit_status_says_so(
    zygote, data, whole, rounds, number, code, table, tmp_path
):
    dice, tried = random.Random(number), 0
    for attempt in range(max(2, rounds // 3)):
        run_dir = tmp_path / str(attempt)
        child = zygote.start("run", run_dir=run_dir, data=data, pause=0.01)
        child.until(lambda text: "\n" in text)
        time.sleep(dice.uniform(0, 0.3))
        child.send(number)
        got = child.wait()
        if got == 0:  # it came in the last step
            continue
        assert got == code, child.output()
        last = int(child.output().split(f"\n{signal.Signals(number).name}")[0].split()[-1])
        assert f"{signal.Signals(number).name} after step {last}: saved to" in child.output()
        assert latest_checkpoint(run_dir / "checkpoints").name == f"step-{last:08d}", (
            "a finished step was not saved"
        )
        got, output = zygote.do("run", run_dir=run_dir, data=data)
        assert got == 0, output
        assert f"\n{last + 1}\n" in "\n" + output, "it goes on with the next step"
        assert_same(run_dir, whole)
        tried += 1
    assert tried
    name = {130: "SIGINT (Ctrl-C)", 143: "SIGTERM", 129: "SIGHUP (its terminal is closed)"}[code]
    table(
        f"a run gets {name}",
        tried,
        f"the step is finished and saved, exit status {code}; resumed to the same bits",
    )


def test_a_second_signal_does_not_wait(zygote, data, whole, table, tmp_path):
    child = zygote.start("run", run_dir=tmp_path, data=data, pause=2.0)
    child.until(lambda text: "1\n" in text)
    child.send(signal.SIGTERM)
    time.sleep(0.1)
    start = time.monotonic()
    child.send(signal.SIGTERM)
    assert child.wait() == -signal.SIGTERM
    assert time.monotonic() - start < 1.0
    assert zygote.do("run", run_dir=tmp_path, data=data)[0] == 0
    assert_same(tmp_path, whole)
    table("a second SIGTERM, by somebody who cannot wait", 1, "ends at once; the newest checkpoint counts")


def test_half_lines_and_noise_in_the_metrics(zygote, data, whole, rounds, table, tmp_path):
    dice = random.Random(3)
    for attempt in range(rounds):
        run_dir = tmp_path / str(attempt)
        child = zygote.start("run", run_dir=run_dir, data=data, pause=0.005)
        goal = dice.randrange(5, 30)
        child.until_line(goal)
        child.send()
        assert child.wait() == -signal.SIGKILL
        path = run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines()
        half = lines[-1][: dice.randrange(1, len(lines[-1]))]
        path.write_text("\n".join([*lines, dice.choice(["7", "null", '{"loss_nats": 1.0}', half]), half]))
        assert zygote.do("run", run_dir=run_dir, data=data)[0] == 0
        assert_same(run_dir, whole)
    table("the last line of the metrics cut in half", rounds, "dropped, and written again by the resumed run")


def test_two_runs_in_one_folder(zygote, data, whole, table, tmp_path):
    first = zygote.start("run_until_there_is", run_dir=tmp_path, data=data, step=7, path=tmp_path / "go")
    first.until(lambda text: "7\n" in text)
    for _ in range(3):
        code, output = zygote.do("run", run_dir=tmp_path, data=data)
        assert code == 2
        assert f"another run (process {first.pid}" in output
    (tmp_path / "go").touch()
    assert first.wait() == 0
    assert_same(tmp_path, whole)
    table(
        "a second run in the same folder",
        3,
        "refused, exit status 2, the first is named and goes on undisturbed",
    )


def test_the_lock_dies_with_its_process(zygote, data, whole, table, tmp_path):
    """Even if a worker of the killed run lives on."""
    holder = zygote.start("run_with_an_orphan", run_dir=tmp_path, data=data)
    holder.until(lambda text: "\n" in text)
    holder.send()
    assert holder.wait() == -signal.SIGKILL
    orphan = int(holder.output())
    try:
        code, output = zygote.do("run", run_dir=tmp_path, data=data)
        assert code == 0, output
    finally:
        import os

        os.kill(orphan, signal.SIGKILL)
    assert_same(tmp_path, whole)
    table("`kill -9` of a run whose worker lives on", 1, "its lock is free, and the same command goes on")


def test_leftovers_of_killed_writes_are_removed_at_the_next_start(zygote, data, whole, table, tmp_path):
    assert zygote.do("run", run_dir=tmp_path, data=data)[0] == 0
    junk = [
        tmp_path / ".metrics.jsonl.ab12_xyz.tmp",
        tmp_path / "checkpoints" / ".step-00000044.00000000.tmp",
    ]
    junk[0].write_text("half")
    junk[1].mkdir()
    (junk[1] / "model.safetensors").write_text("half")
    mine = tmp_path / ".notes.tmp"  # not ours
    mine.write_text("mine")
    assert zygote.do("run", run_dir=tmp_path, data=data)[0] == 0
    assert not any(path.exists() for path in junk)
    assert mine.read_text() == "mine"
    mine.unlink()
    assert_same(tmp_path, whole)


def test_a_process_killed_in_a_bar_leaves_the_others_theirs(zygote, data, tmp_path):
    """Of the suite itself: its processes are forks of one, and must share nothing that the dead could keep."""
    dead = zygote.start("die_in_a_bar")
    assert dead.wait() == -signal.SIGKILL
    code, output = zygote.do("run_while_the_clock_jumps", run_dir=tmp_path, data=data, seconds=0.0)
    assert code == 0, output


def test_the_date_jumps_in_a_run(zygote, data, table, tmp_path):
    for number, seconds in enumerate((-86400.0, 86400.0)):
        run_dir = tmp_path / str(number)
        code, output = zygote.do("run_while_the_clock_jumps", run_dir=run_dir, data=data, seconds=seconds)
        assert code == 0, output
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        assert all(line["tokens_per_s"] > 100 for line in lines)
        shown = [frame for frame in output.split("\r") if "40" in frame and "<" in frame]
        assert shown
        for frame in shown:
            assert "-" not in frame.split("[")[-1], frame  # no negative time
            assert "day" not in frame
            elapsed, left = frame.split("[")[-1].split(",")[0].split("<")
            assert elapsed.startswith("00:0")
            assert left.startswith(("00:0", "?"))
    table(
        "the computer's date jumps by a day, back and forth",
        2,
        "speeds and the time left stay true: no clock that can be set is read",
    )


def test_verification_reads_the_disk(tmp_path, monkeypatch):
    """A new checkpoint that reads back wrongly is an error, and the old ones stay."""
    import torch

    from minillm.base import errors, files
    from minillm.storage import checkpoints

    tensors = {"model": {"w": torch.ones(4)}}
    for step in (1, 2):
        checkpoints.save_checkpoint(tmp_path, step, tensors=tensors, state={})
    real, calls = files.sha256_file, []

    def bad_disk(path, *, from_disk=False):
        calls.append(from_disk)
        return "0" * 64 if from_disk else real(path)

    monkeypatch.setattr(checkpoints, "sha256_file", bad_disk)
    with pytest.raises(errors.CheckpointError, match="checksum differs"):
        checkpoints.save_checkpoint(tmp_path, 3, tensors=tensors, state={}, keep=1)
    assert True in calls
    monkeypatch.undo()
    for step in (1, 2):
        verify_checkpoint(tmp_path / f"step-{step:08d}")
