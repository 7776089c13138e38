"""Models in folders: ours and published ones, behind one door."""

# `ModelFolder` (folder.py) says what a folder is, and gives shape, weights, tokenizer and model. Behind it: files from strangers
# (weights.py), tensors into a model (build.py), our format (own.py), Meta's (meta.py), writing as a family publishes
# (published.py), and the tokenizers and prompts of published models (tokenizers.py).

from minillm.hub.folder import ModelFolder, load_run

__all__ = ["ModelFolder", "load_run"]
