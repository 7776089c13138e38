"""Full disks, disks that cannot be written, and the estimate that comes before."""

import json
import os
import random
import re
import shutil
import signal
import subprocess

import pytest
from harness import assert_same, leftovers, pretrain_words

from minillm.storage.checkpoints import latest_checkpoint, verify_checkpoint


def resume(zygote, data, run_dir, whole):
    code, output = zygote.do("run", run_dir=run_dir, data=data)
    assert code == 0, output
    assert_same(run_dir, whole)


def test_a_disk_that_fills_up_in_training(zygote, data, whole, rounds, disk, table, tmp_path):
    """At a random step somebody else fills the disk, up to a random rest: another part of the next save fails each time."""
    folder, dice, failed = disk(tmp_path / "disk", 4096), random.Random(0), set()
    for attempt in range(rounds):
        run_dir = folder / str(attempt)
        left = dice.choice([0, 4096, *(dice.randrange(0, 120_000) for _ in range(4))])
        step = dice.randrange(5, 36)
        code, output = zygote.do(
            "run_on_a_full_disk", run_dir=run_dir, data=data, mount=folder, left=left, step=step
        )
        if code == 0:  # the rest was enough
            (folder / "ballast").unlink()
            shutil.rmtree(run_dir)
            continue
        assert code == 2, output
        assert "No space left" in output
        failed.add(output.rpartition("\n")[0].splitlines()[-1].split(":")[0])
        last = int(output.split("\n")[-3])
        newest = latest_checkpoint(run_dir / "checkpoints")
        assert newest.name >= f"step-{last // 4 * 4 - 4:08d}"
        assert leftovers(run_dir) == [], "half a checkpoint keeps the disk full"
        (folder / "ballast").unlink()
        resume(zygote, data, run_dir, whole)
        shutil.rmtree(run_dir)
    assert failed
    table(
        "the disk fills up",
        rounds,
        "the run ends with status 2 and says so; the checkpoints before are whole, with room it goes on",
    )


def test_a_quota_on_files(zygote, data, whole, table, tmp_path):
    """The same without root: no file may grow beyond so many bytes."""
    pytest.importorskip("resource")
    limits = (600, 9_000, 40_000)  # of the metrics, the weights, the optimizer
    for limit in limits:
        run_dir = tmp_path / str(limit)
        code, output = zygote.do("run_with_small_files", run_dir=run_dir, data=data, limit=limit, step=9)
        assert code == 2, output
        assert "File too large" in output
        assert latest_checkpoint(run_dir / "checkpoints").name == "step-00000008"
        assert leftovers(run_dir) == []
        resume(zygote, data, run_dir, whole)
    table("a limit on the size of files", len(limits), "the same")


def test_a_disk_that_becomes_read_only(zygote, data, whole, disk, table, tmp_path):
    """As Linux does with a disk that has errors, in the middle of training."""
    checkpoints = disk(tmp_path / "run" / "checkpoints", 4096)
    remount = ["mount", "-o", "remount,ro", str(checkpoints)]
    code, output = zygote.do("run_and_then", run_dir=tmp_path / "run", data=data, command=remount, step=10)
    assert code == 2, output
    assert "Read-only file system" in output
    newest = latest_checkpoint(checkpoints)
    assert newest.name == "step-00000008"
    verify_checkpoint(newest)
    code, output = zygote.do("run", run_dir=tmp_path / "run", data=data)
    assert code == 2, "it must not train when it cannot save"
    assert "Read-only file system" in output
    assert "9\n" not in output
    subprocess.run(["mount", "-o", "remount,rw", str(checkpoints)], check=True)
    resume(zygote, data, tmp_path / "run", whole)
    table(
        "the disk becomes read-only in training, and at the start",
        2,
        "status 2 with the reason, before a step is lost; then it goes on",
    )


def test_a_folder_that_may_not_be_written(zygote, data, disk, table, tmp_path):
    if os.geteuid():
        folder = tmp_path / "closed"
        folder.mkdir(mode=0o555)
    else:  # root may write everywhere, except on a read-only disk
        folder = disk(tmp_path / "closed", 64)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    for run_dir in (folder, folder / "new"):
        code, output = zygote.do("run", run_dir=run_dir, data=data)
        assert code == 2
        assert str(run_dir) in output
        assert "1\n" not in output, "it trained first"
    table("a folder that may not be written", 2, "status 2 before the first step, with the folder's name")


def test_too_little_room_is_said_before_the_first_step(zygote, data, disk, table, tmp_path):
    folder = disk(tmp_path / "disk", 300)
    code, output = zygote.do("run", run_dir=folder / "run", data=data, keep=5)
    assert code == 2
    assert "NoSpace" in output
    assert "6 checkpoints of 0.00 GB need" in output
    assert "1\n" not in output
    assert not list((folder / "run").rglob("*.safetensors"))


def test_a_recipe_that_will_not_fit_is_refused_before_its_first_stage(zygote, table, tmp_path):
    """10,000 checkpoints of 80 GB fit nowhere."""
    words = [
        "pretrain",
        "--recipe",
        "b7",
        "--train.keep",
        "10000",
        "--runs",
        str(tmp_path),
        "--device",
        "cpu",
        "--quiet",
    ]
    code, output = zygote.do("command", words=words)
    assert code == 2, output
    assert "10001 checkpoints of" in output
    assert "are free: make room, keep fewer" in output
    assert "[1/5]" not in output
    table(
        "too little room for the checkpoints",
        2,
        "refused before the first step, with what is needed and what is free",
    )


def test_time_and_room_are_estimated_before_a_long_run(zygote, table, tmp_path):
    """A million steps in three seconds: it says how many it will make, how long that takes, and what a checkpoint needs."""
    words = pretrain_words(tmp_path, "--train.steps", 1_000_000, "--train.save-every", 0, "--minutes", 0.05)
    child = zygote.start("command", words=words)
    child.until(lambda text: "as many as fit in 0.05 minutes" in text)
    said = re.search(
        r"([\d,]+) steps on cpu in float32: about (\d+) s, checkpoints of (\d+) MB", child.output()
    )
    assert not (tmp_path / "tiny" / "metrics.jsonl").exists(), "the estimate comes first"
    assert child.wait() == 0, child.output()
    steps, seconds, megabytes = (int(text.replace(",", "")) for text in said.groups())
    lines = (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == steps < 1_000_000
    took = json.loads((tmp_path / "tiny" / "stages.json").read_text())["training"]["seconds"]
    assert steps == 100 or seconds <= 3
    assert 0.25 * seconds < took < 4 * seconds + 1
    checkpoint = latest_checkpoint(tmp_path / "tiny" / "checkpoints")
    size = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    assert abs(size / 1e6 - megabytes) < 1
    table(
        "a run that would take longer than its `--minutes`",
        1,
        f"before the first step it says how many steps it will make, how long that takes (said {seconds} s, took "
        f"{took:.1f} s), and the size of a checkpoint",
    )


def test_kill_9_on_a_full_disk(zygote, data, whole, rounds, disk, table, tmp_path):
    """Both at once: what the killed process left must not keep the disk full."""
    folder, dice = disk(tmp_path / "disk", 2048), random.Random(2)
    for attempt in range(max(2, rounds // 4)):
        run_dir = folder / str(attempt)
        child = zygote.start("run", run_dir=run_dir, data=data, pause=0.005)
        child.until_line(dice.randrange(4, 30))
        child.send()
        assert child.wait() == -signal.SIGKILL
        junk = run_dir / "checkpoints" / f".step-000000{attempt:02d}.abcdefgh.tmp"
        junk.mkdir()
        (junk / "model.safetensors").write_bytes(bytes(shutil.disk_usage(folder).free - 8192))
        resume(zygote, data, run_dir, whole)
        shutil.rmtree(run_dir)
    table(
        "`kill -9` on a full disk",
        max(2, rounds // 4),
        "what the killed process left is removed at the next start, which makes the room",
    )
