"""The one door to a model: a folder that holds one, whoever wrote it."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from minillm.base.errors import CheckpointError
from minillm.base.files import atomic_write
from minillm.hub.build import build, resolve_tied
from minillm.hub.meta import META, join_slices, open_slices, read_params
from minillm.hub.own import FORMAT, save_model
from minillm.hub.published import save_published
from minillm.hub.tokenizers import PublishedTokenizer, read_published_tokenizer
from minillm.hub.weights import Weights, inside, open_weights, read_json
from minillm.storage.tensors import load_tensors
from minillm.tokenizer import SentencePieceTokenizer, Tokenizer, TokenizerError, load_tokenizer
from minillm.transformer import ModelConfig, Transformer
from minillm.zoo import Family, family_of, recognise

OWN_TOKENIZER = "minillm-tokenizer.json"  # in a published folder, whose tokenizer.json is of another format
SENTENCEPIECE = ("ice_text.model", "tokenizer.model")
TOKENIZER_SETTINGS = ("tokenizer_config.json", "generation_config.json")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What settings lack or say wrongly is an error that names their file."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{path}: no {error.args[0]!r}") from error
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


@dataclass(frozen=True)
class ModelFolder:
    """A folder with a model; its settings are read once, when it is opened, and are not believed.

    Open one with `ModelFolder.open`. Nothing else is read before it is asked for, and no code of a folder is ever run.

    Args:
        path: where the model's files are: of a run, its `model/`.
        kind: "run": of ours, trained by `minillm speedrun`; "own": our format, by itself; "published": LLaMA, ChatGLM, ChatGLM2 or
            Baichuan in Hugging Face's layout; "meta": LLaMA as Meta published it.
        settings: what config.json, or Meta's params.json, says.
        norm_head: whether the rows of a published head are normed (Baichuan2), where config.json is not to be asked.
    """

    path: Path
    kind: Literal["run", "own", "published", "meta"]
    settings: Mapping[str, Any]
    norm_head: bool | None = None

    @staticmethod
    def settings_file(path: str | Path) -> Path | None:
        """The file that says what model a folder holds, or None if it holds none."""
        for name in ("model/config.json", "config.json", "params.json"):
            if os.path.lexists(found := Path(path) / name):
                return found
        return None

    @classmethod
    def open(cls, path: str | Path, *, norm_head: bool | None = None) -> "ModelFolder":
        """Say what kind of folder this is, and read its settings.

        Raises:
            CheckpointError: there is no such folder, or no model in it, or its settings are damaged.
        """
        path, file = Path(path), cls.settings_file(path)
        if file is None:
            fault = f"{path / 'config.json'}: no such file" if path.is_dir() else f"{path}: no such folder"
            raise CheckpointError(f"{fault}: no trained model here; train one with `minillm speedrun`")
        settings = read_json(inside(file.parent, file.name))
        if file.name == "params.json":
            return cls(file.parent, "meta", settings)
        if settings.get("format") == FORMAT:
            return cls(file.parent, "own" if file.parent == path else "run", settings)
        return cls(file.parent, "published", settings, norm_head)

    @property
    def _file(self) -> Path:
        return self.path / ("params.json" if self.kind == "meta" else "config.json")

    @cached_property
    def family(self) -> Family | None:
        """Whose names and layouts the stored tensors have; None: our own.

        Raises:
            CheckpointError: of no family that we know.
        """
        if self.kind in ("run", "own"):
            return None
        return META if self.kind == "meta" else recognise(self.settings, self._file)

    @cached_property
    def config(self) -> ModelConfig:
        """The shape that the settings describe. Whether head and embedding are one, the weights may know better (`model`).

        Raises:
            CheckpointError: they describe no model of ours.
        """
        family = self.family
        with _named(self._file):
            if family is None:
                if not isinstance(self.settings.get("model"), dict):
                    raise ValueError(f"not a minillm model (no 'format': '{FORMAT}' with a 'model')")
                return ModelConfig(**self.settings["model"])
            if self.kind == "meta":
                return read_params(self.settings, list(self._slices.values()))
            found = family.read(self.settings)
            return found if self.norm_head is None else replace(found, norm_head=self.norm_head)

    @cached_property
    def _slices(self) -> dict[Path, dict[str, Tensor]]:
        return open_slices(self.path)

    def weights(self) -> Weights:
        """The stored tensors by the names that they have in the files, as views of them.

        Raises:
            CheckpointError: a file is missing or damaged, or lies outside the folder.
        """
        if self.kind == "published":
            return open_weights(self.path)
        weights = Weights()
        if self.kind == "meta":
            first = next(iter(self._slices))
            with _named(self._file):
                weights.add(first, join_slices(list(self._slices.values())))
        else:
            path = inside(self.path, "model.safetensors")
            weights.add(path, load_tensors(path))
        return weights

    def model(self, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Transformer:
        """The model.

        Weights stay views of the files where dtype and order are ours already: memory is taken when they are used, and a
        file must not be overwritten in place while the model lives.

        Args:
            dtype: of all weights; by default as they are stored, which in a published folder is the one of most numbers.
            device: where they go.

        Raises:
            CheckpointError: anything about the folder is wrong; the message names file and fault.
        """
        config, family, weights = self.config, self.family, self.weights()
        if family is not None:
            config = resolve_tied(config, weights, family, self.settings.get("tie_word_embeddings"))
            dtype = weights.main_dtype() if dtype is None else dtype
        return build(config, weights, family, folder=self.path, dtype=dtype, device=device)

    def tokenizer(self) -> Tokenizer | PublishedTokenizer:
        """The tokenizer that lies beside the model: ours, or a SentencePiece file with its family's rules.

        Raises:
            TokenizerError: there is none, or it is damaged.
            CheckpointError: the folder's JSON files are damaged, or name no family of ours.
        """
        for name in (OWN_TOKENIZER, *SENTENCEPIECE, "tokenizer.json"):
            if not os.path.lexists(self.path / name):
                continue
            path = inside(self.path, name)
            if name not in SENTENCEPIECE:
                return load_tokenizer(path)
            family = self.family or family_of(self.config)
            return read_published_tokenizer(
                path, family.name, {**self._tokenizer_settings(), **self.settings}
            )
        raise TokenizerError(
            f"{self.path} holds a model and no tokenizer (neither tokenizer.model nor ice_text.model, "
            "nor tokenizer.json): put one beside it"
        )

    def _tokenizer_settings(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name in TOKENIZER_SETTINGS:
            if os.path.lexists(self.path / name):
                found |= read_json(inside(self.path, name), 16 << 20)
        return found

    def convert(self, out: str | Path, *, dtype: torch.dtype | None = None) -> "ModelFolder":
        """Write a published model in our own format, or one of ours in its family's; the tokenizer goes with it.

        Args:
            out: a new folder.
            dtype: of the weights; by default as they are.

        Returns:
            The new folder.

        Raises:
            CheckpointError: this one is damaged.
            ValueError: `out` holds something, or no family has the shape.
        """
        out = Path(out)
        if out.exists() and any(out.iterdir()):
            raise ValueError(f"{out} is not empty: choose a new folder")
        model = self.model(dtype=dtype)
        if self.family is None:
            save_published(model, out)
        else:
            save_model(out, model)
        self._convert_tokenizer(out)
        return ModelFolder.open(out)

    def _convert_tokenizer(self, out: Path) -> None:
        """Our tokenizer under another name, a published one as it is, and special ids in a file of their own."""
        for name in (*SENTENCEPIECE, "tokenizer_config.json", OWN_TOKENIZER):
            if os.path.lexists(self.path / name):
                shutil.copyfile(inside(self.path, name), out / name)
        if self.family is None and (self.path / "tokenizer.json").is_file():
            tokenizer = load_tokenizer(self.path / "tokenizer.json")
            sentencepiece = isinstance(tokenizer, SentencePieceTokenizer)
            tokenizer.save(out / ("tokenizer.model" if sentencepiece else OWN_TOKENIZER))
        settings = {**self._tokenizer_settings(), **self.settings}
        if ids := {key: value for key, value in settings.items() if key.endswith("_token_id")}:
            with atomic_write(out / "generation_config.json") as file:
                json.dump(ids, file, indent=1)


def load_run(path: str | Path, device: torch.device | str = "cpu") -> tuple[Transformer, Any]:
    """The model and the tokenizer of a run's folder, or of any other that `ModelFolder` opens."""
    folder = ModelFolder.open(path)
    return folder.model(device=device), folder.tokenizer()
