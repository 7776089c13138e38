"""Files that are either whole or not there: atomic writes, locks, room on the disk, checksums."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import re
import shutil
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from minillm.base.errors import NoSpace, RunLocked

log = logging.getLogger(__name__)


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """An empty file to be written by path, which takes its name only when what was written is on disk.

    A crash, a full disk or an exception leaves the old file, or none, and no partial one. The folder is created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    try:
        yield Path(partial)
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(partial, 0o666 & ~_umask())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise


@contextlib.contextmanager
def atomic_write(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file for writing that appears under its name only when it is complete and on disk; see `atomic_path`.

    Args:
        path: the file; its folder is created.
        mode: "w" for UTF-8 text with \\n line ends, "wb" for bytes.
    """
    options: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    with atomic_path(path) as partial, open(partial, mode, **options) as file:
        yield file


@contextlib.contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A folder to fill that appears under its name only when it is complete and on disk. An existing folder is replaced."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    try:
        yield partial
        os.chmod(partial, 0o777 & ~_umask())
        for folder, _, files in os.walk(partial):
            for name in files:
                with open(os.path.join(folder, name), "rb") as file:
                    os.fsync(file.fileno())
            _sync_folder(folder)
        if path.exists():
            _exchange(partial, path)
        else:
            os.replace(partial, path)
        _sync_folder(path.parent)
    finally:  # the partial folder, or the one that was replaced
        shutil.rmtree(partial, ignore_errors=True)


def _exchange(new: Path, path: Path) -> None:
    """Swap two names. On Linux and macOS a kill leaves the one or the other; elsewhere `clean_leftovers` mends it."""
    swap = _swap_call()
    if swap is not None and swap(os.fsencode(new), os.fsencode(path)) == 0:
        return
    old = path.with_name(f".{path.name}.old.tmp")
    os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


def _swap_call() -> Callable[[bytes, bytes], int] | None:
    """The system's call that swaps two names in one step, if there is one; it returns 0 where it could."""
    try:
        libc = ctypes.CDLL(None)
    except (OSError, TypeError):  # Windows
        return None
    if hasattr(libc, "renameat2"):
        here, exchange = -100, 2  # AT_FDCWD in fcntl.h, RENAME_EXCHANGE in linux/fs.h
        return lambda a, b: libc.renameat2(here, a, here, b, exchange)
    if hasattr(libc, "renamex_np"):
        return lambda a, b: libc.renamex_np(a, b, 2)  # RENAME_SWAP in sys/stdio.h
    return None


_LEFTOVER = re.compile(r"\.(?P<name>.+)\.(old|[a-z0-9_]{8})\.tmp")


def clean_leftovers(folder: str | Path) -> list[str]:
    """Remove what writes that a kill cut short have left in a folder. Only the holder of the folder's lock may call it.

    Returns:
        The names that are gone.
    """
    gone = []
    for item in sorted(Path(folder).glob(".*.tmp")):
        found = _LEFTOVER.fullmatch(item.name)
        if found is None:
            continue
        if found[2] == "old" and not item.with_name(found["name"]).exists():
            os.replace(item, item.with_name(found["name"]))  # killed between the two renames of `_exchange`
        elif item.is_dir():
            shutil.rmtree(item)
        else:
            item.unlink()
        gone.append(item.name)
    if gone:
        log.info("%s: removed what a killed process left: %s", folder, ", ".join(gone))
    return gone


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: str | Path) -> None:
    if os.name == "posix":  # a rename is durable once its folder is
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def sha256_file(path: str | Path, *, from_disk: bool = False) -> str:
    """The SHA-256 of a file, as 64 hex digits; on request of what is on the disk, not of the copy in memory (Linux)."""
    with open(path, "rb") as file:
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return hashlib.file_digest(file, "sha256").hexdigest()


def first_difference(old: Any, new: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first setting in which two nested configurations differ: (dotted name, old value, new value)."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = first_difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    return None if old == new else (name, old, new)


def require_same(begun: Any, now: Any, what: str, way_out: str) -> None:
    """Refuse to go on with what was begun under other settings.

    Args:
        begun: the nested settings under which it was begun; `now` are those of today.
        what: what was begun, for the message: the folder.
        way_out: what to do about it: "choose another --out".

    Raises:
        ValueError: they differ; the message names the first difference.
    """
    if difference := first_difference(begun, now):
        name, old, new = difference
        raise ValueError(f"{what} was begun with {name}={old!r}, now {name}={new!r}: {way_out}")


def text_key(text: str) -> int:
    """32 bits for a text, the same in every process; half surrogates are let through."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


_held: dict[Path, int] = {}  # folders that this process has locked, and the thread that did


@contextlib.contextmanager
def run_lock(folder: str | Path) -> Iterator[None]:
    """Hold a run folder for this process; released when the process ends, however it ends.

    The thread that holds it may take it again. A child process does not inherit it, so that a worker which outlives a
    killed run does not keep the next one out.

    Raises:
        RunLocked: another process or thread holds it.
        OSError: the folder cannot be written.
    """
    path = Path(folder).resolve() / ".lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    thread = threading.get_ident()
    if _held.get(path) == thread:
        yield
        return
    if path in _held:  # opening the file again, and closing it, would release it
        raise RunLocked(f"{folder}: another thread of this process writes here; choose another folder")
    with open(path, "a+", encoding="utf-8") as file:
        try:
            import fcntl
        except ImportError:  # Windows has no such lock: two runs in one folder are then the user's care
            yield
            return
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise RunLocked(
                f"{folder}: another run ({file.read().strip() or 'unknown'}) writes here; wait for it or choose another --name"
            ) from None
        except OSError as error:  # some network file systems have no locks
            log.warning(
                "%s: this file system has no locks (%s); make sure that no other run writes here",
                folder,
                error,
            )
        _held[path] = thread
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
            file.flush()
            yield
        finally:
            del _held[path]


def need_disk(folder: str | Path, n_bytes: int, purpose: str) -> None:
    """Make sure that a folder's disk has room for so much more, before the work that will write it.

    Args:
        folder: where it will be written; need not be there yet.
        n_bytes: how much will be added to what is there.
        purpose: of what, for the message: "3 checkpoints of 1.5 GB".

    Raises:
        NoSpace: it does not fit.
    """
    there = Path(folder).resolve()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if n_bytes > free:
        raise NoSpace(
            f"{folder}: {purpose} need {n_bytes / 1e9:.2f} GB more and {free / 1e9:.2f} GB are free: make room, keep fewer "
            "checkpoints (--train.keep), or write elsewhere (--runs)"
        )


def folder_bytes(folder: str | Path) -> int:
    """The size of all files in a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
