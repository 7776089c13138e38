"""Training, decoding and prefill beside the peers: same shape, same weights, same data, same machine, in turns.

python -m benchmarks.beside --quick
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks.peers import BESIDE_US, NOT_INSTALLABLE, OWN_ENVIRONMENT, Missing, Side
from benchmarks.store import Store


def shape(
    vocab_size: int, dim: int, n_layers: int, n_heads: int, n_kv_heads: int, hidden_dim: int, max_seq_len: int
):
    """The sizes of a LLaMA, as every side is told them."""
    return dict(locals())


SHAPES = {
    "tiny": shape(4096, 256, 6, 8, 4, 688, 2048),  # 6.5 million parameters
    "m125": shape(32000, 768, 12, 12, 12, 2048, 2048),  # 134 million, 85 of them in the blocks
    "smoke": shape(64, 32, 1, 4, 2, 64, 64),
}
SIDES = (*BESIDE_US, *OWN_ENVIRONMENT)


@dataclass(frozen=True, kw_only=True)
class Work:
    """One measurement: what every side does, and how often it is done in a quick and in a full run (0: not at all)."""

    kind: Literal["train", "decode", "prefill", "memory"]
    shape: str = "tiny"
    dtype: str = "float32"
    batch: int = 1
    seq_len: int = 256
    prompt: int = 128
    new_tokens: int = 256
    compiled: bool = False
    warm_up: int = 1
    quick: int = 0
    full: int = 5
    sides: tuple[str, ...] = SIDES
    device: str = "cpu"

    @property
    def name(self) -> str:
        size = {
            "train": "compiled" if self.compiled else "eager",
            "memory": f"batch {self.batch}",
            "decode": f"batch {self.batch}" + (" compiled" if self.compiled else ""),
            "prefill": str(self.prompt),
        }
        return f"{self.kind} {self.shape} {self.dtype} {size[self.kind]}"

    @property
    def units(self) -> int:
        """Tokens of one measurement."""
        each = {
            "train": self.seq_len,
            "memory": self.seq_len,
            "decode": self.new_tokens,
            "prefill": self.prompt,
        }
        return self.batch * each[self.kind]


def works() -> list[Work]:
    """What is measured, the most telling first, so that a run that is out of time has those."""
    one_row = ("minillm", "plain PyTorch", "transformers", "litgpt")
    compiled = {"compiled": True, "warm_up": 2, "full": 3}
    return [
        Work(kind="train", batch=16, quick=3),
        Work(kind="train", dtype="bfloat16", batch=16, quick=3),
        Work(kind="decode", quick=5),
        Work(kind="decode", dtype="bfloat16", quick=5),
        Work(kind="decode", batch=16, new_tokens=128, quick=3),
        Work(kind="prefill", prompt=2048, quick=5),
        Work(kind="memory", batch=16, quick=1, full=1),
        Work(kind="decode", batch=16, dtype="bfloat16", new_tokens=128),
        Work(kind="prefill", prompt=2048, dtype="bfloat16"),
        Work(kind="decode", shape="m125", full=3),
        Work(kind="decode", shape="m125", dtype="bfloat16", full=3),
        Work(kind="train", batch=16, **compiled),
        Work(kind="train", dtype="bfloat16", batch=16, **compiled),
        Work(kind="decode", **compiled, sides=one_row),
        Work(kind="decode", dtype="bfloat16", **compiled, sides=one_row),
        Work(kind="decode", shape="m125", batch=16, new_tokens=32, full=3),
        Work(kind="train", shape="m125", batch=2, seq_len=512, full=3),
        Work(kind="train", shape="m125", dtype="bfloat16", batch=2, seq_len=512, full=3),
    ]


class Bench:
    """The sides that have been started, and the weights that they share."""

    def __init__(
        self, *, threads: int = 1, sides: tuple[str, ...] = SIDES, pip_args: str = "", patience_s: float = 600
    ):
        self.threads, self.chosen, self.pip_args, self.patience_s = threads, sides, pip_args, patience_s
        self.sides: dict[str, Side] = {}
        self.missing: dict[str, str] = dict(NOT_INSTALLABLE)
        self.folder = Path("build") / "bench"

    def side(self, name: str) -> Side:
        """The side's process, started at the first use.

        Raises:
            Missing: it cannot be had here.
        """
        if name in self.missing:
            raise Missing(self.missing[name])
        if name not in self.sides or not self.sides[name].alive:
            try:
                self.sides[name] = Side(name, threads=self.threads, pip_args=self.pip_args)
            except Missing as error:
                self.missing[name] = str(error)
                raise
        return self.sides[name]

    def file(self, shape: str) -> Path:
        """Weights and tokens of a shape, made by minillm once."""
        path = (self.folder / f"{shape}.pt").resolve()
        if not path.exists() or shape == "smoke":
            path.parent.mkdir(parents=True, exist_ok=True)
            self.side("minillm").ask(self.patience_s, do="weights", shape=SHAPES[shape], file=str(path))
        return path

    def close(self) -> None:
        """End all sides; those that are asked again are started again."""
        for side in self.sides.values():
            side.close()

    def measure(self, work: Work, rounds: int) -> dict[str, Any]:
        """Rounds of one measurement, each side once in every round."""
        started, absent, ready = time.time(), {}, {}
        order = {"work": asdict(work), "file": str(self.file(work.shape))}
        for name in (name for name in work.sides if name in self.chosen):
            try:
                if work.kind == "memory" and name in self.sides:
                    self.sides.pop(name).close()  # the peak is that of a process which did nothing else
                ready[name] = self.side(name).ask(self.patience_s, do="prepare", **order)
                if work.kind == "memory":
                    self.sides.pop(name).close()
            except Missing as error:
                absent[name] = str(error)
        result: dict[str, Any] = {
            "work": asdict(work),
            "shape": SHAPES[work.shape],
            "missing": absent,
            "tokens": work.units,
        }
        if work.kind == "memory":
            result["peak_bytes"] = {name: answer["peak_rss"] for name, answer in ready.items()}
            result["before_bytes"] = {name: answer["rss_before"] for name, answer in ready.items()}
        else:
            samples: dict[str, list[dict[str, float]]] = {name: [] for name in ready}
            for _ in range(rounds):
                for name in list(samples):
                    try:
                        samples[name].append(self.sides[name].ask(self.patience_s, do="measure"))
                    except Missing as error:
                        absent[name] = str(error)
                        del samples[name]
            result |= summary(samples, work.units)
            if work.kind == "train" and not work.compiled:
                result["parts"] = {
                    name: self.sides[name].ask(self.patience_s, do="parts") for name in samples
                }
        result["parameters"] = {name: answer["parameters"] for name, answer in ready.items()}
        result["agrees"] = {
            name: agrees(work, ready["minillm"]["result"], answer["result"])
            for name, answer in ready.items()
            if "minillm" in ready and name != "minillm" and self.same_weights(name)
        }
        result["took_s"] = round(time.time() - started, 1)
        return result

    def same_weights(self, name: str) -> bool:
        return name in self.sides and bool(self.sides[name].about["same_weights"])


def summary(samples: dict[str, list[dict[str, float]]], units: int) -> dict[str, Any]:
    """Tokens a second of every side, from the processor time on one thread, and the ratio of minillm's to each.

    The processor's time does not run while another process has the core; on a quiet machine both clocks agree.
    """
    out: dict[str, Any] = {"samples": samples, "tokens_per_s": {}, "ratio": {}}
    for name, runs in samples.items():
        out["tokens_per_s"][name] = units / statistics.median(run["cpu_s"] for run in runs)
        if name != "minillm" and "minillm" in samples:
            pairs = zip(samples["minillm"], runs)
            out["ratio"][name] = statistics.median(b["cpu_s"] / a["cpu_s"] for a, b in pairs)
    return out


def agrees(work: Work, ours: Any, theirs: Any) -> bool | None:
    """Whether a side computed what minillm did: two losses, the tokens, or the logits. None where rounding decides.

    The second loss comes after one step, of which each side has its own habits: not all of them decay a norm's weight.
    """
    if work.dtype != "float32":
        return None
    if work.kind in ("train", "memory"):
        return abs(ours[0] - theirs[0]) < 2e-5 and abs(ours[1] - theirs[1]) < 5e-4
    if work.kind == "decode":
        return ours == theirs
    return max(abs(a - b) for a, b in zip(ours, theirs)) < 1e-3


@contextmanager
def bench(**options: Any) -> Iterator[Bench]:
    made = Bench(**options)
    try:
        yield made
    finally:
        made.close()


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure minillm beside its peers; every result is stored as soon as it is there."""

    quick: bool = False
    """Only the works of `make bench`, in fewer rounds."""
    only: str = ""
    """Only works whose name contains this: "train", "decode tiny", …"""
    resume: bool = False
    """Keep what an unfinished run has measured already."""
    budget_min: float = 60.0
    """No new measurement begins after so many minutes."""
    threads: int = 1
    """Threads of every side."""
    pip_args: str = ""
    """For pip, where a peer is installed: an index, a mirror."""
    sides: tuple[str, ...] = SIDES
    """Who takes part; minillm always should."""
    out: Path = Path("data/results/beside-cpu.json")
    """The file of the results."""


def line(name: str, result: dict[str, Any]) -> str:
    """A result in one line of text."""
    if "peak_bytes" in result:
        told = [f"{side} {n / 2**20:,.0f} MiB" for side, n in result["peak_bytes"].items()]
    else:
        rates = result["tokens_per_s"]
        told = [f"{side} {rate:,.0f}" + (f" ({result['ratio'][side]:.2f})" if side in result["ratio"] else "")
                for side, rate in rates.items()]  # fmt: skip
    wrong = [side for side, same in result["agrees"].items() if same is False]
    return f"{name:34} " + ", ".join(told) + (f"  DISAGREES: {', '.join(wrong)}" if wrong else "")


def run(args: Args) -> int:
    """Measure, store, and tell. Returns the number of works left undone for lack of time."""
    import transformers

    from minillm.base.machine import describe_machine
    from minillm.kernels.matmul import tune_matmul

    machine = describe_machine() | {"torch_threads": args.threads}
    command = "make bench" if args.quick else "make bench-full"
    store = Store(args.out, command=command, machine=machine, resume=args.resume)
    store.note(
        versions={"transformers": transformers.__version__}, float32_by="oneDNN" if tune_matmul() else "MKL"
    )
    deadline, left, shape = time.monotonic() + 60 * args.budget_min, 0, ""
    with bench(threads=args.threads, sides=args.sides, pip_args=args.pip_args) as all_sides:
        for work in works():
            rounds = work.quick if args.quick else work.full
            if not rounds or args.only not in work.name or store.has(work.name):
                continue
            if time.monotonic() > deadline:
                left += 1
                print(f"{work.name:34} no time left; --resume goes on from here")
                continue
            if shape not in ("", work.shape):
                all_sides.close()  # they keep the memory that they once had, five times that of a large shape
            shape = work.shape
            result = all_sides.measure(work, rounds)
            if work.kind == "train":
                # Each side's own: minillm may have another library for them.
                result["matmul_flops_per_s"] = {
                    side: all_sides.side(side).ask(all_sides.patience_s, do="matmul", dtype=work.dtype)[
                        "flops_per_s"
                    ]
                    for side in result["samples"]
                }
            store.put(work.name, result)
            print(line(work.name, result), flush=True)
        versions = {n: s.about["versions"].get(n) for n, s in all_sides.sides.items()}
        store.note(missing=all_sides.missing, versions={n: v for n, v in versions.items() if v})
        store.save()
    return left


if __name__ == "__main__":
    sys.exit(min(1, run(tyro.cli(Args, description=__doc__))))
