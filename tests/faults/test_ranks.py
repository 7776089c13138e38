"""Runs of two processes, one of which is killed, stopped, or told to end: the other ends too, and nothing is lost."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import ENVIRONMENT, HERE, assert_same, contents, leftovers, pretrain_words, steps_logged

from minillm.storage.checkpoints import latest_checkpoint

pytestmark = pytest.mark.distributed
TIMEOUT_S = 2.0  # how long a process waits for another one, where that is tried
PATIENT_S = 60.0  # elsewhere: a disk may take seconds for a save
GRACE_S = 15.0  # a loaded machine
ENGINES = {
    "copies": {"engine": "plain"},
    "ZeRO 2": {"engine": "zero", "zero_stage": 2},
    "ZeRO 3 in pieces": {"engine": "zero", "zero_stage": 3, "sharded": True},
}
LOST = "has lost another process of the run"


def free_port():
    """A port that nobody listens on, and that the system gives to nobody by itself before we do."""
    for port in random.sample(range(20_000, 30_000), 100):
        with socket.socket() as trial, contextlib.suppress(OSError):
            trial.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def start(zygote, data, run_dir, engine, ranks=(0, 1), each=None, timeout_s=PATIENT_S, **options):
    """The processes of a run, by rank; `each` has the options of single ones."""
    port, settings = free_port(), {**ENGINES[engine], "timeout_s": timeout_s}
    return {
        rank: zygote.start(
            "rank",
            run_dir=run_dir,
            data=data,
            rank=rank,
            port=port,
            engine=settings,
            **{**options, **(each or {}).get(rank, {})},
        )
        for rank in ranks
    }


def finish(children, within=60.0):
    """All exit statuses, in bounded time; what still runs then is killed, and fails the test."""
    end = time.monotonic() + within
    codes = {rank: child.wait(max(0.0, end - time.monotonic())) for rank, child in children.items()}
    hanging = [rank for rank, code in codes.items() if code is None]
    for rank in hanging:
        children[rank].send()
        children[rank].wait()
    assert not hanging, f"{hanging} hang: {[children[rank].output() for rank in hanging]}"
    return codes


def resume(zygote, data, run_dir, engine, whole_by_two):
    children = start(zygote, data, run_dir, engine)
    assert finish(children) == {0: 0, 1: 0}, [child.output() for child in children.values()]
    assert_same(run_dir, whole_by_two(engine))


@pytest.fixture(scope="module")
def whole_by_two(zygote, data, tmp_path_factory):
    """What two processes leave that nobody disturbs, by engine."""
    found = {}

    def whole(engine):
        if engine not in found:
            folder = tmp_path_factory.mktemp("two")
            children = start(zygote, data, folder, engine)
            assert finish(children) == {0: 0, 1: 0}, [child.output() for child in children.values()]
            found[engine] = contents(folder)
        return found[engine]

    return whole


def other_ends(child, since, limit):
    """The survivor ends by itself with status 2 and says why; returns after how many seconds."""
    code = finish({"the other": child}, limit)["the other"]
    assert code == 2, (code, child.output())
    assert LOST in child.output()
    return time.monotonic() - since


def test_kill_9_of_one_process(zygote, data, whole_by_two, rounds, table, tmp_path):
    """At a random moment from the first step on, the first process or the second."""
    dice, slowest, tried, in_saving = random.Random(11), 0.0, 0, 0
    while tried < max(3, rounds // 3):
        engine = list(ENGINES)[tried % 3]
        run_dir, victim = tmp_path / "run", dice.randrange(2)
        children = start(zygote, data, run_dir, engine, pause=0.002)
        children[victim].until_line(1)
        if children[victim].wait(dice.uniform(0, 0.4)) is not None:  # a fast machine: it has ended
            assert finish(children) == {0: 0, 1: 0}, [child.output() for child in children.values()]
            shutil.rmtree(run_dir)
            continue
        children[victim].send()
        assert children[victim].wait() == -signal.SIGKILL
        slowest = max(slowest, other_ends(children[1 - victim], time.monotonic(), GRACE_S))
        in_saving += any("step-" in name for name in leftovers(run_dir))
        resume(zygote, data, run_dir, engine, whole_by_two)
        shutil.rmtree(run_dir)
        tried += 1
    table(
        "`kill -9` of one of two processes, at a random moment",
        tried,
        f"the other ends with status 2 and says so, within {slowest:.2f} s; resumed to the same bits; "
        f"{in_saving} of the kills fell into a save",
    )


def test_kill_9_of_one_process_in_a_save(zygote, data, whole_by_two, rounds, table, tmp_path):
    """Before a random request to the file system, of the process that writes, or of one of two that do."""
    dice, slowest, n = random.Random(12), 0.0, max(3, rounds // 4)
    for attempt in range(n):
        engine, victim = [("copies", 0), ("ZeRO 3 in pieces", 0), ("ZeRO 3 in pieces", 1)][attempt % 3]
        run_dir = tmp_path / str(attempt)
        number, event = dice.randrange(1, 5), dice.randrange(1, 8 if victim else 50)
        order = {victim: {"dies_in_save": number, "dies_at": event}}
        children = start(zygote, data, run_dir, engine, each=order)
        assert children[victim].wait() == -signal.SIGKILL, children[victim].output()
        slowest = max(slowest, other_ends(children[1 - victim], time.monotonic(), GRACE_S))
        assert not (run_dir / "checkpoints" / f"step-{4 * number + 4:08d}").exists()
        resume(zygote, data, run_dir, engine, whole_by_two)
    table(
        "`kill -9` of one of two processes in a save",
        n,
        f"the same, within {slowest:.2f} s; the checkpoint is the old one or the new one, whole",
    )


def test_a_process_that_dies_before_the_first_step_or_never_comes(
    zygote, data, whole_by_two, rounds, table, tmp_path
):
    dice, slowest, n = random.Random(13), 0.0, max(2, rounds // 6)
    for attempt in range(n):
        engine, victim = list(ENGINES)[attempt % 3], dice.randrange(2)
        run_dir, since = tmp_path / str(attempt), time.monotonic()
        ranks = (1 - victim,) if attempt % 2 else (0, 1)
        children = start(zygote, data, run_dir, engine, ranks, timeout_s=TIMEOUT_S)
        if victim in children:
            time.sleep(dice.uniform(0, 0.08))
            children[victim].send()
            assert children[victim].wait() == -signal.SIGKILL
        slowest = max(slowest, other_ends(children[1 - victim], since, 5 * TIMEOUT_S + GRACE_S))
        resume(zygote, data, run_dir, engine, whole_by_two)
    table(
        "one of two processes dies before the first step, or is never started",
        n,
        f"the other gives up after at most {slowest:.1f} s, where `--timeout-s` is {TIMEOUT_S:g}; the same command begins",
    )


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_while_the_groups_are_made(zygote, data, victim, tmp_path):
    """The group in which one waits for data for days must not be made with that patience."""
    order = {victim: {"dies_joining": True}}
    children = start(zygote, data, tmp_path, "copies", each=order, timeout_s=TIMEOUT_S)
    assert children[victim].wait() == -signal.SIGKILL, children[victim].output()
    other_ends(children[1 - victim], time.monotonic(), 5 * TIMEOUT_S + GRACE_S)


def test_a_process_that_hangs(zygote, data, whole_by_two, rounds, table, tmp_path):
    """SIGSTOP: it is there, and does nothing. While it lives, its folder is its own; woken, it sees that it is alone."""
    dice, slowest, n = random.Random(14), 0.0, max(2, rounds // 10)
    for attempt in range(n):
        engine, victim = list(ENGINES)[attempt % 3], attempt % 2
        run_dir = tmp_path / str(attempt)
        children = start(zygote, data, run_dir, engine, timeout_s=2 * TIMEOUT_S, pause=0.002)
        children[victim].until_line(dice.randrange(1, 30))
        children[victim].send(signal.SIGSTOP)
        try:
            seconds = other_ends(children[1 - victim], time.monotonic(), 2 * TIMEOUT_S + GRACE_S)
            assert seconds > TIMEOUT_S
            slowest = max(slowest, seconds)
            if victim == 0:
                again = start(zygote, data, run_dir, engine)
                assert finish(again) == {0: 2, 1: 2}
                assert f"another run (process {children[0].pid}" in again[0].output()
        finally:
            children[victim].send(signal.SIGCONT)
        assert finish({"woken": children[victim]}, 2 * TIMEOUT_S + GRACE_S) == {"woken": 2}
        assert LOST in children[victim].output()
        resume(zygote, data, run_dir, engine, whole_by_two)
    table(
        "one of two processes hangs (SIGSTOP)",
        n,
        f"the other ends with status 2 after at most {slowest:.1f} s, where `--timeout-s` is {2 * TIMEOUT_S:g}; woken, the one "
        "that hung ends too; resumed to the same bits",
    )


def test_who_waits_for_data_is_patient(zygote):
    """While the first process prepares text, the others wait longer than for anything else."""
    port = free_port()
    late = {
        rank: zygote.start("come_late", rank=rank, port=port, timeout_s=1.0, seconds=3.0) for rank in (0, 1)
    }
    assert finish(late) == {0: 0, 1: 0}, [child.output() for child in late.values()]


@pytest.mark.parametrize("which", ["one", "both"])
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_to_processes(zygote, data, whole_by_two, rounds, which, name, code, table, tmp_path):
    """All stop after the same step, which is saved; all say the same by their exit status, whoever got the signal."""
    dice, tried = random.Random(f"{which} {name}"), 0
    for attempt in range(max(1, rounds // 10)):
        engine, run_dir = dice.choice(list(ENGINES)), tmp_path / str(attempt)
        children = start(zygote, data, run_dir, engine, pause=0.005)
        children[0].until_line(dice.randrange(1, 30))
        for rank in (0, 1) if which == "both" else (dice.randrange(2),):
            children[rank].send(getattr(signal, name))
        codes, said = finish(children), [child.output() for child in children.values()]
        assert codes == {0: code, 1: code}, said
        last = int(said[0].split(f"\n{name}")[0].split()[-1])
        for text in said:
            assert f"{name} after step {last}: saved to" in text
        assert (run_dir / "checkpoints" / f"step-{last:08d}").exists()
        resume(zygote, data, run_dir, engine, whole_by_two)
        tried += 1
    table(
        f"a run of two processes: {name} to {which}",
        tried,
        f"both finish the same step, which is saved, and end with status {code}; resumed to the same bits",
    )


def test_one_process_cannot_write(zygote, data, whole_by_two, table, tmp_path):
    """A limit on the size of its files stands for a full disk on one of two machines."""
    pytest.importorskip("resource")
    for victim in (0, 1):
        run_dir = tmp_path / str(victim)
        each = {victim: {"limit": 6_000, "step": 10}}
        children = start(zygote, data, run_dir, "ZeRO 3 in pieces", each=each)
        codes, said = finish(children), [child.output() for child in children.values()]
        assert codes == {0: 2, 1: 2}, said
        for text in said:
            assert f"process {victim} could not write its part" in text
        assert leftovers(run_dir) == []
        assert sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))[-1] == "step-00000008"
        resume(zygote, data, run_dir, "ZeRO 3 in pieces", whole_by_two)
    table(
        "one of two processes cannot write its part of a checkpoint",
        2,
        "both end with status 2 and say which; the checkpoint before is whole",
    )


# ---------------------------------------------------------------- the command line


def commands(zygote, runs):
    port, words = free_port(), pretrain_words(runs, "--timeout-s", PATIENT_S)
    return {rank: zygote.start("command", words=words, rank=rank, port=port) for rank in (0, 1)}


def children_of(pid):
    """Numbers of the processes that a process has started and that still run."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in path.read_text().split()] if path.exists() else []


def runs_still(pid):
    stat = Path(f"/proc/{pid}/stat")
    with contextlib.suppress(OSError):
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def launch(run_dir, goal, words, log):
    """torchrun with two processes; returns at step `goal` of the run, with the numbers of the processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", str(free_port()), "--module", "minillm.cli", *words]
    with open(log, "w") as output:
        launcher = subprocess.Popen(
            command, stdout=output, stderr=output, env=ENVIRONMENT, cwd=HERE.parents[1]
        )
    end = time.monotonic() + 120
    while steps_logged(run_dir) < goal and launcher.poll() is None:
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.005)
    return launcher, children_of(launcher.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torchrun_and_its_processes(zygote, rounds, table, tmp_path):
    """One of its processes is killed; it gets SIGTERM and SIGINT; it is killed itself. Nothing runs on for ever."""
    if rounds < 50:
        pytest.skip("starts torchrun five times, a minute: with --faults-rounds 50")
    more, last = ["--train.steps", 400, "--train.save-every", 50, "--timeout-s", PATIENT_S], "step-00000400"
    port, words = free_port(), pretrain_words(tmp_path / "whole", *more)
    alone = {rank: zygote.start("command", words=words, rank=rank, port=port) for rank in (0, 1)}
    assert finish(alone) == {0: 0, 1: 0}, [child.output() for child in alone.values()]
    run_dir, words = tmp_path / "runs" / "tiny", pretrain_words(tmp_path / "runs", *more)
    steps = {"a process": 60, "SIGTERM": 120, "SIGINT": 180, "SIGKILL": 240, "nothing": 400}
    for fault, goal in steps.items():
        log = tmp_path / f"{goal}.log"
        launcher, workers = launch(run_dir, goal, words, log)
        if fault == "a process":
            os.kill(workers[1], signal.SIGKILL)
        elif fault != "nothing":
            launcher.send_signal(getattr(signal, fault))
        code, end = launcher.wait(GRACE_S), time.monotonic() + GRACE_S
        while any(map(runs_still, workers)):
            assert time.monotonic() < end, f"{fault}: {workers} are left over: {log.read_text()}"
            time.sleep(0.01)
        newest = latest_checkpoint(run_dir / "checkpoints").name
        if fault == "a process":
            assert code == 1
            assert LOST in log.read_text()
        elif fault in ("SIGTERM", "SIGINT"):
            assert code == 1
            assert f"{fault} after step {int(newest[5:])}: saved to" in log.read_text()
            assert goal <= int(newest[5:]) < 400
        else:
            assert code == (-signal.SIGKILL if fault == "SIGKILL" else 0), log.read_text()
            assert newest == last
    assert_same(run_dir, contents(tmp_path / "whole" / "tiny"))
    table(
        "torchrun: one of its two processes is killed",
        1,
        "the other one and torchrun end, torchrun with status 1; the same command goes on",
    )
    table(
        "torchrun gets SIGTERM, or SIGINT",
        2,
        "the step is finished and saved, torchrun ends with status 1; resumed to the same bits",
    )
    table(
        "torchrun itself is killed",
        1,
        "its processes go on to the end of the run, and end; nothing is lost",
    )


def test_the_command_in_two_processes_goes_on(zygote, rounds, table, tmp_path):
    """`minillm pretrain`, as torchrun starts it: killed while the text is prepared, and in training."""
    whole = commands(zygote, tmp_path / "whole")
    assert finish(whole) == {0: 0, 1: 0}, [child.output() for child in whole.values()]
    expected, dice, n = contents(tmp_path / "whole" / "tiny"), random.Random(15), max(1, rounds // 20)
    for attempt in range(n):
        runs, victim = tmp_path / str(attempt), attempt % 2
        for stage in ("preparing", "training"):
            children = commands(zygote, runs)
            if stage == "preparing":
                children[0].until(lambda text: "[2/5]" in text)
            else:
                done = steps_logged(runs / "tiny")  # none, unless the first kill came late
                children[victim].until_logged(runs / "tiny", min(25, done + dice.randrange(1, 25)))
            children[victim].send()
            assert children[victim].wait() == -signal.SIGKILL
            other_ends(children[1 - victim], time.monotonic(), GRACE_S)
            assert "Traceback" not in children[1 - victim].output()
        children = commands(zygote, runs)
        assert finish(children) == {0: 0, 1: 0}, [child.output() for child in children.values()]
        assert_same(runs / "tiny", expected)
    table(
        "`kill -9` of one process of `minillm pretrain`, while the text is prepared and in training",
        2 * n,
        "the other ends with status 2, without a traceback; the same command goes on to the same bits",
    )
