"""Slow, obvious versions of things: each is the specification that the real code must equal."""

import torch


def rms_norm_reference(x, weight, eps):
    """RMSNorm, one vector and one number at a time."""
    rows = []
    for row in x.reshape(-1, x.shape[-1]).tolist():
        rms = (sum(value * value for value in row) / len(row) + eps) ** 0.5
        rows.append([value / rms * w for value, w in zip(row, weight.tolist())])
    return torch.tensor(rows, dtype=x.dtype).view(x.shape)
