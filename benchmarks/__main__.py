"""Everything that this machine can measure: `make bench` (a few minutes) or `make bench-full` (about an hour).

python -m benchmarks --quick
python -m benchmarks --resume        # go on with a full run that was cut short
"""

import subprocess
import sys
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec

import tyro

from benchmarks import beside, everyday

# Scripts of their own, each with its result file; in the full run only.
OTHERS = ("loading", "dedup", "clean", "attention")


@dataclass(frozen=True, kw_only=True)
class Args(beside.Args):
    """Measure minillm beside its peers; every result is stored as soon as it is there."""

    only: str = ""
    """Only works whose name contains this: "train", "decode tiny", "tokenizer", "loading", …"""


def main(argv: list[str] | None = None) -> int:
    args = tyro.cli(Args, args=argv, description=__doc__)
    start = time.monotonic()

    def minutes_left() -> float:
        return args.budget_min - (time.monotonic() - start) / 60

    # The short ones first: they must not be what a run that is out of time lacks.
    everyday.run(
        everyday.Args(
            quick=args.quick, only=args.only, resume=args.resume, out=args.out.with_name("everyday-cpu.json")
        )
    )
    left = beside.run(replace(args, budget_min=minutes_left()))
    failed = []
    for name in () if args.quick else OTHERS:
        if args.only not in name or find_spec(f"benchmarks.{name}") is None:
            continue
        if minutes_left() < 1:
            left += 1
            continue
        print(f"benchmarks.{name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}"]
        if name == "dedup" and args.pip_args:  # it installs a peer
            command.append(f"--pip-args={args.pip_args}")
        if subprocess.run(command).returncode:
            failed.append(name)
    print(f"{(time.monotonic() - start) / 60:.1f} minutes" + (f"; {left} left for --resume" if left else ""))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
