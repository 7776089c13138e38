"""A textbook that is a library: build a large language model piece by piece, then train it.

Modules:

- `minillm.kernels.triton_flash`: FlashAttention as Triton kernels, forward and backward; chapter 12 writes a small one by hand and says what `tl.` does."""

from minillm.base.errors import MiniLLMError

__version__ = "0.1.0"
__all__ = ["MiniLLMError", "__version__"]
