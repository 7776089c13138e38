"""Run every benchmark: `python -m benchmarks [--quick] [--threads N]`."""

import sys

from benchmarks import beside_transformers

if __name__ == "__main__":
    sys.exit(beside_transformers.main(sys.argv[1:]))
