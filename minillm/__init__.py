"""A textbook that is a library: build a large language model piece by piece, then train it.

Modules:

- `minillm.pipeline.steps`: The steps of `minillm clean`: the steps of chapters 02 to 06 are their own settings, and a recipe is a set of them."""

from minillm.base.errors import MiniLLMError

__version__ = "0.1.0"
__all__ = ["MiniLLMError", "__version__"]
