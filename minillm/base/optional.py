"""Packages that only some parts need: imported where they are used, with an error that says how to get them."""

from collections.abc import Iterator
from contextlib import contextmanager

from minillm.base.errors import MissingPackage


@contextmanager
def optional(extra: str) -> Iterator[None]:
    """Around the import of packages that the extra `extra` brings: a missing one is named, with the way to get it.

    The import stays a statement, which a reader finds and tools see:

        with optional("clean"):
            import trafilatura

    Raises:
        MissingPackage: in place of the ImportError.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or str(error)).partition(".")[0]
        broken = "" if isinstance(error, ModuleNotFoundError) else f" (it is there, but: {error})"
        raise MissingPackage(f"this needs {package}: run pip install 'minillm[{extra}]'{broken}") from error
