"""Processes that are there to be killed, and what must be true of a run after that."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from minillm.storage.checkpoints import latest_checkpoint, load_checkpoint

HERE = Path(__file__).parent
TABLE = HERE.parents[1] / "data" / "results" / "faults.json"
HOW = "make faults"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


class Child:
    """A process of the suite."""

    def __init__(self, zygote, pid, log):
        self.zygote, self.pid, self.log, self.code = zygote, pid, log, None

    def send(self, number=signal.SIGKILL):
        os.kill(self.pid, number)  # the zygote has not waited for it: the number belongs to no other process

    def wait(self, timeout=60.0):
        """Its exit status; None if it still runs."""
        if self.code is None:
            self.code = self.zygote.ask({"wait": self.pid, "timeout": timeout})
        return self.code

    def output(self):
        return self.log.read_text() if self.log.exists() else ""

    def until(self, enough, timeout=60.0, or_its_end=False):
        """Wait until its output is enough."""
        end = time.monotonic() + timeout
        while not enough(self.output()):
            if self.wait(0.005) is not None and not enough(self.output()):
                assert or_its_end, f"it ended with {self.code}: {self.output()}"
                return
            assert time.monotonic() < end, self.output()

    def until_logged(self, run_dir, step):
        """Wait until the metrics of its run have reached a step."""
        self.until(lambda text: steps_logged(run_dir) >= step)

    def until_line(self, step):
        """Wait until it has said that this step is done, or a later one."""
        self.until(lambda text: any(line.isdigit() and int(line) >= step for line in text.splitlines()))


class Zygote:
    """Starts functions of `workload` in processes of their own."""

    def __init__(self, folder):
        self.folder, self.numbers = folder, itertools.count()
        self.process = subprocess.Popen(
            [sys.executable, HERE / "zygote.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )

    def ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, name, **args):
        log = self.folder / f"{next(self.numbers)}-{name}.log"
        args = {key: str(value) if isinstance(value, Path) else value for key, value in args.items()}
        return Child(self, self.ask({"start": name, "args": args, "log": str(log)}), log)

    def do(self, name, **args):
        """Start, wait, and give back (exit status, output)."""
        child = self.start(name, **args)
        code = child.wait()
        if code is None:
            child.send()
            child.wait()
            raise AssertionError(f"{name} hangs: {child.output()}")
        return code, child.output()


# ---------------------------------------------------------------- nothing is lost


def contents(run_dir):
    """All that must not depend on interruptions: weights, optimizer, random state, position in the data, losses."""
    groups, state = load_checkpoint(latest_checkpoint(run_dir / "checkpoints"))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [{k: v for k, v in line.items() if k not in ("tokens_per_s", "mfu")} for line in lines]
    kept = {name: state[name] for name in ("step", "tokens", "loader", "skipped", "recent")}
    return groups, kept, losses


def assert_same(run_dir, whole):
    """A run that was disturbed has become the run that was not, bit for bit, and nothing lies about."""
    (groups, kept, losses), (groups_whole, kept_whole, losses_whole) = contents(run_dir), whole
    assert kept == kept_whole
    assert losses == losses_whole
    assert groups.keys() == groups_whole.keys() == {"model", "optimizer", "random"}
    for group, tensors in groups.items():
        assert tensors.keys() == groups_whole[group].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, groups_whole[group][name]), f"{group} {name}"
    assert leftovers(run_dir) == []


def leftovers(run_dir):
    return [str(path.relative_to(run_dir)) for path in run_dir.rglob(".*.tmp")]


# ---------------------------------------------------------------- the command line


def pretrain_words(runs, *more):
    """`minillm pretrain` of a small model, to be killed: 30 steps, which write `runs/tiny/`."""
    return [
        *("pretrain", "--data.documents", "300", "--data.held-out", "30", "--train.steps", "30"),
        *(
            "--train.batch-size",
            "4",
            "--train.seq-len",
            "64",
            "--model.max-seq-len",
            "64",
            "--model.dim",
            "32",
        ),
        *("--model.n-layers", "2", "--model.n-heads", "2", "--model.n-kv-heads", "1"),
        *("--model.hidden-dim", "64", "--tokenizer.vocab-size", "400", "--model.vocab-size", "400"),
        *("--train.save-every", "5", "--train.log-every", "1", "--train.warmup-steps", "2", "--minutes", "0"),
        *("--quiet", "--device", "cpu", "--dtype", "float32", "--runs", str(runs), *map(str, more)),
    ]


def steps_logged(run_dir):
    """How far a run is, by its metrics."""
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0
