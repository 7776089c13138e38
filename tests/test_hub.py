"""Models in folders: ours and published ones, what strangers may put into them, and what comes out."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest
import sentencepiece
import torch
from published import (
    BAICHUAN_13B,
    CHATGLM,
    CHATGLM2,
    FAMILIES,
    LLAMA,
    apart,
    quantized,
    random_weights,
    shapes,
    to_meta,
    weights_for,
    write_folder,
)
from safetensors.torch import load_file, save_file
from tolerances import LOGITS
from torch import nn

from minillm.base.errors import CheckpointError
from minillm.cli.main import main
from minillm.generate import Sampler, generate
from minillm.hub import ModelFolder, load_run
from minillm.hub.own import save_model
from minillm.hub.published import save_published
from minillm.hub.tokenizers import chatglm_prompt, glm_plain, glm_text
from minillm.hub.weights import read_json
from minillm.tokenizer import SentencePieceTokenizer, TokenizerError, train_bpe
from minillm.transformer import ModelConfig, Transformer
from minillm.zoo import read_llama

families = pytest.mark.parametrize("settings", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def load(folder, norm_head=None, **options):
    return ModelFolder.open(folder, norm_head=norm_head).model(**options)


# Files.


@families
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("n_shards", [1, 3])
def test_every_layout_of_files_gives_the_same_weights(settings, kind, n_shards, tmp_path):
    weights = random_weights(settings, torch.float16)
    weights = {name: w.float() if "norm" in name else w for name, w in weights.items()}  # as published
    expected = load(write_folder(tmp_path / "a", weights, settings), dtype=torch.float32).state_dict()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    folder = write_folder(tmp_path / "b", weights, settings, kind, n_shards)
    loaded = load(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    mixed = load(folder)
    assert {w.dtype for w in mixed.parameters()} == {torch.float16}  # that of most numbers


@families
def test_a_model_is_written_and_read_bit_for_bit(settings, tmp_path):
    weights = random_weights(settings, torch.bfloat16)
    model = load(write_folder(tmp_path / "a", weights, settings))
    family = "baichuan" if settings["model_type"] == "baichuan" else None
    for name, size in (("one", 5 << 30), ("many", 20_000)):
        folder = save_published(model, tmp_path / name, family=family, max_shard_bytes=size)
        again = load(folder)
        assert again.config == model.config
        assert all(torch.equal(again.state_dict()[n], w) for n, w in model.state_dict().items())
        stored = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
        assert stored.keys() == weights.keys()
        assert all(torch.equal(stored[n], w) for n, w in weights.items())  # in the family's own order, too
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_we_write_and_generates_the_same(tied, tmp_path):
    from transformers import AutoModelForCausalLM

    model = Transformer(replace(read_llama(LLAMA), n_kv_heads=2, tied=tied)).eval()
    model.reset_parameters(std=0.3)
    folder = save_published(model, tmp_path / "m", max_shard_bytes=30_000)
    peer = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(3, 61, (2, 9))
    assert apart(peer(tokens).logits, model(tokens)) < LOGITS[torch.float32]
    theirs = peer.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=16,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert generate(model, tokens, max_new_tokens=16, sampler=Sampler.greedy()) == theirs[:, 9:].tolist()


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_we_load_what_transformers_writes_and_generate_the_same(kv_heads, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    peer = LlamaForCausalLM(
        LlamaConfig(**{**LLAMA, "num_key_value_heads": kv_heads, "initializer_range": 0.3})
    ).eval()
    peer.save_pretrained(tmp_path / "m", max_shard_size="40KB")
    model = load(tmp_path / "m").eval()
    tokens = torch.randint(3, 61, (2, 9))
    theirs = peer.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert generate(model, tokens, max_new_tokens=20, sampler=Sampler.greedy()) == theirs[:, 9:].tolist()


@pytest.mark.parametrize(("config", "message"), [
    (ModelConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2, n_kv_heads=2, hidden_dim=8, max_seq_len=8, norm="layer"), "no published family"),
    (ModelConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2, n_kv_heads=2, hidden_dim=8, max_seq_len=8, qkv_bias=True), "no published family"),
])  # fmt: skip
def test_a_shape_without_family_is_not_written(config, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        save_published(Transformer(config), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_saving_says_what_is_wrong(tmp_path):
    model = Transformer(read_llama(LLAMA))
    with pytest.raises(
        ValueError, match="family must be one of llama, chatglm, chatglm2, baichuan, got 'gpt'"
    ):
        save_published(model, tmp_path / "m", family="gpt")
    with pytest.raises(ValueError, match="the family 'chatglm2' cannot hold this shape; 'llama' can"):
        save_published(model, tmp_path / "m", family="chatglm2")
    save_published(model, tmp_path / "m")
    with pytest.raises(ValueError, match="holds a model already"):
        save_published(model, tmp_path / "m")


def test_a_tie_is_believed_only_where_both_are_equal(tmp_path):
    settings = {**LLAMA, "tie_word_embeddings": True}
    weights = random_weights(settings)
    model = load(write_folder(tmp_path / "a", weights, settings))
    assert not model.config.tied
    assert torch.equal(model.head.weight, weights["lm_head.weight"])
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    model = load(write_folder(tmp_path / "b", weights, settings))
    assert model.head.weight is model.embed.weight
    model = load(write_folder(tmp_path / "c", weights_for(settings), settings))
    assert model.head.weight is model.embed.weight
    weights = random_weights(CHATGLM)
    weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"].clone()
    assert not load(write_folder(tmp_path / "d", weights, CHATGLM)).config.tied  # both are there


@pytest.mark.parametrize("n_slices", [1, 2])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_meta_s_files_give_the_same_model(n_slices, kv_heads, tmp_path):
    settings = {**LLAMA, "num_key_value_heads": kv_heads, "intermediate_size": 128, "vocab_size": 62}
    weights = random_weights(settings)
    expected = load(write_folder(tmp_path / "hf", weights, settings))
    slices, params = to_meta(weights, settings, n_slices)
    folder = tmp_path / "meta"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    for i, part in enumerate(slices):
        torch.save(part, folder / f"consolidated.{i:02}.pth")
    model = load(folder)
    assert all(torch.equal(model.state_dict()[n], w) for n, w in expected.state_dict().items())
    tokens = torch.randint(61, (2, 12))
    assert torch.equal(model(tokens), expected(tokens))


def test_meta_s_folder_brings_its_tokenizer_and_talks(tmp_path, capsys):
    plain = sentencepiece_model(tmp_path / "tokenizer.model", split_digits=True)
    settings = {**LLAMA, "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": plain.vocab_size()}
    slices, params = to_meta(random_weights(settings), settings, 1)
    (tmp_path / "params.json").write_text(json.dumps(params))
    torch.save(slices[0], tmp_path / "consolidated.00.pth")
    model, tokenizer = load_run(tmp_path)
    assert model.config.vocab_size == tokenizer.vocab_size == plain.vocab_size()
    assert tokenizer.encode("the fox") == [plain.bos_id(), *plain.encode("the fox")]
    words = ["generate", "the fox", "--model", str(tmp_path), "--max-new-tokens", "3", "--device", "cpu"]
    assert main(words) == 0
    assert capsys.readouterr().out.startswith("the fox")


@pytest.mark.parametrize(("damage", "message"), [
    (lambda folder: (folder / "consolidated.00.pth").unlink(), "not all there"),
    (lambda folder: (folder / "params.json").write_text('{"dim": 48}'), "no 'multiple_of'"),
    (lambda folder: (folder / "params.json").write_text('{"dim": "48", "multiple_of": 8}'), "params.json"),
])  # fmt: skip
def test_meta_s_damaged_files(damage, message, tmp_path):
    slices, params = to_meta(random_weights(LLAMA), LLAMA)
    (tmp_path / "params.json").write_text(json.dumps(params))
    torch.save(slices[0], tmp_path / "consolidated.00.pth")
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


# One door.


def test_a_folder_says_what_it_is_and_its_settings_are_read_once(tmp_path, monkeypatch):
    plain = sentencepiece_model(tmp_path / "published" / "tokenizer.model", split_digits=True)
    settings = {**LLAMA, "intermediate_size": 128, "vocab_size": plain.vocab_size()}
    weights = random_weights(settings)
    write_folder(tmp_path / "published", weights, settings)
    slices, params = to_meta(weights, settings, 2)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "params.json").write_text(json.dumps(params))
    for i, part in enumerate(slices):
        torch.save(part, tmp_path / "meta" / f"consolidated.{i:02}.pth")
    shutil.copy(tmp_path / "published" / "tokenizer.model", tmp_path / "meta")
    ModelFolder.open(tmp_path / "published").convert(tmp_path / "own")
    shutil.copytree(tmp_path / "own", tmp_path / "run" / "model")
    read = []
    monkeypatch.setattr(
        "minillm.hub.folder.read_json", lambda path, *more: read.append(path.name) or read_json(path, *more)
    )
    for kind in ("published", "meta", "own", "run"):
        folder = ModelFolder.open(tmp_path / kind)
        model = folder.model()
        assert folder.kind == kind
        assert model.config == folder.config
        assert torch.equal(model.head.weight, weights["lm_head.weight"])
        assert folder.tokenizer().decode(folder.tokenizer().encode("the cat")) == "the cat"
        assert len([name for name in read if name in ("config.json", "params.json")]) == 1, read
        read.clear()


# Our own format.

OWN = ModelConfig(vocab_size=32, dim=16, n_layers=2, n_heads=2, n_kv_heads=1, hidden_dim=32, max_seq_len=32)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_comes_back_bit_for_bit(tmp_path, tied):
    model = Transformer(replace(OWN, tied=tied))
    save_model(tmp_path, model)
    loaded, tokens = load(tmp_path), torch.randint(32, (2, 9))
    assert loaded.config == model.config
    assert torch.equal(loaded(tokens), model(tokens))
    assert (loaded.head.weight is loaded.embed.weight) == tied
    half = load(tmp_path, dtype=torch.bfloat16)
    assert half.embed.weight.dtype == torch.bfloat16


def edit_own(tmp_path, **changes):
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    stored["model"].update(changes)
    path.write_text(json.dumps(stored))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: (p / "config.json").unlink(), r"config\.json: no such file"),
        (lambda p: (p / "config.json").write_text("{"), r"config\.json: not JSON"),
        (lambda p: (p / "config.json").write_text('{"format": "minillm"}'), "not a minillm model"),
        (lambda p: (p / "config.json").write_text('{"model_type": "llama"}'), "no 'num_attention_heads'"),
        (lambda p: edit_own(p, dim=32), r"'embed.weight' has shape \(32, 16\), config.json says \(32, 32\)"),
        (lambda p: edit_own(p, n_layers=3), r"tensor 'blocks.2.* is missing"),
        (lambda p: edit_own(p, n_layers=1), r"unknown tensor 'blocks.1"),
        (lambda p: edit_own(p, dim=-1), "dim must be"),
        (lambda p: edit_own(p, nonsense=1), "nonsense"),
        (lambda p: (p / "model.safetensors").unlink(), r"model\.safetensors: no such file"),
        (
            lambda p: (p / "model.safetensors").write_bytes(b"\x80\x02}q\x00."),
            r"not a complete safetensors file",
        ),
    ],
)
def test_a_wrong_model_folder_is_one_clear_error(tmp_path, spoil, message):
    save_model(tmp_path, Transformer(OWN))
    spoil(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


# Wrong and hostile folders.


def test_quantized_weights_without_scale_or_of_a_wrong_size(tmp_path):
    stored = quantized(random_weights(CHATGLM2), 4, "chatglm")
    name = "transformer.encoder.layers.1.self_attention.dense.weight"
    without = {key: value for key, value in stored.items() if key != name + "_scale"}
    with pytest.raises(CheckpointError, match=f"'{name}' is torch.int8, and has no weight_scale"):
        load(write_folder(tmp_path / "a", without, CHATGLM2))
    wrong = {**stored, name: stored[name][:, :-1].contiguous()}
    with pytest.raises(CheckpointError, match=f"'{name}': torch.int8 of shape .* is neither 8 nor 4 bits"):
        load(write_folder(tmp_path / "b", wrong, CHATGLM2))
    wrong = {**stored, name + "_scale": stored[name + "_scale"][:-1].contiguous()}
    with pytest.raises(
        CheckpointError, match=f"'{name}': \\(47,\\) scales of torch.float32 for shape \\(48, 48\\)"
    ):
        load(write_folder(tmp_path / "c", wrong, CHATGLM2))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def edit(folder, **changes):
    settings = json.loads((folder / "config.json").read_text())
    settings = {key: value for key, value in {**settings, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(settings))


def reindex(folder, **changes):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= changes
    path.write_text(json.dumps(index))


def header(folder, change):
    path = folder / "model-00002-of-00003.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length])
    change(entries[next(key for key in entries if key != "__metadata__")])
    new = json.dumps(entries).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])


def retensor(folder, change):
    path = folder / "model-00001-of-00003.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def outside(folder):
    shutil.copy(folder / "model-00001-of-00003.safetensors", folder.parent / "outside.safetensors")


def link(folder, target):
    path = folder / "model-00001-of-00003.safetensors"
    path.unlink()
    path.symlink_to(target)


def cut(folder, keep):
    path = folder / "model-00003-of-00003.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)] if keep < 1 else data[: int(keep)])


FAULTS = {
    "no folder": (lambda f: shutil.rmtree(f), "no such folder"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "config is not JSON": (lambda f: (f / "config.json").write_text("{'a': 1}"), "config.json: not JSON"),
    "config is nested without end": (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json: not JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), "config.json: not a JSON object but list"),
    "config is not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json: not JSON"),
    "config is huge": (lambda f: (f / "config.json").write_text(" " * (1 << 21)), "larger than 1,048,576 bytes"),
    "unknown architecture": (lambda f: edit(f, model_type="gpt2"), "unknown architecture: model_type 'gpt2'"),
    "no architecture": (lambda f: edit(f, model_type=...), "unknown architecture: model_type ''"),
    "a key is missing": (lambda f: edit(f, hidden_size=...), "config.json: no 'hidden_size'"),
    "a size is text": (lambda f: edit(f, hidden_size="48"), "hidden_size must be a whole number, not negative, got '48'"),
    "a size is negative": (lambda f: edit(f, num_hidden_layers=-1), "num_hidden_layers must be a whole number"),
    "heads do not divide": (lambda f: edit(f, num_attention_heads=7, num_key_value_heads=7), "dim must be a multiple of n_heads"),
    "eps is infinite": (lambda f: edit(f, rms_norm_eps=float("inf")), "rms_norm_eps must be a finite number above 0"),
    "another activation": (lambda f: edit(f, hidden_act="gelu"), "hidden_act is 'gelu'; only 'silu' is supported"),
    "another scaling": (lambda f: edit(f, rope_scaling={"rope_type": "yarn", "factor": 2.0}), "rope scaling 'yarn'"),
    "scaling is a number": (lambda f: edit(f, rope_scaling=3), "config.json: "),
    "a width of heads": (lambda f: edit(f, head_dim=16), "head_dim is 16; only 8 is supported"),
    "absurd layers": (lambda f: edit(f, num_hidden_layers=10**9), "1,000,000,000 layers"),
    "absurd width": (lambda f: edit(f, hidden_size=6 << 40), "the files hold"),
    "absurd vocabulary": (lambda f: edit(f, vocab_size=10**15), "the files hold"),
    "absurd hidden": (lambda f: edit(f, intermediate_size=10**30), "the files hold"),
    "one layer more": (lambda f: edit(f, num_hidden_layers=4), "tensor 'model.layers.3.self_attn.q_proj.weight' is missing"),
    "one layer less": (lambda f: edit(f, num_hidden_layers=2), "unknown tensor 'model.layers.2"),
    "another width": (lambda f: edit(f, hidden_size=36), r"'model.embed_tokens.weight' has shape \(61, 48\), config.json says \(61, 36\)"),
    "no weights": (lambda f: (f / "model.safetensors.index.json").unlink(), "no weights: neither model.safetensors"),
    "index is not JSON": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "index.json: not JSON"),
    "index without map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "no 'weight_map'"),
    "index maps to a number": (lambda f: reindex(f, **{"lm_head.weight": 3}), "no 'weight_map' from tensors to files"),
    "missing shard": (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), "model-00002-of-00003.safetensors: no such file"),
    "index points up": (lambda f: (outside(f), reindex(f, x="../outside.safetensors")), "'../outside.safetensors' is not the name of a file"),
    "index points away": (lambda f: reindex(f, x="/etc/passwd"), "'/etc/passwd' is not the name of a file"),
    "index points into a folder": (lambda f: reindex(f, x="sub/x.safetensors"), "is not the name of a file"),
    "index names nothing": (lambda f: reindex(f, x=""), "'' is not the name of a file"),
    "index names the folder": (lambda f: reindex(f, x=".."), "'..' is not the name of a file"),
    "index promises too much": (lambda f: reindex(f, x="model-00001-of-00003.safetensors"), "'x' is missing, which"),
    "a link leads out": (lambda f: (outside(f), link(f, f.parent / "outside.safetensors")), "a link out of the folder"),
    "a link leads to a device": (lambda f: link(f, "/dev/zero"), "a link out of the folder"),
    "a link to itself": (lambda f: link(f, f / "model-00001-of-00003.safetensors"), "model-00001-of-00003.safetensors: "),
    "config is a link out": (lambda f: (shutil.move(f / "config.json", f.parent / "c"), (f / "config.json").symlink_to(f.parent / "c")), "config.json: a link out"),
    "a shard is a folder": (lambda f: ((f / "model-00001-of-00003.safetensors").unlink(), (f / "model-00001-of-00003.safetensors").mkdir()), "not a regular file"),
    "a shard is a pipe": (lambda f: ((f / "model-00001-of-00003.safetensors").unlink(), os.mkfifo(f / "model-00001-of-00003.safetensors")), "not a regular file"),
    "a shard is empty": (lambda f: cut(f, 0), "not a complete safetensors file .*header too small"),
    "a shard ends in its header": (lambda f: cut(f, 100), "not a complete safetensors file .*invalid header length"),
    "a shard ends in its data": (lambda f: cut(f, 0.9), "not a complete safetensors file .*file not fully covered"),
    "a header that is no JSON": (lambda f: (f / "model-00001-of-00003.safetensors").write_bytes((10).to_bytes(8, "little") + b"x" * 10), "not a complete safetensors file .*invalid JSON in header"),
    "a header that claims much": (lambda f: (f / "model-00001-of-00003.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}" * 10), "not a complete safetensors file .*header too large"),
    "a header of a list": (lambda f: (f / "model-00001-of-00003.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]"), "not a complete safetensors file .*invalid JSON in header: invalid type: sequence"),
    "a header with an odd type": (lambda f: header(f, lambda e: e.update(dtype="F8_E4M3")), "not a complete safetensors file .*invalid shape, data type, or offset"),
    "a header with a negative size": (lambda f: header(f, lambda e: e.update(shape=[-61, -48])), "not a complete safetensors file .*invalid value: integer `-61`"),
    "a header with a wrong size": (lambda f: header(f, lambda e: e.update(shape=[10**9, 10**9])), "not a complete safetensors file .*overflow computing buffer size"),
    "a header that points behind the file": (lambda f: header(f, lambda e: e.update(data_offsets=[n + (1 << 40) for n in e["data_offsets"]])), "not a complete safetensors file .*invalid offset for tensor `"),
    "a header whose tensors overlap": (lambda f: header(f, lambda e: e.update(data_offsets=[n + 4 for n in e["data_offsets"]])), "not a complete safetensors file .*invalid offset for tensor `"),
    "a header of an exotic type": (lambda f: retensor(f, lambda t: t.update({"model.embed_tokens.weight": torch.ones(61, 48, dtype=torch.float8_e4m3fn)})), "is torch.float8_e4m3fn, which is not supported"),
    "an unknown tensor": (lambda f: retensor(f, lambda t: t.update(extra=torch.ones(2))), "unknown tensor 'extra'"),
    "a tensor twice": (lambda f: retensor(f, lambda t: t.update({"model.norm.weight": torch.ones(48)})), "is in model-0000"),
    "a tensor of whole numbers": (lambda f: retensor(f, lambda t: t.update({"model.embed_tokens.weight": torch.ones(61, 48, dtype=torch.int64)})), "is torch.int64, and has no weight_scale"),
    "a tensor of a wrong shape": (lambda f: retensor(f, lambda t: t.update({"model.embed_tokens.weight": torch.ones(61, 47)})), r"has shape \(61, 47\)"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), FAULTS.values(), ids=FAULTS)
def test_a_wrong_folder_is_one_clear_error(damage, message, tmp_path):
    folder = write_folder(tmp_path / "model", random_weights(LLAMA), LLAMA, n_shards=3)
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def zipped(path, names):
    with zipfile.ZipFile(path) as old:
        content = {info.filename: old.read(info) for info in old.infolist()}
    names(content)
    with zipfile.ZipFile(path, "w") as new:
        for name, data in content.items():
            new.writestr(name, data)


def deflated(path):
    with zipfile.ZipFile(path) as old:
        content = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in content.items():
            new.writestr(name, data)


def program(content):
    return next(name for name in content if name.endswith("data.pkl"))


def stretched(f):
    torch.save({"model.embed_tokens.weight": torch.zeros(1).expand(10**6, 10**6)}, f / "pytorch_model.bin")
    edit(f, vocab_size=10**6, hidden_size=6 * 10**6)


BIN_FAULTS = {
    "code": (lambda f: torch.save({"x": Bomb(f.parent / "ran")}, f / "pytorch_model.bin"), r"its pickle calls (posix|nt)\.system"),
    "code in the old format": (lambda f: (f / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(f.parent / "ran"))), "no file of torch 1.6"),
    "code of a later protocol": (lambda f: torch.save({"x": Bomb(f.parent / "ran")}, f / "pytorch_model.bin", pickle_protocol=4), "its pickle calls STACK_GLOBAL"),
    "a class of torch": (lambda f: torch.save(nn.Linear(2, 2), f / "pytorch_model.bin"), "its pickle calls torch.nn"),
    "eval": (lambda f: zipped(f / "pytorch_model.bin", lambda c: c.update({program(c): b"c__builtin__\neval\n(V1\ntR."})), "calls __builtin__.eval"),
    "memory": (lambda f: zipped(f / "pytorch_model.bin", lambda c: c.update({program(c): b"c__builtin__\nbytearray\n(L1000000000000L\ntR."})), "calls __builtin__.bytearray"),
    "truncated": (lambda f: (f / "pytorch_model.bin").write_bytes((f / "pytorch_model.bin").read_bytes()[:-3000]), "truncated"),
    "empty": (lambda f: (f / "pytorch_model.bin").write_bytes(b""), "truncated"),
    "a pickle cut short": (lambda f: zipped(f / "pytorch_model.bin", lambda c: c.update({program(c): c[program(c)][:-200]})), "pytorch_model.bin: damaged"),
    "a storage is missing": (lambda f: zipped(f / "pytorch_model.bin", lambda c: c.pop(next(n for n in c if "/data/" in n))), "pytorch_model.bin: damaged"),
    "compressed": (lambda f: deflated(f / "pytorch_model.bin"), "compressed"),
    "a zip of something": (lambda f: zipped(f / "pytorch_model.bin", lambda c: c.clear()), "not a file of tensors"),
    "a list": (lambda f: torch.save([torch.ones(2)], f / "pytorch_model.bin"), "holds list, not named tensors"),
    "a number": (lambda f: torch.save({"x": 3}, f / "pytorch_model.bin"), "'x' is int, not a plain tensor"),
    "a tensor without numbers": (stretched, "the files hold"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), BIN_FAULTS.values(), ids=BIN_FAULTS)
def test_a_wrong_bin_file_is_one_clear_error_and_runs_nothing(damage, message, tmp_path):
    folder = write_folder(tmp_path / "model", random_weights(LLAMA), LLAMA, "bin")
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_the_links_of_a_hugging_face_cache_are_followed(tmp_path):
    snapshot = write_folder(tmp_path / "hub" / "snapshots" / "abc", random_weights(LLAMA), LLAMA)
    blobs = tmp_path / "hub" / "blobs"
    blobs.mkdir()
    for file in list(snapshot.iterdir()):
        shutil.move(file, blobs / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    assert load(snapshot).config.dim == 48


def test_the_weights_survive_the_folder(tmp_path):
    weights = random_weights(LLAMA)
    model = load(write_folder(tmp_path / "m", weights, LLAMA))
    shutil.rmtree(tmp_path / "m")
    assert torch.equal(model.head.weight, weights["lm_head.weight"])
    model.head.weight.zero_()  # writing changes no file, and works


MEASURE = """
import json, sys, torch
from pathlib import Path
from minillm.hub import ModelFolder
def peak():
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
from minillm.transformer import ModelConfig, Transformer
Transformer(ModelConfig(vocab_size=8, dim=8, n_layers=1, n_heads=1, n_kv_heads=1, hidden_dim=8, max_seq_len=8))(torch.zeros(1, 2, dtype=torch.long))
before = peak()
model = ModelFolder.open(sys.argv[1]).model(dtype=getattr(torch, sys.argv[2]))
total = sum(w.sum().item() for w in model.parameters())  # touch every page
print(json.dumps({"bytes": sum(w.nbytes for w in model.parameters()), "peak": peak() - before}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(("kind", "stored", "dtype"), [
    ("safetensors", "float32", "float32"), ("bin", "float32", "float32"),
    ("safetensors", "float16", "float32"), ("bin", "float16", "float32"),
])  # fmt: skip
def test_peak_memory_is_one_copy_of_the_weights(kind, stored, dtype, tmp_path):
    settings = {**CHATGLM, "hidden_size": 768, "inner_hidden_size": 3072, "vocab_size": 4000, "num_layers": 4}
    weights = {
        name: torch.full(w.shape, 0.01, dtype=getattr(torch, stored)) for name, w in big_shapes(settings)
    }
    folder = write_folder(tmp_path / "m", weights, settings, kind)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, dtype], capture_output=True, text=True, check=True
    )
    measured = json.loads(done.stdout)
    assert measured["bytes"] > 130e6
    assert measured["peak"] < 1.1 * measured["bytes"], measured["peak"] / measured["bytes"]


def big_shapes(settings):
    for name, shape in shapes(settings):
        yield name, torch.empty(shape, device="meta")


# Tokenizers.

TEXT = [
    "the cat sat on the mat",
    "a dog ran to the red house",
    "今天天气很好",
    "我们去公园玩",
    "hello world 2025",
    "红色的房子",
] * 40


def sentencepiece_model(path, **options):
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "byte_fallback": True,
        "vocab_size": 330,
        "character_coverage": 1.0,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, **{**settings, **options}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def test_llama_begins_with_bos_and_chats_in_brackets(tmp_path):
    plain = sentencepiece_model(tmp_path / "tokenizer.model", split_digits=True)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    tokenizer = ModelFolder.open(tmp_path).tokenizer()
    assert tokenizer.encode("the cat 2025") == [1, *plain.encode("the cat 2025")]
    assert tokenizer.decode(tokenizer.encode("the cat 2025")) == "the cat 2025"
    assert tokenizer.eos_id == 2
    first = plain.encode("[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nhello [/INST] the cat ")
    assert tokenizer.chat("a dog", [("hello", "the cat")], system="Be kind.") == [
        1, *first, 2, 1, *plain.encode("[INST] a dog [/INST]"),
    ]  # fmt: skip


def test_baichuan_adds_nothing_and_marks_turns_by_two_ids(tmp_path):
    plain = sentencepiece_model(
        tmp_path / "tokenizer.model", split_digits=True, normalization_rule_name="nmt_nfkc"
    )
    (tmp_path / "config.json").write_text(json.dumps(BAICHUAN_13B))
    tokenizer = ModelFolder.open(tmp_path).tokenizer()
    assert tokenizer.encode("今天 2025") == plain.encode("今天 2025")
    assert tokenizer.chat("a dog", [("hello", "the cat")]) == [
        195, *plain.encode("hello"), 196, *plain.encode("the cat"), 195, *plain.encode("a dog"), 196,
    ]  # fmt: skip
    (tmp_path / "generation_config.json").write_text('{"user_token_id": 7, "assistant_token_id": 8}')
    assert ModelFolder.open(tmp_path).tokenizer().chat("a")[0::100] == [7]
    with pytest.raises(ValueError, match="baichuan has no place for a system text"):
        tokenizer.chat("a", system="b")


def test_chatglm2_begins_with_gmask_and_sop(tmp_path):
    plain = sentencepiece_model(tmp_path / "tokenizer.model")
    (tmp_path / "config.json").write_text(json.dumps(CHATGLM2))
    tokenizer = ModelFolder.open(tmp_path).tokenizer()
    n = plain.vocab_size()
    assert tokenizer.special_ids == {
        "[MASK]": n,
        "[gMASK]": n + 1,
        "[sMASK]": n + 2,
        "sop": n + 3,
        "eop": n + 4,
    }
    assert tokenizer.encode("the cat") == [n + 1, n + 3, *plain.encode("the cat")]
    assert tokenizer.decode(tokenizer.encode("the cat")) == "the cat"
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (2, 0, n + 5)
    text = "[Round 1]\n\n问：hello\n\n答：the cat\n\n[Round 2]\n\n问：a dog\n\n答："
    assert chatglm_prompt("a dog", [("hello", "the cat")], second=True) == text
    assert tokenizer.chat("a dog", [("hello", "the cat")]) == tokenizer.encode(text)


@pytest.mark.parametrize("offset", [0, 1000])
def test_chatglm_writes_white_space_as_pieces_and_ends_with_gmask_and_sop(offset, tmp_path):
    pieces = [
        "[MASK]",
        "[gMASK]",
        "[sMASK]",
        "<sop>",
        "<eop>",
        "<n>",
        "<|tab|>",
        *(f"<|blank_{i}|>" for i in range(2, 81)),
    ]
    plain = sentencepiece_model(
        tmp_path / "ice_text.model",
        model_type="unigram",
        user_defined_symbols=pieces,
        vocab_size=380,
        split_by_whitespace=True,
    )
    ids = {
        "gmask_token_id": plain.piece_to_id("[gMASK]") + offset,
        "bos_token_id": plain.piece_to_id("<sop>") + offset,
    }
    ids["eos_token_id"] = plain.piece_to_id("<eop>") + offset
    (tmp_path / "config.json").write_text(json.dumps({**CHATGLM, **ids}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"num_image_tokens": offset}))
    tokenizer = ModelFolder.open(tmp_path).tokenizer()
    text = "the cat\n\tsat" + " " * 5 + "on" + " " * 83 + "mat"
    assert glm_text(text) == "the cat<n><|tab|>sat<|blank_5|>on<|blank_80|><|blank_3|>mat"
    assert glm_plain(glm_text(text)) == text
    encoded = tokenizer.encode(text)
    assert encoded[-2:] == [ids["gmask_token_id"], ids["bos_token_id"]]
    assert [i - offset for i in encoded[:-2]] == plain.encode(glm_text(text))
    assert tokenizer.decode(encoded) == text
    assert (tokenizer.eos_id, tokenizer.pad_id) == (ids["eos_token_id"], 3)
    assert chatglm_prompt("b", [("a", "x")]) == "[Round 0]\n问：a\n答：x\n[Round 1]\n问：b\n答："


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(TokenizerError, match="neither tokenizer.model nor ice_text.model"):
        ModelFolder.open(tmp_path).tokenizer()
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        ModelFolder.open(tmp_path).tokenizer()


# The command line.


@pytest.fixture
def hf(tmp_path):
    plain = sentencepiece_model(tmp_path / "hf" / "tokenizer.model", split_digits=True)
    settings = {**LLAMA, "vocab_size": plain.vocab_size(), "max_position_embeddings": 64}
    write_folder(tmp_path / "hf", random_weights(settings), settings)
    return tmp_path / "hf"


def test_generate_reads_a_published_folder(hf, capsys):
    command = [
        "generate",
        "the cat",
        "--model",
        str(hf),
        "--max-new-tokens",
        "8",
        "--temperature",
        "0",
        "--device",
        "cpu",
    ]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.startswith("the cat")
    model, tokenizer = load_run(hf)
    new = generate(
        model, [tokenizer.encode("the cat")], max_new_tokens=8, sampler=Sampler.greedy(), eos_id=2
    )[0]
    assert tokenizer.decode(tokenizer.encode("the cat") + new).split() == said.split()


def test_convert_goes_both_ways_and_changes_nothing(hf, tmp_path, capsys):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert main(["convert", str(hf), str(ours)]) == 0
    assert json.loads((ours / "config.json").read_text())["format"] == "minillm"
    assert main(["convert", str(ours), str(theirs)]) == 0
    before, after = load_file(hf / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    capsys.readouterr()
    texts = []
    for folder in (hf, ours, theirs):
        assert (
            main(
                [
                    "generate",
                    "a dog",
                    "--model",
                    str(folder),
                    "--max-new-tokens",
                    "6",
                    "--temperature",
                    "0",
                    "--device",
                    "cpu",
                ]
            )
            == 0
        )
        texts.append(capsys.readouterr().out)
    assert len(set(texts)) == 1
    assert main(["convert", str(ours), str(theirs)]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_convert_keeps_what_chatglm_needs(tmp_path):
    pieces = [
        "[MASK]",
        "[gMASK]",
        "[sMASK]",
        "<sop>",
        "<eop>",
        "<n>",
        "<|tab|>",
        *(f"<|blank_{i}|>" for i in range(2, 81)),
    ]
    plain = sentencepiece_model(
        tmp_path / "hf" / "ice_text.model", model_type="unigram", user_defined_symbols=pieces, vocab_size=380
    )
    ids = {key: plain.piece_to_id(p) for key, p in (
        ("mask_token_id", "[MASK]"), ("gmask_token_id", "[gMASK]"), ("bos_token_id", "<sop>"), ("eos_token_id", "<eop>"),
    )}  # fmt: skip
    settings = {**CHATGLM, **ids, "vocab_size": 390}
    write_folder(tmp_path / "hf", random_weights(settings), settings)
    ModelFolder.open(tmp_path / "hf").convert(tmp_path / "ours")
    for folder in ("hf", "ours"):
        model, tokenizer = load_run(tmp_path / folder)
        tokens = torch.tensor([tokenizer.encode("the cat\nsat")])
        assert tokenizer.eos_id == ids["eos_token_id"]
        logits = model(tokens)
        if folder == "hf":
            expected = logits
    assert torch.equal(logits, expected)


def test_a_model_of_ours_with_its_own_vocabulary_becomes_a_published_one(tmp_path):
    tokenizer = train_bpe(TEXT, 300)
    config = replace(read_llama(LLAMA), vocab_size=300, tied=True)
    save_model(tmp_path / "run" / "model", Transformer(config))
    tokenizer.save(tmp_path / "run" / "model")
    out = ModelFolder.open(tmp_path / "run").convert(tmp_path / "out")
    model, again = out.model(), out.tokenizer()
    assert model.config == config
    assert again.encode("the cat") == tokenizer.encode("the cat")
    assert not isinstance(again, SentencePieceTokenizer)


def test_info_knows_the_zoo_and_published_folders(hf, capsys):
    assert main(["info", "llama2-70b"]) == 0
    said = capsys.readouterr().out
    assert "llama2-70b: 68,976,648,192 parameters" in said
    assert "KV cache" in said
    assert "GFLOP" in said
    assert main(["info", str(hf)]) == 0
    assert f"{hf}: " in capsys.readouterr().out
    assert main(["info", "llama3"]) == 2
    error = capsys.readouterr().err
    assert "tiny" in error
    assert "baichuan2-13b" in error
