"""What each step of cleaning costs: documents/s and peak memory as the input grows, each measurement in a fresh process.

python -m benchmarks.clean                        # about eight minutes on one core; writes data/results/clean.json
python -m benchmarks.clean --sizes 1000 --budget 60 --out /tmp/quick.json

A measurement is the whole pipeline with one step, from a file to a file: its memory includes reading and writing. "reading"
is the pipeline without a step, "everything" the recipe `own`. Documents/s are inside the step; `startup_s` is what the first
document waits for, the training of a detector for example. Small sizes come first; what would not fit in the budget is left
out, and named in `left_out`.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from minillm.base.files import atomic_write
from minillm.base.machine import describe_machine, peak_memory_bytes
from minillm.corpus import Document
from minillm.pipeline.run import clean
from minillm.pipeline.steps import clean_recipe, default_steps
from minillm.readers.documents import write_documents
from minillm.show.cleaning import truth_table
from minillm.world.defects import benchmark_item
from minillm.world.stream import documents
from minillm.world.task import CorpusConfig
from minillm.world.truth import with_repetitions

RESULTS = Path(__file__).parent.parent / "data" / "results" / "clean.json"
SIZES = (1_000, 10_000, 100_000)


def make(folder: Path, n: int) -> dict[str, Any]:
    """The corpus with 30 % of defects, and its benchmark; apart too, for the peak of a parent is the peak of its children."""
    config = CorpusConfig(defects=0.3)
    write_documents(with_repetitions(documents(config, n_documents=n)), folder / f"{n}.jsonl")
    write_documents((benchmark_item(config, item) for item in range(100)), folder / "benchmark.jsonl")
    return {}


def steps_of(folder: Path) -> list[Any]:
    """The steps of the recipe `own`, decontamination among them."""
    recipe = clean_recipe("own")
    against = dataclasses.replace(recipe.decontaminate, against=(str(folder / "benchmark.jsonl"),))
    return default_steps(dataclasses.replace(recipe, decontaminate=against))


def measure(folder: Path, name: str, n: int) -> dict[str, Any]:
    """One measurement, in this process."""
    steps = steps_of(folder)
    if name != "everything":
        steps = [step for step in steps if step.name == name]
    start = time.perf_counter()
    for step in steps:
        if callable(step):
            step(Document("A first text, so that what is loaded or trained once is there. " * 3, lang="en"))
    startup = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as out:
        report = clean(folder / f"{n}.jsonl", steps, out, report=False)
    inside = sum(step["seconds"] for step in report["steps"]) or report["seconds"]
    table = {
        "truth": truth_table(report),
        "steps": [
            {key: step[key] for key in ("name", "n_in", "n_out", "changed")} for step in report["steps"]
        ],
    }
    return {
        **(table if name == "everything" else {}),
        "documents_per_s": n / inside,
        "seconds": report["seconds"],
        "peak_memory_bytes": peak_memory_bytes(torch.device("cpu")),
        "startup_s": startup,
        "out": report["balance"]["out"],
    }


def apart(folder: Path, name: str, n: int) -> tuple[dict[str, Any], float]:
    """One measurement in a process of its own, and how long all of it took."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.clean", "--one", str(folder), name, str(n)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return json.loads(done.stdout.splitlines()[-1]), time.perf_counter() - start


def main() -> None:
    """Measure and store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--budget", type=float, default=900, help="seconds")
    parser.add_argument("--only", nargs="+", help="these steps; the others stay in the file as they are")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        folder, name, n = Path(args.one[0]), args.one[1], int(args.one[2])
        print(json.dumps(make(folder, n) if name == "corpus" else measure(folder, name, n)))
        return
    begun, left_out = time.perf_counter(), []
    results: dict[str, dict[str, Any]] = {}
    if args.only and args.out.exists():
        results = json.loads(args.out.read_text(encoding="utf-8"))["results"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        took: dict[str, tuple[float, int]] = {}
        for n in sorted(args.sizes):
            apart(folder, "corpus", n)
            names = ["reading", *(step.name for step in steps_of(folder)), "everything"]
            for name in args.only or names:
                inside, before = took.get(name, (0.0, n))
                left = args.budget - (time.perf_counter() - begun)
                if inside * n / before + 5 > left:
                    left_out.append(f"{name} at {n}")
                    continue
                result, seconds = apart(folder, name, n)
                took[name] = result["seconds"], n
                results.setdefault(name, {})[str(n)] = result
                rate, memory = result["documents_per_s"], result["peak_memory_bytes"] / 2**20
                print(
                    f"{name:14} {n:8,} {rate:10,.0f} documents/s {memory:7.0f} MiB {seconds:6.1f} s",
                    flush=True,
                )
    record = {
        "command": "python -m benchmarks.clean",
        "machine": describe_machine(),
        "corpus": "CorpusConfig(defects=0.3)",
        "results": results,
        "left_out": left_out,
        "seconds": time.perf_counter() - begun,
    }
    with atomic_write(args.out) as file:
        json.dump(record, file, indent=1)


if __name__ == "__main__":
    main()
