"""What every step of cleaning took, and samples of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from minillm.base.files import text_key
from minillm.corpus import Document
from minillm.extract import token_f1

SAMPLES, SAMPLE_CHARS = 3, 600  # shown in the report: so many of each reason, and so much of each


@dataclass
class Account:
    """What one step did to the documents that reached it. Accounts of chunks are added up."""

    name: str
    n_in: int = 0
    n_out: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    changed: int = 0
    seconds: float = 0.0
    reasons: dict[str, int] = field(default_factory=dict)
    truth: dict[str, list[int]] = field(default_factory=dict)  # label: reached, dropped, changed
    expected: list[int] = field(default_factory=lambda: [0, 0, 0, 0])  # reached, caught; wrong, of them sound
    restored: list[int] = field(
        default_factory=lambda: [0, 0, 0]
    )  # texts; sums of F1 before and after, in millionths
    spans: dict[str, list[int]] = field(default_factory=dict)  # kind of personal data: places, gone
    samples: dict[str, list[list[Any]]] = field(
        default_factory=dict
    )  # reason or "changed": [key, before, after]

    def add(self, other: Account) -> None:
        """Add the account of another chunk."""
        for name in ("n_in", "n_out", "tokens_in", "tokens_out", "changed", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.expected = [a + b for a, b in zip(self.expected, other.expected)]
        self.restored = [a + b for a, b in zip(self.restored, other.restored)]
        for reason, n in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + n
        for mine, theirs in ((self.truth, other.truth), (self.spans, other.spans)):
            for label, counts in theirs.items():
                mine[label] = [a + b for a, b in zip(mine.get(label, [0] * len(counts)), counts)]
        for reason, samples in other.samples.items():
            for sample in samples:
                self.show(reason, *sample)

    def show(self, reason: str, key: int, before: str, after: str) -> None:
        """Keep a sample if its key is among the smallest: a fair choice that does not depend on the order of work."""
        kept = self.samples.setdefault(reason, [])
        if len(kept) < SAMPLES or key < kept[-1][0]:
            kept.append([key, before[:SAMPLE_CHARS], after[:SAMPLE_CHARS]])
            kept.sort()
            del kept[SAMPLES:]

    @property
    def dropped(self) -> int:
        """How many documents ended here."""
        return self.n_in - self.n_out


def _compare(account: Account, before: Document, after: Document, kind: str) -> None:
    """A changed text beside the truth: how near it is now, and whether the personal data in it are gone."""
    start = next((i for i, (a, b) in enumerate(zip(before.text, after.text)) if a != b), 0)
    start = max(0, start - 60)
    account.show("changed", text_key(before.text), before.text[start:], after.text[start:])
    if isinstance(clean := before.meta.get("clean"), str):
        # Whole numbers: their sum does not depend on the order of the chunks.
        scores = (1, *(round(1e6 * token_f1(text, clean)) for text in (before.text, after.text)))
        account.restored = [a + b for a, b in zip(account.restored, scores)]
    for span in before.meta.get("spans", ()) if kind == "RedactPII" else ():
        counts = account.spans.setdefault(str(span[2]), [0, 0])
        value = before.text[span[0] : span[1]]
        counts[0] += 1
        counts[1] += value not in after.text
