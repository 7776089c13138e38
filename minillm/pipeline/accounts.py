"""What every step of cleaning took and changed, samples of it, and whether that was right where the truth is known."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from minillm.base.files import text_key
from minillm.corpus import Document
from minillm.dedup import Decontaminate, ExactDuplicates, NearDuplicates
from minillm.detect import MachineText
from minillm.extract import Drop, ExtractText, RepairEncoding, token_f1
from minillm.filter import Language
from minillm.harm import RedactPII, Toxicity
from minillm.world.truth import has_defect, is_repeated, similarity, truth_of

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

    def book(self, step: Any, before: Document, outcome: Document | Drop, words: int, changed: bool) -> None:
        """Enter what a step made of a document.

        Args:
            step: the step.
            before: the document as it came.
            outcome: what became of it.
            words: of what came out; not used of a `Drop`.
            changed: whether the text that came out is another one.
        """
        label, is_drop = truth_of(before), isinstance(outcome, Drop)
        truth = self.truth.setdefault(label, [0, 0, 0])
        truth[0] += 1
        if isinstance(outcome, Drop):
            truth[1] += 1
            self.reasons[outcome.reason] = self.reasons.get(outcome.reason, 0) + 1
            self.show(outcome.reason, text_key(before.text), before.text, outcome.detail)
        else:
            self.n_out += 1
            self.tokens_out += words
            if changed:
                truth[2] += 1
                self.changed += 1
                self._compare(step, before, outcome.text)
        if should_find(step, before):
            self.expected[0] += 1
            self.expected[1] += is_drop or changed
        elif is_drop or changed:
            self.expected[2] += 1
            self.expected[3] += label == ""

    def _compare(self, step: Any, before: Document, after: str) -> None:
        """A changed text beside the truth: how near it is now, and whether the personal data in it are gone."""
        start = next((i for i, (a, b) in enumerate(zip(before.text, after)) if a != b), 0)
        start = max(0, start - 60)
        self.show("changed", text_key(before.text), before.text[start:], after[start:])
        if isinstance(clean := before.meta.get("clean"), str):
            # Whole numbers: their sum does not depend on the order of the chunks.
            scores = (1, *(round(1e6 * token_f1(text, clean)) for text in (before.text, after)))
            self.restored = [a + b for a, b in zip(self.restored, scores)]
        for start, end, kind, *_ in before.meta.get("spans", ()) if isinstance(step, RedactPII) else ():
            counts = self.spans.setdefault(str(kind), [0, 0])
            counts[0] += 1
            counts[1] += before.text[start:end] not in after

    @property
    def dropped(self) -> int:
        """How many documents ended here."""
        return self.n_in - self.n_out


def should_find(step: Any, document: Document) -> bool:
    """Whether a document of the own corpus has what a step looks for; no for steps that look for nothing that is known."""
    match step:
        case ExtractText():
            return has_defect(document, "html")
        case RepairEncoding():
            return has_defect(document, "encoding")
        case Language():
            return has_defect(document, "traditional") and "traditional" not in step.variants
        case MachineText():
            return has_defect(document, "machine")
        case RedactPII():
            return has_defect(document, "pii")
        case Toxicity():
            return has_defect(document, "toxic")
        case ExactDuplicates():
            return is_repeated(document)
        case NearDuplicates():
            return similarity(document) >= step.threshold
        case Decontaminate():
            return has_defect(document, "leak")
    return False
