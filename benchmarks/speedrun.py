"""What the newcomer's command takes and gives on this machine, into data/results/speedrun.json; the README quotes it.

python -m benchmarks.speedrun          # one `minillm speedrun`, in a folder that is removed
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from minillm.checkpoint import atomic_write
from minillm.runtime import describe_machine

RESULTS = Path(__file__).parents[1] / "data" / "results" / "speedrun.json"


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tiny"
        start = time.monotonic()
        subprocess.run([sys.executable, "-m", "minillm.cli", "speedrun", "--runs", name], check=True)
        seconds = time.monotonic() - start
        found = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
        stages = json.loads((folder / "stages.json").read_text(encoding="utf-8"))
    for score in found["scores"]:
        del score["wrong"]
    result = {
        "command": "python -m benchmarks.speedrun",
        "machine": describe_machine(),
        "seconds": round(seconds, 1),
        "stages": stages,
        **found,
    }
    with atomic_write(RESULTS) as file:
        json.dump(result, file, indent=1, ensure_ascii=False)
        file.write("\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
