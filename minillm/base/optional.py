"""Packages that only some parts need: imported where they are used, with an error that says how to get them."""

from typing import Any

from minillm.base.errors import CorpusError


def need(module: str, extra: str) -> Any:
    """Import an optional package, or say how to get it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise CorpusError(f"this source needs {module}: run pip install 'minillm[{extra}]'") from error
