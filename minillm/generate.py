"""Draft, to be replaced by the export of chapter 14; the public names and signatures are the contract."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from minillm.transformer import Transformer


def top_k_filter(logits: Float[Tensor, "B V"], k: int) -> Float[Tensor, "B V"]:
    """Keep the k largest logits of each row (and their equals); the others become -inf."""
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def top_p_filter(logits: Float[Tensor, "B V"], p: float) -> Float[Tensor, "B V"]:
    """Keep the smallest set of most probable tokens whose probability reaches p; the others become -inf."""
    ordered, index = logits.sort(dim=-1, descending=False)
    unlikely = ordered.softmax(-1).cumsum(-1) <= 1 - p
    unlikely[:, -1] = False
    return logits.masked_fill(unlikely.scatter(-1, index, unlikely), -math.inf)


def min_p_filter(logits: Float[Tensor, "B V"], p: float) -> Float[Tensor, "B V"]:
    """Keep the tokens whose probability is at least p times that of the most probable one."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -math.inf)


def repetition_penalty(
    logits: Float[Tensor, "B V"], history: Int[Tensor, "B S"], penalty: float
) -> Float[Tensor, "B V"]:
    """Divide the positive logits of the tokens in `history` by the penalty, multiply the negative ones. Ids < 0: none."""
    seen = torch.zeros(logits.shape[0], logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
    seen = seen.scatter(1, torch.where(history < 0, logits.shape[1], history), True)[:, :-1]
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How the next token is chosen from the logits. Temperature 0 takes the largest."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 (greedy) or positive, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}; None keeps every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}; None keeps every token")
        if self.min_p is not None and not 0 < self.min_p <= 1:
            raise ValueError(f"min_p must be in (0, 1], got {self.min_p}; None keeps every token")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be positive, got {self.repetition_penalty}; 1 changes nothing")

    @classmethod
    def greedy(cls) -> "Sampler":
        """Always the most probable token."""
        return cls(temperature=0.0)

    def filtered(
        self, logits: Float[Tensor, "B V"], history: Int[Tensor, "B S"] | None = None
    ) -> Float[Tensor, "B V"]:
        """The logits that are sampled from: penalty, temperature, then the filters."""
        logits = logits.float()
        if self.repetition_penalty != 1 and history is not None:
            logits = repetition_penalty(logits, history, self.repetition_penalty)
        if self.temperature > 0:
            logits = logits / self.temperature
        if self.top_k is not None:
            logits = top_k_filter(logits, self.top_k)
        if self.top_p is not None:
            logits = top_p_filter(logits, self.top_p)
        if self.min_p is not None:
            logits = min_p_filter(logits, self.min_p)
        return logits

    def select(
        self, logits: Float[Tensor, "B V"], history: Int[Tensor, "B S"] | None, uniform: Float[Tensor, "B"] | None
    ) -> Int[Tensor, "B"]:
        """The token of each row: the largest logit, or the inverse of the distribution function at `uniform`."""
        logits = self.filtered(logits, history)
        if self.temperature == 0 or uniform is None:
            return logits.argmax(-1)
        cdf = logits.double().softmax(-1).cumsum(-1)
        return torch.searchsorted(cdf, uniform.double()[:, None] * cdf[:, -1:], right=True)[:, 0]

    def __call__(
        self,
        logits: Float[Tensor, "B V"],
        history: Int[Tensor, "B S"] | None = None,
        generator: torch.Generator | None = None,
    ) -> Int[Tensor, "B"]:
        """One token per row."""
        uniform = torch.rand(logits.shape[0], dtype=torch.float64, generator=generator).to(logits.device)
        return self.select(logits, history, uniform)


def _uniforms(n_rows: int, n_draws: int, seed: int | Sequence[int] | None) -> Float[Tensor, "B N"]:
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    if isinstance(seed, int):
        seeds = torch.randint(2**62, (n_rows,), generator=torch.Generator().manual_seed(seed)).tolist()
    else:
        seeds = list(seed)
    if len(seeds) != n_rows:
        raise ValueError(f"one seed per prompt: {len(seeds)} seeds for {n_rows} prompts")
    return torch.stack(
        [torch.rand(n_draws, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )


@torch.inference_mode()
def _steps(
    model: Transformer,
    prompts: Sequence[Sequence[int]] | Int[Tensor, "B T"],
    max_new_tokens: int,
    sampler: Sampler,
    pad_id: int,
    seed: int | Sequence[int] | None,
) -> Iterator[list[int]]:
    rows = prompts.tolist() if isinstance(prompts, Tensor) else [list(p) for p in prompts]
    if not rows or not all(rows):
        raise ValueError("a prompt must hold at least one token (give it the bos token)")
    length, limit = max(map(len, rows)), model.config.max_seq_len
    if length + max_new_tokens > limit:
        raise ValueError(
            f"{length} prompt tokens + {max_new_tokens} new ones exceed the model's max_seq_len of {limit}: "
            "shorten the prompt or lower max_new_tokens"
        )
    device = model.embed.weight.device
    tokens = torch.tensor([[pad_id] * (length - len(r)) + r for r in rows], device=device)
    real = torch.tensor([[0] * (length - len(r)) + [1] * len(r) for r in rows], device=device).bool()
    real = torch.cat((real, real.new_ones(len(rows), max_new_tokens)), dim=1)
    padded = not bool(real.all())
    history = tokens.masked_fill(~real[:, :length], -1)
    uniform = None if sampler.temperature == 0 else _uniforms(len(rows), max_new_tokens, seed).to(device)
    cache = model.make_cache(len(rows), length + max_new_tokens)
    for step in range(max_new_tokens):
        seen = real[:, : cache.length + tokens.shape[1]] if padded else None
        hidden = model.hidden(tokens, attention_mask=seen, cache=cache)[:, -1]
        chosen = sampler.select(model.logits(hidden), history, None if uniform is None else uniform[:, step])
        tokens = chosen[:, None]
        history = torch.cat((history, tokens), dim=1)
        yield chosen.tolist()


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]] | Int[Tensor, "B T"],
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    eos_id: int | None = None,
    pad_id: int = 0,
    seed: int | Sequence[int] | None = None,
    stop: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Continue every prompt; only the new tokens, up to and with `eos_id`.

    Args:
        seed: an int, or one per prompt; a row's tokens depend on its own seed only, not on its neighbours.
        stop: called with a row's new tokens after each; True ends the row.
    """
    new: list[list[int]] = [[] for _ in range(len(prompts))]
    running = set(range(len(prompts)))
    for chosen in _steps(model, prompts, max_new_tokens, sampler or Sampler.greedy(), pad_id, seed):
        for row in tuple(running):
            new[row].append(chosen[row])
            if chosen[row] == eos_id or (stop is not None and stop(new[row])):
                running.discard(row)
        if not running:
            break
    return new


def stream(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    eos_id: int | None = None,
    seed: int | None = None,
    stop: Callable[[list[int]], bool] | None = None,
) -> Iterator[int]:
    """The tokens of `generate(model, [prompt], …)[0]`, each as soon as it is known."""
    new: list[int] = []
    for (token,) in _steps(model, [prompt], max_new_tokens, sampler or Sampler.greedy(), 0, seed):
        new.append(token)
        yield token
        if token == eos_id or (stop is not None and stop(new)):
            return


@runtime_checkable
class TextTokenizer(Protocol):
    """What the text functions need of a tokenizer."""

    @property
    def eos_id(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


def generate_text(
    model: Transformer,
    tokenizer: TextTokenizer,
    prompts: str | Sequence[str],
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    seed: int | Sequence[int] | None = None,
    stop: Sequence[str] = (),
) -> str | list[str]:
    """Continue text: a string for a string, a list for a list. Ends before the first string of `stop`."""
    rows = [tokenizer.encode(p) for p in ([prompts] if isinstance(prompts, str) else prompts)]
    eos = tokenizer.eos_id
    found = (lambda ids: any(s in tokenizer.decode(ids) for s in stop)) if stop else None
    new = generate(model, rows, max_new_tokens=max_new_tokens, sampler=sampler, eos_id=eos, seed=seed, stop=found)
    texts = [tokenizer.decode([t for t in ids if t != eos]) for ids in new]
    texts = [text[: min([text.find(s) for s in stop if s in text], default=len(text))] for text in texts]
    return texts[0] if isinstance(prompts, str) else texts


def stream_text(
    model: Transformer,
    tokenizer: TextTokenizer,
    prompt: str,
    *,
    max_new_tokens: int,
    sampler: Sampler | None = None,
    seed: int | None = None,
) -> Iterator[str]:
    """Pieces of text as soon as they are whole: a character of several tokens is never split."""
    eos, ids, done = tokenizer.eos_id, [], 0
    for token in stream(
        model, tokenizer.encode(prompt), max_new_tokens=max_new_tokens, sampler=sampler, eos_id=eos, seed=seed
    ):
        if token == eos:
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        if not text.endswith("\ufffd") and len(text) > done:
            yield text[done:]
            done = len(text)
    if ids and len(tokenizer.decode(ids)) > done:
        yield tokenizer.decode(ids)[done:]


@torch.inference_mode()
def log_likelihood(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
) -> list[float]:
    """log p(continuation | prompt) in nats, summed over the continuation's tokens."""
    if len(prompts) != len(continuations):
        raise ValueError(f"one continuation per prompt: {len(prompts)} prompts, {len(continuations)} continuations")
    rows = [(list(p), list(c)) for p, c in zip(prompts, continuations)]
    if not all(p and c for p, c in rows):
        raise ValueError("prompts and continuations must hold at least one token each")
    scores = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        length = max(len(rows[i][0]) + len(rows[i][1]) for i in batch)
        tokens = torch.tensor([rows[i][0] + rows[i][1] + [0] * (length - sum(map(len, rows[i]))) for i in batch])
        tokens = tokens.to(model.embed.weight.device)
        hidden = model.hidden(tokens[:, :-1])  # padding stands on the right: causality hides it
        for row, i in enumerate(batch):
            first, last = len(rows[i][0]), len(rows[i][0]) + len(rows[i][1])
            logp = F.log_softmax(model.logits(hidden[row, first - 1 : last - 1]).float(), dim=-1)
            scores[i] = float(logp.gather(1, tokens[row, first:last, None]).sum())
    return scores
