"""A folder with a model, ours or published: opened, and converted."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from minillm.base.errors import CheckpointError
from minillm.base.files import atomic_write
from minillm.hub.own import load_model, save_model
from minillm.hub.published import load_checkpoint, save_checkpoint
from minillm.hub.tokenizers import load_published_tokenizer
from minillm.hub.weights import inside, read_json
from minillm.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from minillm.transformer import Transformer


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


OWN_TOKENIZER = (
    "minillm-tokenizer.json"  # in a published folder, where tokenizer.json would have to be another format
)


def load_folder(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> tuple[Transformer, Any]:
    """The model of a folder, published or our own, and its tokenizer.

    Raises:
        CheckpointError, TokenizerError: one of them is missing or damaged.
    """
    folder = Path(folder)
    model = load_checkpoint(folder, dtype=dtype, device=device)
    if os.path.lexists(folder / OWN_TOKENIZER):
        return model, load_tokenizer(inside(folder, OWN_TOKENIZER))
    if any(os.path.lexists(folder / name) for name in ("tokenizer.model", "ice_text.model")):
        return model, load_published_tokenizer(folder)
    return model, load_tokenizer(inside(folder, "tokenizer.json"))


def convert_folder(folder: str | Path, out: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """A published model into our own format, or one of ours into its family's; the tokenizer goes with it.

    Args:
        folder: published, Meta's, or what `checkpoint.save_model` or a run wrote.
        out: a new folder.
        dtype: of the weights; by default as they are.

    Returns:
        The new folder.

    Raises:
        CheckpointError: `folder` is damaged, or is no model.
        ValueError: `out` holds something, or no family has the shape.
    """
    folder, out = Path(folder), Path(out)
    folder = folder / "model" if (folder / "model" / "config.json").is_file() else folder
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: choose a new folder")
    model = load_checkpoint(folder, dtype=dtype)
    own = (folder / "config.json").is_file() and read_json(folder / "config.json").get("format") == "minillm"
    if own:
        save_checkpoint(model, out)
    else:
        save_model(out, model)
    ids: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
        if os.path.lexists(folder / name):
            found = read_json(inside(folder, name), 16 << 20)
            ids |= {key: value for key, value in found.items() if key.endswith("_token_id")}
    for name in ("tokenizer.model", "ice_text.model", "tokenizer_config.json", OWN_TOKENIZER):
        if os.path.lexists(folder / name):
            shutil.copyfile(inside(folder, name), out / name)
    if own and (folder / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(folder / "tokenizer.json")
        sentencepiece = isinstance(tokenizer, SentencePieceTokenizer)
        tokenizer.save(out / ("tokenizer.model" if sentencepiece else OWN_TOKENIZER))
    if ids:
        with atomic_write(out / "generation_config.json") as file:
            json.dump(ids, file, indent=1)
    return out
