"""Tensors, checkpoints and token shards on disk, whole or not there."""
