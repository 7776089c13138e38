"""Metrics of a run as lines of JSON, cut back to where the run resumes, and the mean loss and speed between two lines."""

import contextlib
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minillm.base.files import atomic_write
from minillm.train import StepInfo, model_flops_utilization


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order. What is not the line of a step is left out: a killed run may leave half a line."""
    records = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = json.loads(text)
            record["step"] + 0
            records.append(record)
    return records


@dataclass
class MetricsFile:
    """Lines of JSON, one per logged step, appended and flushed at once; kept in memory too."""

    path: Path | None
    lines: list[dict[str, Any]] = field(default_factory=list)

    def truncate(self, step: int) -> None:
        """Keep the lines up to `step`; a run that resumes there writes the rest again."""
        self.lines.clear()
        if self.path is None or not self.path.exists():
            return
        self.lines += [line for line in read_metrics(self.path) if line["step"] <= step]
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


@dataclass
class Interval:
    """The sums since the last line of metrics. A skipped step has no targets, and takes its time."""

    loss: float = 0.0
    targets: int = 0
    seconds: float = 0.0

    def add(self, info: StepInfo) -> None:
        self.loss += info.loss_nats * info.n_targets if info.n_targets else 0.0
        self.targets += info.n_targets
        self.seconds += info.seconds

    def line(self, info: StepInfo, flops_per_token: float, peak_flops: float) -> dict[str, Any]:
        """A line of metrics: the mean loss and speed. What is no number is None, as JSON has it."""
        speed = self.targets / max(self.seconds, 1e-9)
        return info.line() | {
            "loss_nats": self.loss / self.targets if self.targets else None,
            "grad_norm": info.grad_norm if math.isfinite(info.grad_norm) else None,
            "tokens_per_s": round(speed, 1),
            "mfu": round(model_flops_utilization(speed, flops_per_token, peak_flops), 4),
        }
