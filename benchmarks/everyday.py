"""What every user waits for: importing the package, training a tokenizer, encoding; beside torch, sentencepiece, tokenizers.

python -m benchmarks.everyday
"""

import resource
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks.store import Store

IMPORTS = {
    "torch": "import torch",
    "minillm": "import minillm",
    "minillm, to train": "import minillm.train",
    "transformers, to train": "from transformers import LlamaForCausalLM",
}


@dataclass(frozen=True, kw_only=True)
class Args:
    """Measure imports and tokenizers."""

    quick: bool = False
    """Fewer rounds."""
    only: str = ""
    """Only works whose name contains this."""
    resume: bool = False
    """Keep what an unfinished run has measured already."""
    n_bytes: int = 10_000_000
    """Text for the tokenizers."""
    out: Path = Path("data/results/everyday-cpu.json")
    """The file of the results."""


def child_seconds(code: str) -> float:
    """Processor time of a Python that runs `code`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def imports(rounds: int) -> dict[str, Any]:
    """Processor seconds of each import, in turns; the first round fills the disk cache and is not kept."""
    runs = [{name: child_seconds(code) for name, code in IMPORTS.items()} for _ in range(rounds + 1)][1:]
    samples = {name: [run[name] for run in runs] for name in IMPORTS}
    return {
        "seconds": {name: statistics.median(values) for name, values in samples.items()},
        "samples": samples,
        "ratio": {
            name: statistics.median(run[name] / run["torch"] for run in runs)
            for name in IMPORTS
            if name.startswith("minillm")
        },
    }


def tokenizer(n_bytes: int, rounds: int) -> dict[str, Any]:
    """Training to 4,096 tokens and encoding of the package's own corpus."""
    from benchmarks.tokenizer import speed, take
    from minillm.world.stream import documents
    from minillm.world.task import CorpusConfig

    texts = take(
        [d.text for d in documents(CorpusConfig(seed=0), n_documents=max(100, n_bytes // 200))], n_bytes
    )
    return speed(texts, 4096, rounds=rounds)


def run(args: Args) -> None:
    """Measure, store, tell."""
    import sentencepiece
    import tokenizers

    from minillm.base.machine import describe_machine

    store = Store(
        args.out, command="make bench", machine=describe_machine() | {"torch_threads": 1}, resume=args.resume
    )
    store.note(versions={"sentencepiece": sentencepiece.__version__, "tokenizers": tokenizers.__version__})
    plan: dict[str, Callable[[], dict[str, Any]]] = {
        "imports": lambda: imports(3 if args.quick else 7),
        "tokenizer": lambda: tokenizer(args.n_bytes, 2 if args.quick else 5),
    }
    for name, work in plan.items():
        if args.only not in name or store.has(name):
            continue
        result = work()
        store.put(name, result)
        if name == "imports":
            print(
                f"{name:34} " + ", ".join(f"{n} {s:.2f} s" for n, s in result["seconds"].items()), flush=True
            )
            continue
        for part in ("train", "encode"):
            told = ", ".join(f"{n} {r['median_s']:.2f} s" for n, r in result[part].items())
            print(f"{'tokenizer ' + part:34} {told}", flush=True)


if __name__ == "__main__":
    run(tyro.cli(Args, description=__doc__))
