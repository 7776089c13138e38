"""Optional packages that extract, identify, and judge text."""

import re
from typing import Any

import numpy as np

from minillm.base.optional import optional
from minillm.corpus import HAN, sentences_of, units
from minillm.detect import TokenScores


def extract_trafilatura(page: str) -> str:
    """The main text as trafilatura finds it, without comments. Source: Barbaresi 2021, https://aclanthology.org/2021.acl-demo.15"""
    with optional("clean"):
        import trafilatura
    found = trafilatura.extract(page, include_comments=False, include_tables=True)
    return found or ""


def extract_justext(page: str) -> str:
    """The main text as jusText finds it, with its English stop words.

    jusText has no list for Chinese and its lengths are in characters, so a page in Chinese is judged by length alone, at
    a third of the English lengths.

    Source: Pomikálek 2011, "Removing boilerplate and duplicate content from web corpora".
    """
    with optional("clean"):
        import justext
    if len(re.findall(f"[{HAN}]", page)) * 5 > len(units(re.sub("<[^<>]*>", "", page))):
        options: dict[str, Any] = {
            "length_low": 23,
            "length_high": 66,
            "stopwords_low": 0,
            "stopwords_high": 0,
        }
        paragraphs = justext.justext(page, frozenset(), **options)
    else:
        paragraphs = justext.justext(page, justext.get_stoplist("English"))
    return "\n".join(paragraph.text for paragraph in paragraphs if not paragraph.is_boilerplate)


def identify_py3langid(text: str) -> tuple[str, float]:
    """Language and confidence by py3langid, which knows 97 languages."""
    if not any(map(str.isalpha, text[:4000])):
        return "und", 1.0
    with optional("clean"):
        import py3langid
    ranked = py3langid.rank(text[:4000])
    scores = np.array([score for _, score in ranked], dtype=float)
    return str(ranked[0][0]), float(1 / np.exp(scores - scores[0]).sum())


class HuggingFaceScorer:
    """Log-probabilities and ranks from a causal language model of transformers, to plug in where `NGramLM` stands. Chapter 04.

    Args:
        model: a loaded causal language model, such as GPT-2 or one of ours in that format.
        tokenizer: the tokenizer that belongs to it.
        max_tokens: so many tokens of a text are read.
    """

    def __init__(self, model: Any, tokenizer: Any, max_tokens: int = 512) -> None:
        self.model, self.tokenizer, self.max_tokens = model.eval(), tokenizer, max_tokens

    def __call__(self, text: str) -> TokenScores:
        import torch

        ids = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=self.max_tokens)[
            "input_ids"
        ]
        if ids.shape[1] < 2:
            return TokenScores(np.zeros(0), np.zeros(0, dtype=int))
        with torch.inference_mode():
            logits = self.model(ids.to(self.model.device)).logits[0, :-1].float().cpu()
        target = ids[0, 1:, None]
        chosen = logits.gather(1, target)
        log_probs = chosen[:, 0] - logits.logsumexp(1)
        return TokenScores(log_probs.numpy(), (logits > chosen).sum(1).numpy())


class HuggingFaceDetector:
    """Any sequence classifier of transformers as a detector: text to the probability of one of its labels. Chapter 04.

    Args:
        model: a loaded model for sequence classification.
        tokenizer: the tokenizer that belongs to it.
        label: number of the label that means "machine".
    """

    def __init__(self, model: Any, tokenizer: Any, label: int = 1, max_tokens: int = 512) -> None:
        self.model, self.tokenizer, self.label, self.max_tokens = model.eval(), tokenizer, label, max_tokens

    def __call__(self, text: str) -> float:
        import torch

        inputs = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=self.max_tokens)
        with torch.inference_mode():
            logits = self.model(**inputs.to(self.model.device)).logits[0].float()
        return float(logits.softmax(0)[self.label])


def load_huggingface_detector(model: str, label: int) -> HuggingFaceDetector:
    """The detector that a name on the hub, or a folder, stands for."""
    with optional("dev"):
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    network = AutoModelForSequenceClassification.from_pretrained(model)
    return HuggingFaceDetector(network, AutoTokenizer.from_pretrained(model), label)


class LoadedDetector:
    """A Hugging Face classifier as a detector that can be sent to a worker: each process loads it at first use."""

    def __init__(self, model: str, label: int) -> None:
        self.model, self.label = model, label
        self._detect: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"model": self.model, "label": self.label, "_detect": None}

    def __call__(self, text: str) -> float:
        if self._detect is None:
            self._detect = load_huggingface_detector(self.model, self.label)
        return self._detect(text)


def profanity_score(text: str) -> float:
    """The chance that the worst sentence is offensive English, by alt-profanity-check, whose model comes in its package."""
    with optional("clean"):
        import profanity_check
    parts = sentences_of(text[:20_000])
    return max(map(float, profanity_check.predict_prob(parts))) if parts else 0.0
