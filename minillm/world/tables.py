"""The tables of `data/`: what the world knows and no code needs to say."""

import tomllib
from importlib.resources import files
from typing import Any


def read_toml(name: str) -> dict[str, Any]:
    """A table of names and values, in the order of the file."""
    return tomllib.loads((files("minillm.world") / "data" / name).read_text(encoding="utf-8"))


def read_blocks(name: str, separator: str = "\n\n") -> list[str]:
    """The blocks of a text table; its comments, lines that begin with #, are left out."""
    text = (files("minillm.world") / "data" / name).read_text(encoding="utf-8")
    lines = [line for line in text.split("\n") if not line.startswith("#")]
    return "\n".join(lines).strip().split(separator)


def read_records(name: str) -> list[list[str]]:
    """The records of a text table whose lines after a record's first are indented: each as its lines, stripped."""
    records: list[list[str]] = []
    for line in read_blocks(name, "\n"):
        if line.startswith(" "):
            records[-1].append(line.strip())
        else:
            records.append([line.strip()])
    return records
