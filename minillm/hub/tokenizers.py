"""The tokenizers that published models bring, and the prompts that they expect."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minillm.tokenizer import SentencePieceTokenizer, TokenizerError, load_tokenizer


def glm_text(text: str) -> str:
    """How ChatGLM-6B writes white space that SentencePiece would lose: newline, tab, and runs of 2 to 80 spaces."""
    text = text.replace("\n", "<n>").replace("\t", "<|tab|>")
    return re.sub(r" {2,80}", lambda run: f"<|blank_{len(run[0])}|>", text)


def glm_plain(text: str) -> str:
    """The inverse of `glm_text`."""
    text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
    return re.sub(r"<\|blank_(\d\d?)\|>", lambda mark: " " * int(mark[1]), text)


Rounds = Sequence[tuple[str, str]]


def chatglm_prompt(question: str, history: Rounds = (), *, second: bool = False) -> str:
    """A dialogue as ChatGLM (rounds from 0) or ChatGLM2 (rounds from 1, with empty lines) was trained on it."""
    gap = "\n\n" if second else "\n"
    rounds = [(q, a + gap) for q, a in history] + [(question, "")]
    return "".join(
        f"[Round {i}]{gap}问：{q}{gap}答：{a}" for i, (q, a) in enumerate(rounds, start=int(second))
    )


class PublishedTokenizer:
    """A published model's tokenizer: its SentencePiece file, and what is not in that file (chapter 14).

    Args:
        base: the SentencePiece model.
        family: llama, chatglm, chatglm2 or baichuan.
        ids: special ids of the model's own config: gmask_token_id, bos_token_id, eos_token_id, pad_token_id,
            user_token_id, assistant_token_id; where one is missing, the published rule stands.
        offset: what is added to SentencePiece's ids (20,000 in ChatGLM-6B's first release, which kept room for images).
    """

    def __init__(
        self, base: SentencePieceTokenizer, family: str, ids: Mapping[str, int] | None = None, offset: int = 0
    ):
        self.base, self.family, self.offset = base, family, offset
        n, piece, ids = base.vocab_size, base.processor.piece_to_id, ids or {}
        named: dict[str, int] = {}
        if family == "chatglm":
            named = {"[gMASK]": ids.get("gmask_token_id", piece("[gMASK]") + offset)}
            named["<sop>"] = ids.get("bos_token_id", piece("<sop>") + offset)
            named["<eop>"] = ids.get("eos_token_id", piece("<eop>") + offset)
        elif family == "chatglm2":
            named = {name: n + i for i, name in enumerate(("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"))}
        elif family == "baichuan":
            named = {"user": ids.get("user_token_id", 195), "assistant": ids.get("assistant_token_id", 196)}
        self.special_ids = named
        self.before: list[int] = [named["[gMASK]"], named["sop"]] if family == "chatglm2" else []
        if family == "llama":
            self.before = [base.bos_id]
        self.after: list[int] = [named["[gMASK]"], named["<sop>"]] if family == "chatglm" else []
        self.eos_id: int | None = named.get("<eop>", ids.get("eos_token_id", base.eos_id))
        self.pad_id: int = ids.get("pad_token_id", 3 if family == "chatglm" else 0)

    @property
    def vocab_size(self) -> int:
        """The ids that the tokenizer can make; the model's table may have more rows."""
        return max(self.base.vocab_size + self.offset, *self.special_ids.values(), 0) + (
            1 if self.family == "chatglm2" else 0
        )

    def encode_plain(self, text: str) -> list[int]:
        """The ids of a text, and nothing before or after it."""
        text = glm_text(text) if self.family == "chatglm" else text
        return [i + self.offset for i in self.base.encode_plain(text)]

    def encode(self, text: str) -> list[int]:
        """The ids of a prompt, with the special tokens that the model expects around it."""
        return [*self.before, *self.encode_plain(text), *self.after]

    def decode(self, ids: Sequence[int]) -> str:
        """The text behind ids; special ids stand for nothing."""
        special = set(self.special_ids.values())
        known = [
            i - self.offset
            for i in ids
            if i not in special and self.offset <= i < self.base.vocab_size + self.offset
        ]
        text = self.base.decode(known)
        return glm_plain(text) if self.family == "chatglm" else text

    def chat(self, question: str, history: Rounds = (), *, system: str = "") -> list[int]:
        """The ids of a dialogue in the form that the family's chat model was trained on, ready for the next answer.

        Args:
            question: what the user says now.
            history: earlier questions and answers.
            system: an instruction for the whole dialogue; LLaMA-2 only.
        """
        if system and self.family != "llama":
            raise ValueError(f"the prompt of {self.family} has no place for a system text")
        if self.family in ("chatglm", "chatglm2"):
            return self.encode(chatglm_prompt(question, history, second=self.family == "chatglm2"))
        ids: list[int] = []
        for number, (asked, answer) in enumerate([*history, (question, None)]):
            if self.family == "baichuan":
                ids += [self.special_ids["user"], *self.encode_plain(asked), self.special_ids["assistant"]]
                ids += [] if answer is None else self.encode_plain(answer)
                continue
            start = f"<<SYS>>\n{system}\n<</SYS>>\n\n" if system and number == 0 else ""
            text = f"[INST] {start}{asked} [/INST]" + ("" if answer is None else f" {answer} ")
            ids += [*self.before, *self.encode_plain(text)] + ([] if answer is None else [self.base.eos_id])
        return ids


def read_published_tokenizer(path: Path, family: str, settings: Mapping[str, Any]) -> PublishedTokenizer:
    """The tokenizer of a published model: its SentencePiece file, with its family's rules.

    Args:
        path: `tokenizer.model`, or ChatGLM-6B's `ice_text.model`.
        family: llama, chatglm, chatglm2 or baichuan.
        settings: of the folder's JSON files; its special ids and `num_image_tokens` are used.

    Raises:
        TokenizerError: the file is damaged, or a setting makes no sense.
    """
    base = load_tokenizer(path)
    assert isinstance(base, SentencePieceTokenizer)
    ids = {key: value for key, value in settings.items() if key.endswith("_token_id") and type(value) is int}
    offset = settings.get("num_image_tokens", 0)
    if type(offset) is not int or not 0 <= offset <= 1 << 20:
        raise TokenizerError(f"{path.parent}: num_image_tokens must be a number of ids, got {offset!r}")
    return PublishedTokenizer(base, family, ids, offset)
