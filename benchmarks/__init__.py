"""Measurements beside the peers: same shape, same data, same machine, one run, in turns. `python -m benchmarks` writes data/results/."""
