"""Metrics as lines of JSON, cut back to where a run resumes."""

import contextlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillm.base.files import atomic_write


@dataclass
class MetricsFile:
    """Lines of JSON, one per logged step, appended and flushed at once; kept in memory too."""

    path: Path | None
    lines: list[dict[str, Any]] = field(default_factory=list)

    def truncate(self, step: int) -> None:
        """Keep the lines up to `step`; a run that resumes there writes the rest again."""
        self.lines = []
        if self.path is None or not self.path.exists():
            return
        for text in self.path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a killed run may leave half a line
                line = json.loads(text)
                if line["step"] <= step:
                    self.lines.append(line)
        with atomic_write(self.path) as file:
            file.writelines(json.dumps(line) + "\n" for line in self.lines)

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self.path is not None:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def sync(self) -> None:
        """Wait until the lines are on the disk: a checkpoint must not outlive the metrics before it."""
        if self.path is not None and self.path.exists():
            with open(self.path, "a", encoding="utf-8") as file:
                os.fsync(file.fileno())
