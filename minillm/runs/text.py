"""The text of a run: every source is read once, and kept in the run's folder until there are token files."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import json
import shutil
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tqdm.auto import tqdm

from minillm.base.errors import CorpusError, MiniLLMError
from minillm.base.files import atomic_folder, atomic_write, need_disk
from minillm.corpus import Document
from minillm.readers.documents import read_documents
from minillm.readers.files import find_files
from minillm.runs.recipes import RunConfig
from minillm.world.stream import documents

SPLITS = ("heldout", "train")

HELD_OUT_SHARE = 0.02  # of the documents of real text, by a hash of each

COUNTS = "counts.json"  # of a part

ROOM = (
    64 << 20
)  # characters that are written between two looks at the disk; they take less than so many bytes

OWN_BYTES = 110  # that a document of the own corpus takes here, about


def passages(text: str, characters: int) -> Iterator[str]:
    """A text in passages of about so many characters, cut at the ends of lines where it can be; a whole book is one document."""
    start = 0
    while len(text) - start > characters:
        low, high = start + characters // 2, start + characters
        line, word = (text.rfind(end, low, high) + 1 for end in "\n ")
        cut = line or word or high
        yield text[start:cut]
        start = cut
    if start < len(text):
        yield text[start:]


def split_text(texts: Iterable[Document], characters: int, held_out: int) -> Iterator[tuple[str, Document]]:
    """Real text in passages, each with its side of the split: "heldout" or "train".

    Args:
        texts: documents.
        characters: of a passage, about.
        held_out: the most passages that are held out; a hash of each chooses them.
    """
    for read in texts:
        for text in passages(read.text, characters):
            digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            held = int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64 and held_out > 0
            held_out -= held
            yield SPLITS[not held], dataclasses.replace(read, text=text)


def read_split(config: RunConfig, names: Sequence[str], held_out: int) -> Iterator[tuple[str, Document]]:
    """The documents of some sources, or of some splits of the own corpus, each with its side of the split."""
    data = config.data
    if data.sources:
        yield from split_text(read_documents(list(names)), 4 * config.train.seq_len, held_out)
        return
    for split in names:
        n = data.documents if split == "train" else held_out
        yield from ((split, made) for made in documents(data.corpus, n_documents=n, split=split))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitCounts:
    """How much text there is on one side of the split; `languages` counts documents, `bytes` is UTF-8."""

    documents: int = 0
    characters: int = 0
    bytes: int = 0
    languages: dict[str, int] = dataclasses.field(default_factory=dict)

    def __add__(self, other: SplitCounts) -> SplitCounts:
        return SplitCounts(
            documents=self.documents + other.documents,
            characters=self.characters + other.characters,
            bytes=self.bytes + other.bytes,
            languages=dict(Counter(self.languages) + Counter(other.languages)),
        )


class TextStore:
    """A run's text on the disk, in parts that are whole or not there: one a source; of the own corpus one a split.

    A part is a folder with a compressed file of JSON lines for each side of the split. A run that was killed while it
    read goes on with the first part that is not there.

    Args:
        folder: where the parts are.
        config: the run, which says what there is to read.
    """

    def __init__(self, folder: Path, config: RunConfig):
        self.folder, self.config = folder, config
        self.names = config.data.sources or SPLITS
        self.parts: list[dict[str, SplitCounts]] = []

    def fill(self, *, progress: bool = False) -> TextStore:
        """Read the sources that are not stored yet; each of their documents is asked for once.

        Raises:
            CorpusError: a source does not exist, or cannot be read.
            NoSpace: the disk has no room for the text.
        """
        for name in self.names[len(self.parts) :]:
            path = self._path(len(self.parts))
            if not (path / COUNTS).is_file():
                need_disk(self.folder, self._expected_bytes(name), f"the documents of {name}")
                with atomic_folder(path) as partial:
                    self._write(partial, self._read(name), progress)
            self.parts.append(_read_counts(path / COUNTS))
        return self

    def counts(self, split: str) -> SplitCounts:
        """How much there is of a split."""
        return sum((part[split] for part in self.parts), SplitCounts())

    def texts(self, split: str) -> Iterator[str]:
        """The documents of a split, in the order in which they were read."""
        for number in range(len(self.parts)):
            path = self._path(number) / f"{split}.jsonl.gz"
            try:
                with gzip.open(path, "rt", encoding="utf-8") as file:
                    for line in file:
                        yield json.loads(line)["text"]
            except (OSError, EOFError, zlib.error, ValueError) as error:
                raise MiniLLMError(
                    f"{path}: damaged ({error}). Remove {self.folder}: the same command reads the sources again"
                ) from error

    def remove(self) -> None:
        """Give the room back. The text can be read again."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}"

    def _expected_bytes(self, name: str) -> int:
        """About what a part will take; for a stream 0, since only reading tells."""
        data = self.config.data
        if not data.sources:
            return OWN_BYTES * (data.documents if name == "train" else data.held_out)
        with contextlib.suppress(CorpusError):  # no file, and perhaps a name; reading says more
            sizes = ((path.stat().st_size, path.suffix) for path in find_files(name))
            return sum(size if suffix in (".gz", ".zst", ".parquet") else size // 2 for size, suffix in sizes)
        return 0

    def _read(self, name: str) -> Iterator[tuple[str, Document]]:
        left = self.config.data.held_out - self.counts("heldout").documents
        return read_split(self.config, [name], left)

    def _write(self, folder: Path, made: Iterator[tuple[str, Document]], progress: bool) -> None:
        counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        languages: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        written = 0
        with contextlib.ExitStack() as open_files:
            files = {
                split: open_files.enter_context(
                    gzip.open(folder / f"{split}.jsonl.gz", "wt", compresslevel=1, encoding="utf-8")
                )
                for split in SPLITS
            }
            for split, document in tqdm(made, disable=not progress, unit="doc", desc="corpus", leave=False):
                text = document.text
                if written // ROOM < (written := written + len(text)) // ROOM:
                    need_disk(self.folder, ROOM, f"{ROOM >> 20} MiB of text")
                files[split].write(json.dumps({"text": text}) + "\n")
                size = len(text.encode("utf-8", "surrogatepass"))
                counts[split].update(documents=1, characters=len(text), bytes=size)
                languages[split][document.lang] += 1
        with atomic_write(folder / COUNTS) as file:
            json.dump({split: {**counts[split], "languages": languages[split]} for split in SPLITS}, file)


def _read_counts(path: Path) -> dict[str, SplitCounts]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {split: SplitCounts(**found[split]) for split in SPLITS}
    except (ValueError, TypeError, KeyError) as error:
        raise MiniLLMError(
            f"{path}: damaged ({error}). Remove {path.parent}: the same command reads its source again"
        ) from error
