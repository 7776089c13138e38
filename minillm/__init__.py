"""minillm: a textbook that is a library. Each chapter of `chapters/` builds one module of this package; a folder is plumbing."""

from minillm.base.errors import MiniLLMError

__version__ = "0.1.0"
__all__ = ["MiniLLMError", "__version__"]
