"""Bytes to lines, bounded and unpacked on the way."""

import gzip
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from minillm.base.errors import MiniLLMError
from minillm.base.optional import optional


def byte_chunks(path: Path, size: int = 1 << 16) -> Iterator[bytes]:
    """The bytes of a file, decompressed if its name ends in .gz or .zst, in pieces of bounded size.

    Raises:
        EOFError, OSError, zlib.error: the file is damaged or ends too early.
    """
    if path.suffix == ".gz":
        with gzip.open(path) as file:
            while chunk := file.read(size):
                yield chunk
    elif path.suffix == ".zst":
        yield from _zstd_chunks(path)
    else:
        with open(path, "rb") as file:
            while chunk := file.read(size):
                yield chunk


def _zstd_chunks(path: Path) -> Iterator[bytes]:
    with optional("clean"):
        import zstandard
    decompressor, frame = zstandard.ZstdDecompressor(), None
    with open(path, "rb") as file:
        # Small bites: a kilobyte may decompress to megabytes. And stream_reader() takes a truncated file for a whole one.
        while bite := file.read(1024):
            while bite:
                frame = frame or decompressor.decompressobj()
                try:
                    data = frame.decompress(bite)
                except zstandard.ZstdError as error:
                    raise OSError(str(error)) from error
                if data:
                    yield data
                bite, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise EOFError("compressed file ended before the end-of-stream marker was reached")


class DamagedFile(MiniLLMError):
    """A stream of bytes broke off inside line `line`."""

    def __init__(self, line: int, why: str) -> None:
        super().__init__(f"line {line}: {why}")
        self.line = line


def bounded_lines(
    chunks: Iterable[bytes], limit: int, *, cut: bool = False
) -> Iterator[tuple[int, bytes | None]]:
    """(line number, line without its end) of a stream of bytes; memory stays within `limit` and one chunk.

    Args:
        limit: the longest line, in bytes, at least 4.
        cut: give a longer line in pieces, each under the same number and none torn inside a UTF-8 character; if False, give
            None in its place.

    Raises:
        DamagedFile: the stream broke off; it says in which line.
    """
    number, rest, too_long = 1, bytearray(), False
    try:
        for chunk in chunks:
            start = 0
            while True:
                newline = chunk.find(b"\n", start)
                if not too_long:
                    rest += chunk[start : newline if newline >= 0 else len(chunk)]
                while len(rest) > limit and cut:
                    end = next((i for i in range(limit, limit - 3, -1) if rest[i] & 0xC0 != 0x80), limit)
                    yield number, bytes(rest[:end])
                    del rest[:end]
                if len(rest) > limit:
                    rest, too_long = bytearray(), True
                if newline < 0:
                    break
                yield number, None if too_long else bytes(rest.removesuffix(b"\r"))
                number, rest, too_long, start = number + 1, bytearray(), False, newline + 1
    except (EOFError, OSError, zlib.error) as error:
        raise DamagedFile(number, str(error)) from error
    if rest or too_long:
        yield number, None if too_long else bytes(rest)
