"""Models in folders, ours and published ones: weights from strangers, names and layouts, tokenizers, conversion."""
