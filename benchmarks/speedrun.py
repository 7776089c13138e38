"""What the newcomer's command took and gave on this machine, into data/results/speedrun.json; the README quotes it.

make speedrun
python -m benchmarks.speedrun          # reads runs/tiny, or the run that is named
"""

import json
import sys
from pathlib import Path

from minillm.base.files import atomic_write
from minillm.base.machine import describe_machine

RESULTS = Path(__file__).parents[1] / "data" / "results" / "speedrun.json"


def figures(run_dir: Path) -> dict:
    """Seconds of each stage, speed, losses and marks of a finished run."""
    found, stages, config = (
        json.loads((run_dir / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("scores", "stages", "config")
    )
    seconds = {
        name: stage["seconds"]
        for name, stage in stages.items()
        if isinstance(stage, dict) and "what" in stage
    }
    return {
        "command": "make speedrun",
        "machine": describe_machine(),
        "recipe": config["recipe"],
        "steps": stages["steps"],
        "seconds": seconds,
        "training": found["training"],
        "decode_tokens_per_s": found["decode_tokens_per_s"],
        "peak_memory_bytes": found["peak_memory_bytes"],
        "scores": [{key: score[key] for key in ("name", "n", "correct")} for score in found["scores"]],
    }


def main(argv: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else argv
    result = figures(Path(arguments[0] if arguments else "runs/tiny"))
    with atomic_write(RESULTS) as file:
        json.dump(result, file, indent=1, ensure_ascii=False)
        file.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
