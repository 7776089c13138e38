"""A file of results that is whole after every measurement, and that a run which was cut short can go on with."""

import json
import time
from pathlib import Path
from typing import Any

from minillm.base.files import atomic_write


def now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


class Store:
    """Results by name, in one JSON file.

    Args:
        path: the file.
        command: what makes it.
        machine: from `describe_machine`. Results of another machine are dropped: a page compares what can be compared.
        resume: keep what the last run has measured; otherwise every work is measured anew, and replaced one by one.
    """

    def __init__(self, path: Path, *, command: str, machine: dict[str, Any], resume: bool = False):
        self.path = path
        self.record: dict[str, Any] = {"results": {}}
        if path.exists():
            old = json.loads(path.read_text(encoding="utf-8"))
            if old.get("machine") == machine:
                self.record = old
        resume = resume and "started" in self.record
        self.record |= {"command": command, "machine": machine}
        self.record["started"] = self.record["started"] if resume else now()

    def has(self, name: str) -> bool:
        """Whether this run has measured it already."""
        return self.record["results"].get(name, {}).get("measured", "") >= self.record["started"]

    def put(self, name: str, result: dict[str, Any]) -> None:
        """Store one result, now."""
        self.record["results"][name] = result | {"measured": now()}
        self.save()

    def note(self, **facts: Any) -> None:
        """Add to what the file says about all results; dictionaries are merged."""
        for key, value in facts.items():
            old = self.record.get(key)
            self.record[key] = old | value if isinstance(old, dict) and isinstance(value, dict) else value

    def save(self) -> None:
        with atomic_write(self.path) as file:
            json.dump(self.record, file, indent=1, ensure_ascii=False)
