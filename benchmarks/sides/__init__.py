"""The sides of a comparison. Each runs in a process, and where its pins clash in an environment, of its own (`worker.py`)."""
