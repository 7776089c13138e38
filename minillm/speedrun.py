"""From raw text to a model that talks: corpus, tokenizer, shards, pretraining, scores, report. Each stage is kept and not done twice."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import json
import logging
import math
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from minillm.batches import Loader, TokenShards, write_shards
from minillm.checkpoint import (
    CheckpointError,
    MiniLLMError,
    atomic_folder,
    atomic_write,
    clean_leftovers,
    first_difference,
    load_model,
    save_model,
)
from minillm.corpus import Document, generate, questions, read_documents
from minillm.generate import Sampler, generate_text
from minillm.generate import generate as generate_tokens
from minillm.recipes import RunConfig
from minillm.report import read_metrics, write_report
from minillm.runtime import (
    World,
    describe_machine,
    fast_bfloat16,
    need_disk,
    peak_memory_bytes,
    run_lock,
    seed_everything,
    tune_allocator,
    tune_matmul,
)
from minillm.tokenizer import Tokenizer, load_tokenizer, train_bpe, train_sentencepiece
from minillm.train import FREE_SETTINGS, TrainResult, bits_per_byte, evaluate_loss, train
from minillm.transformer import Transformer, count_parameters
from minillm.zero import EngineConfig, make_engine

__all__ = ["Stage", "load_run", "pretrain", "sample", "score", "speedrun"]

log = logging.getLogger(__name__)
Say = Callable[[str], None]
HELD_OUT_SHARE = 0.02  # of the documents of real text, by a hash of each
ENCODE_BATCH = 2000


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


def documents(config: RunConfig, split: str) -> Iterator[Document]:
    """The documents that a run trains on (split "train") or measures with ("heldout")."""
    data = config.data
    if not data.sources:
        yield from generate(
            data.corpus, n_documents=data.documents if split == "train" else data.held_out, split=split
        )
        return
    held_out, characters = 0, 4 * config.train.seq_len
    read = read_documents(list(data.sources), on_error="skip")
    for document in (
        dataclasses.replace(d, text=text) for d in read for text in passages(d.text, characters)
    ):
        digest = hashlib.blake2b(document.text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        if int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64 and held_out < data.held_out:
            held_out += 1
            if split == "heldout":
                yield document
        elif split == "train":
            yield document


def passages(text: str, characters: int) -> Iterator[str]:
    """A text in passages of about so many characters, cut at the ends of lines where it can be; a whole book is one document."""
    while len(text) > characters:
        line, word = (text.rfind(end, characters // 2, characters) + 1 for end in "\n ")
        cut = line or word or characters
        yield text[:cut]
        text = text[cut:]
    if text:
        yield text


def _corpus(run: _Run) -> str:
    """Look through the data once: it must be readable and hold enough; count what there is."""
    counts = {}
    languages: Counter[str] = Counter()
    for split in ("heldout", "train"):
        count = characters = 0
        bar = tqdm(
            documents(run.config, split),
            disable=not run.progress,
            unit="doc",
            desc=f"corpus {split}",
            leave=False,
        )
        for document in bar:
            count, characters = count + 1, characters + len(document.text)
            languages[document.lang] += 1
        counts[split] = {"documents": count, "characters": characters}
    if counts["train"]["documents"] < 2 or counts["heldout"]["documents"] < 1:
        raise MiniLLMError(
            f"{', '.join(run.config.data.sources) or 'the corpus'}: {counts['train']['documents']} documents to train on, "
            f"{counts['heldout']['documents']} held out by a hash of each: a run needs at least 2 and 1; give more text"
        )
    run.done["counts"] = counts
    mix = ", ".join(f"{lang} {100 * n / languages.total():.0f} %" for lang, n in languages.most_common(4))
    return f"{counts['train']['documents']:,} documents, {counts['train']['characters'] / 1e6:.1f}M characters ({mix})"


def _limited(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return


def _tokenizer(run: _Run) -> str:
    settings = run.config.tokenizer
    texts = _limited((d.text for d in documents(run.config, "train")), settings.train_characters)
    if settings.kind == "bpe":
        tokenizer = train_bpe(texts, settings.vocab_size)
    else:
        tokenizer = train_sentencepiece(texts, settings.vocab_size)
    tokenizer.save(run.folder / "tokenizer.json")
    return f"{tokenizer.vocab_size:,} tokens ({settings.kind})"


def _shards(run: _Run) -> str:
    tokenizer = load_tokenizer(run.folder / "tokenizer.json")
    counts = {}
    for split in ("heldout", "train"):
        texts, n_bytes = (d.text for d in documents(run.config, split)), 0

        def encoded(texts: Iterator[str] = texts, split: str = split) -> Iterator[list[int]]:
            nonlocal n_bytes
            total, first = run.done["counts"][split], not n_bytes
            with tqdm(
                total=total["documents"],
                disable=not run.progress,
                unit="doc",
                desc=f"encode {split}",
                leave=False,
            ) as bar:
                while batch := list(islice(texts, ENCODE_BATCH)):
                    n_bytes += sum(len(text.encode("utf-8", "surrogatepass")) for text in batch)
                    ids = tokenizer.encode_batch(batch)
                    if first:  # the whole will be about as dense as its beginning
                        tokens = sum(map(len, ids)) * total["characters"] / max(1, sum(map(len, batch)))
                        width = 2 if tokenizer.vocab_size <= 1 << 16 else 4
                        need_disk(run.folder, int(width * tokens), f"about {tokens / 1e6:,.0f}M tokens")
                        first = False
                    yield from ids
                    bar.update(len(batch))

        index = write_shards(
            encoded(), run.folder / "shards" / split, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id
        )
        counts[split] = {"tokens": index.n_tokens, "documents": index.n_documents, "bytes": n_bytes}
    run.done["shards_counts"] = counts
    tokens = counts["train"]["tokens"]
    ratio = tokens / run.done["counts"]["train"]["characters"]
    return f"{tokens / 1e6:.2f}M training tokens, {ratio:.2f} per character"


def _estimate(model: Transformer, config: RunConfig, run: _Run) -> float:
    """Seconds that a training step takes, from some steps of a model that is thrown away; the same on all processes."""
    trial = dataclasses.replace(
        config.train, steps=12, compile="off", log_every=1, eval_every=0, save_every=0
    )
    engine = make_engine(model, trial, run.engine)
    metrics = train(model, _loader(run, config), trial, engine=engine, progress=False).metrics
    # Process 0 alone has the metrics of all.
    speed = statistics.median(line["tokens_per_s"] for line in metrics[2:]) if run.leads else 0.0
    return config.train.batch_size * config.train.seq_len / engine.total(speed)


def _steps_that_fit(config: RunConfig, step_seconds: float) -> int:
    """All steps of the recipe, or as many as a slower machine can make in `config.minutes`, in whole hundreds."""
    if not config.minutes:
        return config.train.steps
    fit = int(60 * config.minutes / step_seconds)
    return min(config.train.steps, max(100, fit - fit % 100))


def _shards_of(run: _Run, split: str) -> TokenShards:
    return TokenShards(run.folder / "shards" / split)


def _verify_shards(run: _Run) -> None:
    """Read every token file once: a flipped bit would be trained on, and nobody would ever know."""
    for split in ("heldout", "train"):
        try:
            TokenShards(run.folder / "shards" / split, verify=True)
        except MiniLLMError as error:
            raise MiniLLMError(
                f"{error}. Remove {run.folder / 'shards'}: the same command writes it again, and goes on"
            ) from error


def _loader(run: _Run, config: RunConfig) -> Loader:
    return Loader(
        _shards_of(run, "train"),
        batch_size=config.train.batch_size,
        seq_len=config.train.seq_len,
        seed=config.train.seed,
        rank=run.world.rank,
        world_size=run.world.world_size,
    )


def _held_out(run: _Run, config: RunConfig) -> Loader:
    return Loader(
        _shards_of(run, "heldout"),
        batch_size=16,
        seq_len=config.train.seq_len,
        packing="rows",
        rank=run.world.rank,
        world_size=run.world.world_size,
    )


def _fresh_model(run: _Run, config: RunConfig, device: torch.device) -> Transformer:
    """The model as training begins with it."""
    seed_everything(config.train.seed)
    # Little text may hold fewer tokens than were asked for.
    vocab_size = load_tokenizer(run.folder / "tokenizer.json").vocab_size
    return Transformer(dataclasses.replace(config.model, vocab_size=vocab_size)).to(device)


def _pretrain(run: _Run, device: torch.device, dtype: str) -> str:
    config = dataclasses.replace(run.config, train=dataclasses.replace(run.config.train, dtype=dtype))
    if run.leads:
        _verify_shards(run)
    run.world.wait()
    if "steps" not in run.done:
        model = _fresh_model(run, config, device)
        n_parameters, seconds = count_parameters(model.config).total, _estimate(model, config, run)
        del model
        gc.collect()  # an engine and its model know each other: their memory goes only now
        run.remember("steps", _steps_that_fit(config, seconds))
        where = f"{run.world.world_size} x {device.type}" if run.world.world_size > 1 else device.type
        run.say(
            f"[4/5] pretrain  {n_parameters / 1e6:.2f}M parameters, {run.done['steps']:,} steps on {where} in "
            f"{dtype}: about {_duration(run.done['steps'] * seconds)}, checkpoints of {12 * n_parameters / 1e6:,.0f} MB"
        )
        if run.done["steps"] < config.train.steps:
            run.say(
                f"      of {config.train.steps:,}: as many as fit in {config.minutes:g} minutes here; --minutes 0 makes all"
            )
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=run.done["steps"]))
    model = _fresh_model(run, config, device)
    n_parameters = count_parameters(model.config).total
    engine, held_out = make_engine(model, config.train, run.engine), _held_out(run, config)

    def evaluate(model: Transformer) -> dict[str, float]:
        shared = engine if engine.world_size > 1 else None
        loss = evaluate_loss(model, held_out.epoch_batches(), dtype=dtype, engine=shared)
        return {"held_out_nats": loss}

    result: TrainResult = train(
        model,
        _loader(run, config),
        config.train,
        run_dir=run.folder,
        eval_fn=evaluate,
        progress=run.progress,
        engine=engine,
    )
    weights = engine.tensors()["model"]  # all processes: an engine may have to collect them
    held = next((line["held_out_nats"] for line in reversed(result.metrics) if "held_out_nats" in line), None)
    if engine.total(float(run.leads and held is None)):  # somebody has removed the metrics
        with engine.evaluation():
            held = evaluate(model)["held_out_nats"]
    if not run.leads:
        return ""
    assert held is not None
    with atomic_folder(run.folder / "model") as folder:
        save_model(folder, model, weights)
        shutil.copyfile(run.folder / "tokenizer.json", folder / "tokenizer.json")
    counts = run.done["shards_counts"]["heldout"]
    run.done["training"] = {
        "held_out_nats": held,
        "bits_per_byte": bits_per_byte(held, counts["tokens"], counts["bytes"]),
        "tokens": result.tokens,
        "tokens_per_s": result.tokens / max(result.seconds, 1e-9),
        "seconds": result.seconds,
        "mfu": result.metrics[-1]["mfu"],
        "parameters": n_parameters,
        "dtype": dtype,
    }
    return f"held-out loss {held:.3f} nats a token, {run.done['training']['tokens_per_s']:,.0f} tokens/s"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def pretrain(
    config: RunConfig,
    run_dir: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: str | None = None,
    restart: bool = False,
    say: Say = _quiet,
    progress: bool = False,
    engine: EngineConfig | None = None,
    world: World | None = None,
) -> _Run:
    """Corpus, tokenizer, shards, training: everything up to a model in `run_dir/model`.

    Stages that are done are not done again; training goes on from its newest undamaged checkpoint.

    Args:
        config: the whole run.
        run_dir: its folder.
        device: where to train.
        dtype: of the matrix products; by default bfloat16 where the device is fast at it, else float32.
        restart: throw away what the folder holds.
        say: receives a line per stage.
        progress: show bars.
        engine: who trains. It is no part of the run: another engine may take it up.
        world: this process among all that train together, from `runtime.process_group`. The first one does the stages before
            training, and the others wait. All must see the same `run_dir`.

    Raises:
        ValueError: the folder holds another run.
        RunLocked: another process works in it.
        PeerLost: another process of the run has ended.
        train.Interrupted: asked to stop; everything is saved.
    """
    folder, device = Path(run_dir), torch.device(device)
    who: dict[str, Any] = {"engine": engine, "world": world}
    with contextlib.ExitStack() as held:
        if world is None or world.rank == 0:
            held.enter_context(run_lock(folder))
            if restart:
                _empty(folder)
            for place in (folder, folder / "shards"):
                clean_leftovers(place)
            run = _Run(folder, config, say, progress, **who)
            run.keep_config()
            _need_checkpoints(run)
            run.stage(1, "corpus", lambda: _corpus(run))
            run.stage(2, "tokenizer", lambda: _tokenizer(run), "tokenizer.json")
            run.stage(3, "shards", lambda: _shards(run), "shards")
            run.world.wait()
        else:
            world.wait()
            run = _Run(folder, config, **who)
        tune_allocator()
        tune_matmul()
        if dtype is None:
            dtype = config.train.dtype if config.train.dtype != "float32" else _fast_dtype(device)
        run.stage(4, "pretrain", lambda: _pretrain(run, device, dtype), "model")
    return run


def _empty(folder: Path) -> None:
    """Throw away what a run's folder holds. Killed in the middle it leaves a folder in which nothing counts as done.

    The record of the stages goes first. The config goes last: as long as it is there, another run is refused.
    """
    order = {"stages.json": 0, "config.json": 2, ".lock": 3}
    for item in sorted(folder.iterdir(), key=lambda item: order.get(item.name, 1)):
        if item.name != ".lock":
            shutil.rmtree(item) if item.is_dir() else item.unlink()


def _need_checkpoints(run: _Run) -> None:
    """Refuse a run whose checkpoints will not fit on the disk: before its first stage, not in its fourth."""
    if "pretrain" in run.done or (run.folder / "checkpoints").exists():
        return  # `train` counts what is there
    one, number = 12 * count_parameters(run.config.model).total, run.config.train.keep + 1
    need_disk(run.folder, number * one, f"{number} checkpoints of {one / 1e9:.2f} GB")


def _fast_dtype(device: torch.device) -> str:
    return "bfloat16" if fast_bfloat16(device) else "float32"


def load_run(folder: str | Path, device: torch.device | str = "cpu") -> tuple[Transformer, Tokenizer]:
    """The model and tokenizer of a run folder, or of its `model/` folder."""
    folder = Path(folder)
    if (folder / "model" / "config.json").exists():
        folder = folder / "model"
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder}: no trained model here (no config.json); train one with `minillm speedrun`"
        )
    return load_model(folder, device=device), load_tokenizer(folder / "tokenizer.json")


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
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        # A space after the colon belongs to the answer's first token: prompts end before it.
        rows = [prompts[i] for i in chosen]
        for i, text in zip(chosen, generate_text(model, tokenizer, rows, max_new_tokens=40, stop=["\n"])):
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
    sampler = Sampler(temperature=0.7, top_p=0.95)
    samples = []
    for what, prompt in prompts:
        limit = min(max_new_tokens, model.config.max_seq_len - len(tokenizer.encode(prompt)))
        text = generate_text(model, tokenizer, prompt, max_new_tokens=limit, sampler=sampler, seed=seed)
        samples.append((what, prompt, str(text)))
    return samples


OWN_PROMPTS = (
    ("A story in English", "One day, Lily"),
    ("A story in Chinese", "有一天，小"),
    ("A sum", "347+586=["),
)


def _prompts(run: _Run) -> list[tuple[str, str]]:
    """Openings to continue: our own for the own corpus, the beginnings of held-out documents for other text."""
    if not run.config.data.sources:
        return list(OWN_PROMPTS)
    beginnings = (d.text[:40] for d in documents(run.config, "heldout"))
    return [("The beginning of a held-out document, continued", text) for text in islice(beginnings, 3)]


def _finish(run: _Run, device: torch.device) -> str:
    model, tokenizer = load_run(run.folder, device)
    model.eval()
    scores = [] if run.config.data.sources else score(model, tokenizer, run.config, progress=run.progress)
    samples = sample(model, tokenizer, _prompts(run))
    start, n = time.perf_counter(), 128
    prompt = tokenizer.encode(samples[0][1])
    n = min(n, model.config.max_seq_len - len(prompt))
    generate_tokens(model, [prompt], max_new_tokens=n, sampler=Sampler.greedy())
    run.done["results"] = {
        "scores": scores,
        "samples": samples,
        "decode_tokens_per_s": n / (time.perf_counter() - start),
        "peak_memory_bytes": peak_memory_bytes(device),
    }
    with atomic_write(run.folder / "scores.json") as file:
        json.dump(
            {"training": run.done["training"], **run.done["results"]}, file, indent=1, ensure_ascii=False
        )
    return f"{len(scores)} exams, {len(samples)} samples" if scores else f"{len(samples)} samples"


def _report(run: _Run, device: torch.device) -> Path:
    training, results = run.done["training"], run.done["results"]
    path = run.folder / "report.html"
    total = sum(stage.seconds for stage in run.stages)
    write_report(
        path,
        title=f"minillm {run.config.recipe}: {training['parameters'] / 1e6:.2f}M parameters",
        summary=[
            ("held-out loss", f"{training['held_out_nats']:.3f} nats a token"),
            ("bits per byte, held out", f"{training['bits_per_byte']:.3f}"),
            ("perplexity, held out", f"{math.exp(training['held_out_nats']):.2f}"),
            ("tokens trained on", f"{training['tokens']:,}"),
            (
                "training speed",
                f"{training['tokens_per_s']:,.0f} tokens/s ({100 * training['mfu']:.0f} % MFU)",
            ),
            ("decoding speed, batch 1", f"{results['decode_tokens_per_s']:,.0f} tokens/s"),
            ("peak memory", f"{results['peak_memory_bytes'] / 2**20:,.0f} MiB"),
            ("time in all", f"{total / 60:.1f} min"),
        ],
        scores=results["scores"],
        samples=[tuple(s) for s in results["samples"]],
        metrics=read_metrics(run.folder / "metrics.jsonl"),
        stages=[(s.name, s.what, s.seconds) for s in run.stages],
        config=dataclasses.asdict(run.config),
        machine=describe_machine(device),
    )
    return path


def speedrun(
    config: RunConfig,
    run_dir: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: str | None = None,
    restart: bool = False,
    say: Say = _quiet,
    progress: bool = False,
    engine: EngineConfig | None = None,
    world: World | None = None,
) -> dict[str, Any]:
    """`pretrain`, then questions, samples and `report.html`. The arguments and errors are those of `pretrain`.

    Returns:
        What the stages found: `training` and `results` as in `scores.json`, and the `report`'s path; on process 0 only.
    """
    device = torch.device(device)
    leads = world is None or world.rank == 0
    options: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "restart": restart,
        "say": say,
        "progress": progress,
    }
    with (
        run_lock(run_dir) if leads else contextlib.nullcontext()
    ):  # of one hold, so that nobody comes in between
        run = pretrain(config, run_dir, engine=engine, world=world, **options)
        if not leads:
            return {}
        run.stage(5, "score", lambda: _finish(run, device))
        report = _report(run, device)
    results = run.done["results"]
    for what, prompt, text in results["samples"]:
        run.say(f"\n{what}:\n  {(prompt + text).strip()}".replace("\n", "\n  ").replace("\n  \n", "\n"))
    run.say("")
    for record in results["scores"]:
        run.say(
            f"{record['name']:42} {record['correct']:3} of {record['n']:3}  {100 * record['accuracy']:5.1f} %"
        )
    return {"training": run.done["training"], "results": results, "report": report}
