"""The folder of a run and its stages: what is there is not done twice."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from minillm.base.errors import MiniLLMError
from minillm.base.files import atomic_write, first_difference
from minillm.base.processes import World
from minillm.runs.engines import EngineConfig
from minillm.runs.keeper import FREE_SETTINGS
from minillm.runs.recipes import RunConfig

log = logging.getLogger(__name__)

Say = Callable[[str], None]


@dataclasses.dataclass
class Stage:
    """What one stage did, in one line, and how long it took."""

    name: str
    what: str = ""
    seconds: float = 0.0


def _quiet(line: str) -> None:
    log.info(line)


class _Run:
    """A run folder: its config, the stages that are done, and what they said. Of several processes the first one writes."""

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        say: Say = _quiet,
        progress: bool = False,
        engine: EngineConfig | None = None,
        world: World | None = None,
    ):
        self.engine, self.world = engine or EngineConfig(), world or World()
        self.leads = self.world.rank == 0
        self.folder, self.config = folder, config
        self.tell, self.progress = (say, progress) if self.leads else (_quiet, False)
        self.stages: list[Stage] = []
        self.record = folder / "stages.json"
        self.done: dict[str, Any] = {}
        if self.record.exists():
            self.done = _read_json(self.record)

    def say(self, line: str) -> None:
        """Tell the user. A terminal that is gone, or a closed pipe, is no reason to end a run."""
        try:
            self.tell(line)
        except OSError as error:
            self.tell = _quiet
            log.warning("nobody reads what this run says (%s); it goes on", error)

    def keep_config(self) -> None:
        """Write the resolved config, or refuse a folder that another config has begun."""
        path = self.folder / "config.json"
        mine = json.loads(json.dumps(dataclasses.asdict(self.config)))
        if path.exists():
            theirs = _read_json(path)
            difference = first_difference(_binding(theirs), _binding(mine))
            if difference:
                name, old, new = difference
                raise ValueError(
                    f"{self.folder} was begun with {name}={old!r}, now {name}={new!r}: "
                    "choose another --name, or --restart to begin anew"
                )
        with atomic_write(path) as file:
            json.dump(mine, file, indent=1, ensure_ascii=False)

    def remember(self, name: str, value: Any) -> None:
        """Write down what a run that is taken up again must know."""
        self.done[name] = value
        if not self.leads:
            return
        with atomic_write(self.record) as file:
            json.dump(self.done, file, indent=1, ensure_ascii=False)

    def stage(self, number: int, name: str, work: Callable[[], str], makes: str = "") -> None:
        """Do a stage unless it is done and what it makes is there, say one line about it, and remember both."""
        if name in self.done and (self.folder / makes).exists():
            stage = Stage(name, self.done[name]["what"], self.done[name]["seconds"])
            self.say(f"[{number}/5] {name:9} {stage.what} (done before)")
        else:
            start = time.perf_counter()
            what = work()
            stage = Stage(name, what, time.perf_counter() - start)
            self.remember(name, {"what": what, "seconds": stage.seconds})
            self.say(f"[{number}/5] {name:9} {what} ({stage.seconds:.1f} s)")
        self.stages.append(stage)


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
