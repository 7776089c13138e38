"""What a trained model is asked, as a stage: sums, facts, stories, and prompts to go on from."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable
from typing import Any, ClassVar

from tqdm.auto import tqdm

from minillm.base.files import atomic_write
from minillm.base.machine import peak_memory_bytes
from minillm.generate import Sampler, generate, generate_text
from minillm.hub import load_run
from minillm.runs.data import openings
from minillm.runs.folder import Record, RunFolder, Stage
from minillm.runs.pretrain import Training
from minillm.runs.recipes import RunConfig
from minillm.serving.fast import prepare
from minillm.tokenizer import Tokenizer
from minillm.transformer import Transformer
from minillm.world.documents import questions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results(Record):
    """Marks of the exams, samples as (what, prompt, continuation), and what decoding took."""

    key: ClassVar[str] = "results"
    scores: list[dict[str, Any]]
    samples: list[tuple[str, str, str]]
    decode_tokens_per_s: float
    peak_memory_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exam:
    """Questions of one kind. `label` chooses among them; `opening` is put behind each prompt, and counts as answered."""

    name: str
    kind: str
    lang: str
    split: str
    label: str = ""
    opening: str = ""


# A sum may be written with or without a scratchpad; the bracket asks for one. And it keeps the tokens whole: "=[" is one.
EXAMS = (
    Exam(name="story questions, English, held out", kind="stories", lang="en", split="heldout"),
    Exam(name="story questions, Chinese, held out", kind="stories", lang="zh", split="heldout"),
    Exam(name="facts asked about in training, English", kind="facts", lang="en", split="train"),
    Exam(name="facts asked about in training, Chinese", kind="facts", lang="zh", split="train"),
    Exam(name="facts only told in training, English", kind="facts", lang="en", split="heldout"),
    Exam(name="facts only told in training, Chinese", kind="facts", lang="zh", split="heldout"),
    Exam(
        name="addition, held out",
        kind="arithmetic",
        lang="und",
        split="heldout",
        label="scratchpad+",
        opening="[",
    ),
    Exam(
        name="subtraction, held out",
        kind="arithmetic",
        lang="und",
        split="heldout",
        label="scratchpad-",
        opening="[",
    ),
)


def score(
    model: Transformer, tokenizer: Tokenizer, config: RunConfig, *, progress: bool = False
) -> list[dict[str, Any]]:
    """Ask the own corpus's questions, greedily, and grade the answers exactly.

    Returns:
        One record per exam: name, n, correct, accuracy, and an example of a wrong answer.
    """
    records = []
    for exam in tqdm(EXAMS, disable=not progress, desc="score", leave=False):
        wanted = config.data.questions
        asked = questions(
            config.data.corpus, exam.kind, exam.lang, exam.split, 4 * wanted if exam.label else wanted
        )
        asked = [q for q in asked if q.meta["label"].startswith(exam.label)][:wanted]
        answers = [
            exam.opening + text for text in answer(model, tokenizer, [q.prompt + exam.opening for q in asked])
        ]
        right = [q.grade(text) for q, text in zip(asked, answers)]
        wrong = next(((q, text) for q, text, ok in zip(asked, answers, right) if not ok), None)
        records.append(
            {
                "name": exam.name,
                "n": len(asked),
                "correct": sum(right),
                "accuracy": sum(right) / max(1, len(asked)),
                "wrong": wrong and {"prompt": wrong[0].prompt, "expected": wrong[0].answer, "got": wrong[1]},
            }
        )
    return records


def answer(
    model: Transformer, tokenizer: Tokenizer, prompts: list[str], *, batch_size: int = 25
) -> list[str]:
    """Greedy continuations up to the end of the line, in the order of the prompts."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers, fast = [""] * len(prompts), prepare(model, 40)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        # A space after the colon belongs to the answer's first token: prompts end before it.
        rows = [prompts[i] for i in chosen]
        for i, text in zip(chosen, generate_text(fast, tokenizer, rows, max_new_tokens=40, stop=["\n"])):
            answers[i] = text
    return answers


def sample(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Iterable[tuple[str, str]],
    *,
    max_new_tokens: int = 150,
    seed: int = 0,
) -> list[tuple[str, str, str]]:
    """(what, prompt, continuation) for each (what, prompt)."""
    sampler, fast = Sampler(temperature=0.7, top_p=0.95), prepare(model, max_new_tokens)
    samples = []
    for what, prompt in prompts:
        limit = min(max_new_tokens, model.config.max_seq_len - len(tokenizer.encode(prompt)))
        text = generate_text(fast, tokenizer, prompt, max_new_tokens=limit, sampler=sampler, seed=seed)
        samples.append((what, prompt, str(text)))
    return samples


OWN_PROMPTS = (
    ("A story in English", "One day, Lily"),
    ("A story in Chinese", "有一天，小"),
    ("A sum", "347+586=["),
)


def _prompts(run: RunFolder) -> list[tuple[str, str]]:
    """Openings to continue: our own for the own corpus, the beginnings of held-out documents for other text."""
    if not run.config.data.sources:
        return list(OWN_PROMPTS)
    return [("The beginning of a held-out document, continued", text) for text in openings(run)]


def _score(run: RunFolder) -> str:
    model, tokenizer = load_run(run.path, run.device)
    model.eval()
    own = not run.config.data.sources
    scores = score(model, tokenizer, run.config, progress=run.launch.progress) if own else []
    samples = sample(model, tokenizer, _prompts(run))
    results = Results(
        scores=scores,
        samples=samples,
        decode_tokens_per_s=_decoding_speed(model, tokenizer, samples[0][1]),
        peak_memory_bytes=peak_memory_bytes(run.device),
    )
    run.remember(results)
    with atomic_write(run.path / "scores.json") as file:
        found = {"training": run.found(Training).to_json(), **results.to_json()}
        json.dump(found, file, indent=1, ensure_ascii=False)
    return f"{len(scores)} exams, {len(samples)} samples" if scores else f"{len(samples)} samples"


def _decoding_speed(model: Transformer, tokenizer: Tokenizer, prompt: str) -> float:
    """Tokens a second, greedily and alone."""
    start, ids = time.perf_counter(), tokenizer.encode(prompt)
    n = min(128, model.config.max_seq_len - len(ids))
    generate(prepare(model, n), [ids], max_new_tokens=n, sampler=Sampler.greedy())
    return n / (time.perf_counter() - start)


SCORE = Stage(name="score", work=_score)
