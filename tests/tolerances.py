"""Every tolerance of the tests, in one place: (rtol, atol) for values compared in one dtype."""

import torch

TOLERANCE = {
    torch.float64: (1e-9, 1e-10),
    torch.float32: (1e-4, 1e-5),
    torch.bfloat16: (2e-2, 2e-2),
    torch.float16: (2e-3, 2e-3),
}
# Logits of a whole model against a reference implementation: largest absolute difference.
LOGITS = {torch.float64: 1e-9, torch.float32: 5e-5}
# A low-precision result may err at most this many times what the naive low-precision computation errs.
LOW_PRECISION_FACTOR = 2.0


def assert_close(actual: torch.Tensor, expected: torch.Tensor, *, scale: float = 1.0) -> None:
    """Equal shape, dtype and values, within `scale` times the tolerance of the dtype."""
    rtol, atol = TOLERANCE[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=rtol * scale, atol=atol * scale)


def assert_low_precision(
    actual: torch.Tensor, naive: torch.Tensor, exact: torch.Tensor, *, floor: float = 1e-3
) -> None:
    """`actual`'s largest error against the exact result is at most twice the naive low-precision one's."""
    error = (actual.double() - exact.double()).abs().max().item()
    allowed = LOW_PRECISION_FACTOR * (naive.double() - exact.double()).abs().max().item() + floor
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"
