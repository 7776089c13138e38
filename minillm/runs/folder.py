"""The folder of a run: its config, its stages, and what they found. What is there is not done twice."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from minillm.base.errors import MiniLLMError
from minillm.base.files import atomic_write, clean_leftovers, first_difference, run_lock
from minillm.base.processes import Peers
from minillm.kernels.matmul import tune_allocator, tune_matmul
from minillm.runs.engines import EngineConfig
from minillm.runs.keeper import FREE_SETTINGS
from minillm.runs.recipes import RunConfig

log = logging.getLogger(__name__)

Say = Callable[[str], None]


def _quiet(line: str) -> None:
    log.info(line)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """How a run is worked on this time. It is no part of the run: the next time may be on another machine."""

    device: torch.device | str = "cpu"
    """Where to train."""
    dtype: str | None = None
    """Of the matrix products; by default bfloat16 where the device is fast at it, else float32."""
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    """Who trains; another engine may take the run up."""
    peers: Peers = dataclasses.field(default_factory=Peers)
    """This process among all that train together, from `process_group`. All must see the same folder."""
    say: Say = _quiet
    """Receives a line per stage, on the first process."""
    progress: bool = False
    """Show bars."""

    @property
    def leads(self) -> bool:
        """Whether this is the first process, which alone writes and speaks."""
        return self.peers.rank == 0


class Record:
    """Something that a stage has found out, for the stages after it: a frozen dataclass, in stages.json under its `key`."""

    key: ClassVar[str]

    def to_json(self) -> Any:
        """What is written."""
        return dataclasses.asdict(typing.cast(Any, self))

    @classmethod
    def from_json(cls, value: Any) -> Record:
        """The record again. What an older version did not write has its default."""
        return _revive(cls, value)


RecordT = TypeVar("RecordT", bound=Record)


def _revive(kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        known = [field.name for field in dataclasses.fields(kind) if field.name in value]
        return typing.cast(Any, kind)(**{name: _revive(hints[name], value[name]) for name in known})
    return tuple(value) if typing.get_origin(kind) is tuple else value


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageDone:
    """What one stage did, in one line, and how long it took."""

    name: str
    what: str
    seconds: float


def _nothing(run: RunFolder) -> None:
    """No check."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run that is done once, and kept."""

    name: str
    """One word; what it did stands under it in stages.json."""
    work: Callable[[RunFolder], str]
    """Does it, remembers its records, and returns what it did in one line."""
    makes: str = ""
    """A file or folder of the run; without it the stage is done again."""
    check: Callable[[RunFolder], None] = _nothing
    """Raises, before the first stage of all, if this one cannot end well."""
    together: bool = False
    """All processes take part. The other stages are the first one's, while the others wait."""


class RunFolder:
    """A run: its folder, its config, and what its stages have found. Of several processes the first one writes.

    Args:
        path: the folder.
        config: the whole run.
        launch: how it is worked on this time.
    """

    def __init__(self, path: str | Path, config: RunConfig, launch: Launch):
        self.path, self.config, self.launch = Path(path), config, launch
        self.device = torch.device(launch.device)
        self.done: list[StageDone] = []
        self._tell, self._stage = launch.say if launch.leads else _quiet, ""
        self._kept: dict[str, Any] = {}

    def say(self, line: str) -> None:
        """Tell the user. A terminal that is gone, or a closed pipe, is no reason to end a run."""
        try:
            self._tell(line)
        except OSError as error:
            self._tell = _quiet
            log.warning("nobody reads what this run says (%s); it goes on", error)

    def announce(self, line: str) -> None:
        """Tell the user something of the stage that is worked on."""
        self.say(f"{self._stage} {line}")

    def begin(self) -> None:
        """Write the resolved config, or refuse a folder that another config has begun.

        Raises:
            ValueError: another run is here; the message names the first setting that differs.
        """
        path = self.path / "config.json"
        mine = json.loads(json.dumps(dataclasses.asdict(self.config)))
        if path.exists():
            difference = first_difference(_binding(_read_json(path)), _binding(mine))
            if difference:
                name, old, new = difference
                raise ValueError(
                    f"{self.path} was begun with {name}={old!r}, now {name}={new!r}: "
                    "choose another --name, or --restart to begin anew"
                )
        with atomic_write(path) as file:
            json.dump(mine, file, indent=1, ensure_ascii=False)

    def reload(self) -> None:
        """Read what the stages have found so far."""
        path = self.path / "stages.json"
        self._kept = _read_json(path) if path.exists() else {}

    def remember(self, record: Record) -> None:
        """Keep a record for the stages after this one, and for a run that is taken up again."""
        self._write(record.key, record.to_json())

    def recall(self, kind: type[RecordT]) -> RecordT | None:
        """The record of a kind, if a stage has remembered one."""
        if kind.key not in self._kept:
            return None
        try:
            return typing.cast(RecordT, kind.from_json(self._kept[kind.key]))
        except (TypeError, ValueError) as error:
            path = self.path / "stages.json"
            raise MiniLLMError(
                f"{path}: {kind.key!r} is damaged ({error}); begin anew with --restart"
            ) from error

    def found(self, kind: type[RecordT]) -> RecordT:
        """The record of a kind, which must be there.

        Raises:
            MiniLLMError: it is not.
        """
        record = self.recall(kind)
        if record is None:
            raise MiniLLMError(
                f"{self.path / 'stages.json'}: no {kind.key!r} in it; begin anew with --restart"
            )
        return record

    def do(self, stage: Stage, number: int, of: int) -> None:
        """Do a stage unless it is done and what it makes is there; say one line about it, and remember that."""
        self._stage = f"[{number}/{of}] {stage.name:9}"
        if stage.name in self._kept and (self.path / stage.makes).exists():
            done = StageDone(name=stage.name, **self._kept[stage.name])
            self.announce(f"{done.what} (done before)")
        else:
            start = time.perf_counter()
            what = stage.work(self)
            done = StageDone(name=stage.name, what=what, seconds=time.perf_counter() - start)
            self._write(stage.name, {"what": what, "seconds": done.seconds})
            self.announce(f"{what} ({done.seconds:.1f} s)")
        self.done.append(done)

    def _write(self, key: str, value: Any) -> None:
        self._kept[key] = value
        if self.launch.leads:
            with atomic_write(self.path / "stages.json") as file:
                json.dump(self._kept, file, indent=1, ensure_ascii=False)


def do_stages(
    stages: Sequence[Stage],
    config: RunConfig,
    run_dir: str | Path,
    launch: Launch,
    *,
    last: str,
    restart: bool = False,
) -> RunFolder:
    """Do the stages of a run up to the one that is named `last`, in its folder.

    Args:
        stages: all that the run may have, in order.
        config: the whole run.
        run_dir: its folder.
        launch: how it is worked on this time.
        last: the name of a stage.
        restart: throw away what the folder holds.

    Raises:
        ValueError: the folder holds another run.
        RunLocked: another process works in it.
        PeerLost: another process of the run has ended.
    """
    run = RunFolder(run_dir, config, launch)
    with hold_run(run_dir, launch):
        if launch.leads:
            if restart:
                _empty(run.path)
            for place in (run.path, *(item for item in run.path.iterdir() if item.is_dir())):
                clean_leftovers(place)
            run.reload()
            run.begin()
            for stage in stages:
                stage.check(run)
        for number, stage in enumerate(stages, start=1):
            if stage.together:
                launch.peers.wait()  # for the first process, and what it has made
                if not launch.leads:
                    run.reload()
                tune_allocator()
                tune_matmul()
            if stage.together or launch.leads:
                run.do(stage, number, len(stages))
            if stage.name == last:
                break
    return run


@contextlib.contextmanager
def hold_run(run_dir: str | Path, launch: Launch) -> Iterator[None]:
    """Keep a run's folder to these processes: the first one locks it."""
    with run_lock(run_dir) if launch.leads else contextlib.nullcontext():
        yield


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MiniLLMError(f"{path}: damaged ({error}); begin anew with --restart") from error


def _binding(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what may change when its run goes on."""
    kept = {name: value for name, value in config.get("train", {}).items() if name not in FREE_SETTINGS}
    return {**config, "train": kept}


def _empty(folder: Path) -> None:
    """Throw away what a run's folder holds. Killed in the middle it leaves a folder in which nothing counts as done.

    The record of the stages goes first. The config goes last: as long as it is there, another run is refused.
    """
    order = {"stages.json": 0, "config.json": 2, ".lock": 3}
    for item in sorted(folder.iterdir(), key=lambda item: order.get(item.name, 1)):
        if item.name != ".lock":
            shutil.rmtree(item) if item.is_dir() else item.unlink()
