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
    BAICHUAN_7B,
    BAICHUAN_13B,
    CHATGLM,
    CHATGLM2,
    LLAMA,
    glm_peer,
    llama_peer,
    quantized,
    random_weights,
    to_meta,
    write_folder,
)
from references import baichuan_reference, chatglm_reference
from safetensors.torch import load_file, save_file
from tolerances import LOGITS
from torch import nn
from torch.nn import functional as F

from minillm import zoo
from minillm.base.errors import CheckpointError
from minillm.check import laws
from minillm.cli import main
from minillm.generate import Sampler, generate
from minillm.hub import tokenizers
from minillm.hub.own import save_model
from minillm.tokenizer import SentencePieceTokenizer, TokenizerError, train_bpe
from minillm.transformer import ModelConfig, PromptLayout, Transformer, count_parameters

PUBLISHED = {
    "chatglm-6b": 6_707_929_088, "chatglm2-6b": 6_243_584_000, "chatglm2-6b-32k": 6_243_584_000,
    "llama-7b": 6_738_415_616, "llama-13b": 13_015_864_320, "llama-33b": 32_528_943_616, "llama-65b": 65_285_660_672,
    "llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320, "llama2-70b": 68_976_648_192,
    "baichuan-7b": 7_000_559_616, "baichuan-13b": 13_264_901_120,
    "baichuan2-7b": 7_505_973_248, "baichuan2-13b": 13_896_668_160,
}  # fmt: skip
ODD = {"hidden_size": 40, "num_attention_heads": 5}
PEERS = {
    "llama": (LLAMA, llama_peer),
    "llama, grouped": ({**LLAMA, "num_key_value_heads": 2}, llama_peer),
    "llama, odd heads": ({**LLAMA, **ODD, "num_key_value_heads": 5}, llama_peer),
    "llama, tied": ({**LLAMA, "tie_word_embeddings": True}, llama_peer),
    "llama, biases": ({**LLAMA, "attention_bias": True, "mlp_bias": True}, llama_peer),
    "llama, another eps": ({**LLAMA, "rms_norm_eps": 1e-2}, llama_peer),
    "llama, interpolated": ({**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, llama_peer),
    "baichuan-7b": (BAICHUAN_7B, llama_peer),
    "baichuan-7b, odd heads": ({**BAICHUAN_7B, **ODD}, llama_peer),
    "chatglm2": (CHATGLM2, glm_peer),
    "chatglm2, tied": ({**CHATGLM2, "tie_word_embeddings": True}, glm_peer),
    "chatglm2, odd groups": ({**CHATGLM2, "multi_query_group_num": 3}, glm_peer),
    "chatglm2-32k": ({**CHATGLM2, "rope_ratio": 16}, glm_peer),
}
peers = pytest.mark.parametrize(("settings", "peer"), PEERS.values(), ids=PEERS)
FAMILIES = {
    "llama": LLAMA, "baichuan-7b": BAICHUAN_7B, "baichuan-13b": BAICHUAN_13B, "chatglm": CHATGLM, "chatglm2": CHATGLM2,
}  # fmt: skip
families = pytest.mark.parametrize("settings", FAMILIES.values(), ids=FAMILIES)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
GMASK_PROMPT, MASK_PROMPT = [5, 6, 7, 51, 54, 8, 9, 10], [5, 50, 7, 6, 54, 8, 9, 10, 11]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def exact_norms(monkeypatch):
    """transformers norms in float32 even in a float64 model; torch's own kernel does not."""
    from transformers.models.glm import modeling_glm
    from transformers.models.llama import modeling_llama

    def forward(self, x):
        return F.rms_norm(x, (x.shape[-1],), self.weight, self.variance_epsilon)

    monkeypatch.setattr(modeling_glm.GlmRMSNorm, "forward", forward)
    monkeypatch.setattr(modeling_llama.LlamaRMSNorm, "forward", forward)


def weights_for(settings, dtype=torch.float32):
    tied = settings.get("tie_word_embeddings", False)
    weights = random_weights(settings, dtype, tied)
    d = settings["hidden_size"]
    for name in list(weights):
        if settings.get("attention_bias") and name.endswith(
            ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
        ):
            weights[name.replace("weight", "bias")] = torch.randn(weights[name].shape[0], dtype=dtype)
        if settings.get("mlp_bias") and ".mlp." in name:
            weights[name.replace("weight", "bias")] = torch.randn(weights[name].shape[0], dtype=dtype)
    assert d
    return weights


def prompts(settings, batch=2, length=12):
    """Tokens that suit a family: ChatGLM-6B's have gMASK and sop."""
    tokens = torch.randint(3, 50, (batch, length))
    if settings is CHATGLM:
        tokens[:, length // 2] = 51
        tokens[:, length // 2 + 1] = 54
    return tokens


def apart(a, b):
    assert a.shape == b.shape
    return (a - b).abs().max().item()


# Configurations.


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_parameters_are_as_published(name, parameters):
    config = zoo.config(name)
    assert count_parameters(config).total == parameters
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(weight.numel() for weight in model.parameters()) == parameters


def test_configurations_follow_the_specification():
    assert set(zoo.MODELS) == set(PUBLISHED)
    assert count_parameters(replace(zoo.config("chatglm-6b"), tied=True)).total == 6_173_286_400
    assert zoo.config("chatglm-6b").glm_ids == (130000, 130001, 130004)
    assert isinstance(Transformer(replace(zoo.config("chatglm-6b"), **SMALL_GLM)).layout, PromptLayout)
    assert (zoo.config("chatglm2-6b").rope_scale, zoo.config("chatglm2-6b-32k").rope_scale) == (1, 16)
    assert {zoo.config(n).norm_eps for n in ("llama-7b", "llama-13b", "llama-33b", "baichuan2-13b")} == {1e-6}
    assert {zoo.config(n).norm_eps for n in ("llama-65b", "llama2-7b", "chatglm2-6b", "chatglm-6b")} == {1e-5}
    assert {n for n in PUBLISHED if zoo.config(n).position == "alibi"} == {"baichuan-13b", "baichuan2-13b"}
    assert {n for n in PUBLISHED if zoo.config(n).norm_head} == {"baichuan2-7b", "baichuan2-13b"}
    assert {n: c.n_kv_heads for n, c in zoo.MODELS.items() if c.n_kv_heads != c.n_heads} == {
        "chatglm2-6b": 2, "chatglm2-6b-32k": 2, "llama2-70b": 8,
    }  # fmt: skip
    lengths = {n: c.max_seq_len for n, c in zoo.MODELS.items()}
    assert {n for n in lengths if lengths[n] == 4096} == {
        n for n in PUBLISHED if "llama2" in n or "baichuan" in n
    }
    with pytest.raises(ValueError, match=r"no model 'llama3-8b'; there are chatglm-6b, .*baichuan2-13b"):
        zoo.config("llama3-8b")


SMALL_GLM = {"dim": 16, "n_heads": 2, "n_kv_heads": 2, "n_layers": 1, "hidden_dim": 16}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_shape_survives_its_family_s_config(name):
    config = zoo.config(name)
    family = zoo.family_of(config)
    assert family.read(json.loads(json.dumps(family.write(config)))) == config


# Equal logits.


@peers
@both_dtypes
def test_logits_equal_transformers(settings, peer, dtype, tmp_path, exact_norms):
    weights = weights_for(settings, dtype)
    model = published.load_checkpoint(write_folder(tmp_path / "m", weights, settings))
    tokens = torch.randint(61, (2, 70))  # more than twice the context
    logits = model(tokens)
    assert logits.dtype == dtype
    assert apart(logits, peer(weights, settings, dtype)(tokens).logits) < LOGITS[dtype]


@peers
def test_left_padded_logits_equal_transformers(settings, peer, tmp_path):
    weights = weights_for(settings)
    model = published.load_checkpoint(write_folder(tmp_path / "m", weights, settings))
    tokens = torch.randint(3, 61, (3, 12))
    real = torch.arange(12) >= torch.tensor([0, 3, 7])[:, None]
    tokens[~real] = 0
    expected = peer(weights, settings, torch.float32)(tokens, attention_mask=real.long()).logits
    for mask in (real, real.long()):
        assert apart(model(tokens, attention_mask=mask)[real], expected[real]) < LOGITS[torch.float32]


@both_dtypes
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("heads", [6, 5])
def test_chatglm_equals_the_slow_reference(heads, tied, dtype, tmp_path):
    settings = {**CHATGLM, "num_attention_heads": heads, "hidden_size": 8 * heads}
    weights = random_weights(settings, dtype, tied)
    model = published.load_checkpoint(write_folder(tmp_path / "m", weights, settings, "bin"))
    assert model.config.tied == tied
    full = {"lm_head.weight": weights["transformer.word_embeddings.weight"], **weights}
    for prompt in (GMASK_PROMPT, MASK_PROMPT, [5, 50, 7, 51, 20, 54, 8]):
        logits = model(torch.tensor([prompt]))[0]
        assert apart(logits, chatglm_reference(full, settings, prompt)) < LOGITS[dtype]


@both_dtypes
@pytest.mark.parametrize("norm_head", [False, True])
@pytest.mark.parametrize("heads", [5, 12])
def test_baichuan_13b_equals_the_slow_reference(heads, norm_head, dtype, tmp_path):
    settings = {**BAICHUAN_13B, "num_attention_heads": heads, "hidden_size": 4 * heads}
    weights, tokens = random_weights(settings, dtype), list(range(3, 15))
    folder = write_folder(tmp_path / "m", weights, settings)
    model = published.load_checkpoint(folder, norm_head=norm_head)
    assert (
        apart(model(torch.tensor([tokens]))[0], baichuan_reference(weights, settings, tokens, norm_head))
        < LOGITS[dtype]
    )


def test_the_vocabulary_of_baichuan2_norms_its_head_and_the_argument_overrules(tmp_path):
    settings = {
        **BAICHUAN_13B,
        "vocab_size": 125696,
        "hidden_size": 6,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
    }
    folder = write_folder(tmp_path / "m", random_weights(settings), settings)
    assert published.load_checkpoint(folder).config.norm_head
    assert not published.load_checkpoint(folder, norm_head=False).config.norm_head
    assert not published.load_checkpoint(
        write_folder(tmp_path / "n", random_weights(BAICHUAN_13B), BAICHUAN_13B)
    ).config.norm_head


@families
def test_left_padding_changes_nothing(settings, tmp_path):
    model = published.load_checkpoint(write_folder(tmp_path / "m", random_weights(settings), settings))
    tokens = prompts(settings, 1)
    padded = F.pad(tokens, (4, 0), value=3)
    mask = torch.arange(16)[None] >= 4
    assert apart(model(padded, attention_mask=mask)[:, 4:], model(tokens)) < LOGITS[torch.float32]


@families
@both_dtypes
def test_decoding_with_a_cache_equals_reading_at_once(settings, dtype, tmp_path):
    model = published.load_checkpoint(write_folder(tmp_path / "m", random_weights(settings, dtype), settings))
    tokens = prompts(settings, 2, 12)
    padded = F.pad(tokens, (3, 0), value=3)
    mask = torch.ones(2, 15, dtype=torch.bool)
    mask[1, :3] = False
    if settings is CHATGLM:  # another place of sop in each row
        padded[0] = torch.tensor([5, 51, 54, *range(10, 22)])
        mask[0] = True
    else:
        mask[0, :3] = False
    full = model(padded, attention_mask=mask)
    cache = model.make_cache(2, 15)
    steps = [model(padded[:, :11], attention_mask=mask[:, :11], cache=cache)]
    for t in range(11, 15):
        steps.append(model(padded[:, t : t + 1], attention_mask=mask[:, : t + 1], cache=cache))
    assert apart(torch.cat(steps, 1)[mask], full[mask]) < LOGITS[dtype]


def test_chatglm_positions_follow_the_specification():
    layout = PromptLayout(50, 51, 54)

    def positions(rows, pad=0):
        tokens = torch.tensor(rows)
        mask = zoo_mask(tokens, pad)
        return layout(tokens, mask)[1].tolist()

    assert positions([GMASK_PROMPT]) == [[[0, 1, 2, 3, 3, 3, 3, 3], [0, 0, 0, 0, 1, 2, 3, 4]]]
    assert positions([MASK_PROMPT]) == [[[0, 1, 2, 3, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 2, 3, 4, 5]]]
    padded = [[3, 3, *GMASK_PROMPT]]
    assert positions(padded, 2) == [[[0, 0, 0, 1, 2, 3, 3, 3, 3, 3], [0, 0, 0, 0, 0, 0, 1, 2, 3, 4]]]


def zoo_mask(tokens, pad):
    from minillm.attention import Mask

    return Mask(keys=(torch.arange(tokens.shape[1]) >= pad).expand(len(tokens), -1)) if pad else Mask()


def test_chatglm_says_what_a_prompt_lacks(tmp_path):
    model = published.load_checkpoint(write_folder(tmp_path / "m", random_weights(CHATGLM), CHATGLM))
    with pytest.raises(ValueError, match=r"row 1 has no sop \(id 54\)"):
        model(torch.tensor([[5, 51, 54, 6], [5, 51, 7, 6]]))
    with pytest.raises(ValueError, match=r"row 0 has no gMASK or MASK \(51, 50\)"):
        model(torch.tensor([[5, 6, 54, 6]]))
    cache = model.make_cache(1, 8)
    cache.length = 4
    with pytest.raises(ValueError, match="not filled through this layout"):
        model(torch.tensor([[5]]), cache=cache)


@pytest.mark.parametrize(
    "change",
    [
        {"glm_ids": (1, 2)}, {"glm_ids": (1, 2, 61)}, {"glm_ids": (1, 2, -3)}, {"position": "rope", "glm_ids": (1, 2, 3)},
    ],
)  # fmt: skip
def test_special_ids_are_checked(change):
    config = zoo.read_chatglm(CHATGLM)
    assert replace(config, glm_ids=[1, 2, 3]).glm_ids == (1, 2, 3)
    with pytest.raises(ValueError, match="glm_ids"):
        replace(config, **change)


# Files.


@families
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
@pytest.mark.parametrize("n_shards", [1, 3])
def test_every_layout_of_files_gives_the_same_weights(settings, kind, n_shards, tmp_path):
    weights = random_weights(settings, torch.float16)
    weights = {name: w.float() if "norm" in name else w for name, w in weights.items()}  # as published
    expected = published.load_checkpoint(
        write_folder(tmp_path / "a", weights, settings), dtype=torch.float32
    ).state_dict()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    folder = write_folder(tmp_path / "b", weights, settings, kind, n_shards)
    loaded = published.load_checkpoint(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())
    mixed = published.load_checkpoint(folder)
    assert {w.dtype for w in mixed.parameters()} == {torch.float16}  # that of most numbers


@families
def test_a_model_is_written_and_read_bit_for_bit(settings, tmp_path):
    weights = random_weights(settings, torch.bfloat16)
    model = published.load_checkpoint(write_folder(tmp_path / "a", weights, settings))
    family = "baichuan" if settings["model_type"] == "baichuan" else None
    for name, size in (("one", 5 << 30), ("many", 20_000)):
        folder = published.save_checkpoint(model, tmp_path / name, family=family, max_shard_bytes=size)
        again = published.load_checkpoint(folder)
        assert again.config == model.config
        assert all(torch.equal(again.state_dict()[n], w) for n, w in model.state_dict().items())
        stored = {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}
        assert stored.keys() == weights.keys()
        assert all(torch.equal(stored[n], w) for n, w in weights.items())  # in the family's own order, too
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 3


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_what_we_write_and_generates_the_same(tied, tmp_path):
    from transformers import AutoModelForCausalLM

    model = Transformer(replace(zoo.read_llama(LLAMA), n_kv_heads=2, tied=tied)).eval()
    model.reset_parameters(std=0.3)
    folder = published.save_checkpoint(model, tmp_path / "m", max_shard_bytes=30_000)
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
    model = published.load_checkpoint(tmp_path / "m").eval()
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
        published.save_checkpoint(Transformer(config), tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_saving_says_what_is_wrong(tmp_path):
    model = Transformer(zoo.read_llama(LLAMA))
    with pytest.raises(
        ValueError, match="family must be one of llama, chatglm, chatglm2, baichuan, got 'gpt'"
    ):
        published.save_checkpoint(model, tmp_path / "m", family="gpt")
    with pytest.raises(ValueError, match="the family 'chatglm2' cannot hold this shape; 'llama' can"):
        published.save_checkpoint(model, tmp_path / "m", family="chatglm2")
    published.save_checkpoint(model, tmp_path / "m")
    with pytest.raises(ValueError, match="holds a model already"):
        published.save_checkpoint(model, tmp_path / "m")


def test_a_tie_is_believed_only_where_both_are_equal(tmp_path):
    settings = {**LLAMA, "tie_word_embeddings": True}
    weights = random_weights(settings)
    model = published.load_checkpoint(write_folder(tmp_path / "a", weights, settings))
    assert not model.config.tied
    assert torch.equal(model.head.weight, weights["lm_head.weight"])
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    model = published.load_checkpoint(write_folder(tmp_path / "b", weights, settings))
    assert model.head.weight is model.embed.weight
    model = published.load_checkpoint(write_folder(tmp_path / "c", weights_for(settings), settings))
    assert model.head.weight is model.embed.weight
    weights = random_weights(CHATGLM)
    weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"].clone()
    assert not published.load_checkpoint(
        write_folder(tmp_path / "d", weights, CHATGLM)
    ).config.tied  # both are there


@pytest.mark.parametrize("n_slices", [1, 2])
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_meta_s_files_give_the_same_model(n_slices, kv_heads, tmp_path):
    settings = {**LLAMA, "num_key_value_heads": kv_heads, "intermediate_size": 128, "vocab_size": 62}
    weights = random_weights(settings)
    expected = published.load_checkpoint(write_folder(tmp_path / "hf", weights, settings))
    slices, params = to_meta(weights, settings, n_slices)
    folder = tmp_path / "meta"
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(params))
    for i, part in enumerate(slices):
        torch.save(part, folder / f"consolidated.{i:02}.pth")
    model = published.load_checkpoint(folder)
    assert all(torch.equal(model.state_dict()[n], w) for n, w in expected.state_dict().items())
    tokens = torch.randint(61, (2, 12))
    assert torch.equal(model(tokens), expected(tokens))


def test_meta_s_folder_brings_its_tokenizer_and_talks(tmp_path, capsys):
    plain = sentencepiece_model(tmp_path / "tokenizer.model", split_digits=True)
    settings = {**LLAMA, "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": plain.vocab_size()}
    slices, params = to_meta(random_weights(settings), settings, 1)
    (tmp_path / "params.json").write_text(json.dumps(params))
    torch.save(slices[0], tmp_path / "consolidated.00.pth")
    model, tokenizer = folder.load_folder(tmp_path)
    assert model.config.vocab_size == tokenizer.vocab_size == plain.vocab_size()
    assert tokenizer.encode("the fox") == [plain.bos_id(), *plain.encode("the fox")]
    words = ["generate", "the fox", "--model", str(tmp_path), "--max-new-tokens", "3", "--device", "cpu"]
    assert main.main(words) == 0
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
        published.load_checkpoint(tmp_path)


# Few bits.


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", ["chatglm", "chatglm2", "baichuan-13b", "baichuan-7b"])
def test_quantized_checkpoints_are_the_numbers_they_stand_for(name, bits, tmp_path):
    settings = FAMILIES[name]
    plain = random_weights(settings)
    family = "baichuan" if "baichuan" in name else "chatglm"
    stored = quantized(plain, bits, family)
    limit = 2 ** (bits - 1) - 1
    rounded = {}
    for key, weight in plain.items():
        rounded[key] = weight
        if key + "_scale" in stored:
            scale = weight.abs().amax(1, keepdim=True) / limit
            rounded[key] = (weight / scale).round() * scale
    expected = published.load_checkpoint(write_folder(tmp_path / "plain", rounded, settings)).state_dict()
    folder = write_folder(tmp_path / "few", stored, {**settings, "quantization_bit": bits}, "bin", 2)
    model = published.load_checkpoint(folder)
    for key, weight in model.state_dict().items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, expected[key], rtol=1e-6, atol=0)
    half = published.load_checkpoint(folder, dtype=torch.bfloat16)
    assert torch.equal(half.blocks[0].mlp.w_down.weight, model.blocks[0].mlp.w_down.weight.bfloat16())


def test_quantized_weights_without_scale_or_of_a_wrong_size(tmp_path):
    stored = quantized(random_weights(CHATGLM2), 4, "chatglm")
    name = "transformer.encoder.layers.1.self_attention.dense.weight"
    without = {key: value for key, value in stored.items() if key != name + "_scale"}
    with pytest.raises(CheckpointError, match=f"'{name}' is torch.int8, and has no weight_scale"):
        published.load_checkpoint(write_folder(tmp_path / "a", without, CHATGLM2))
    wrong = {**stored, name: stored[name][:, :-1].contiguous()}
    with pytest.raises(CheckpointError, match=f"'{name}': torch.int8 of shape .* is neither 8 nor 4 bits"):
        published.load_checkpoint(write_folder(tmp_path / "b", wrong, CHATGLM2))
    wrong = {**stored, name + "_scale": stored[name + "_scale"][:-1].contiguous()}
    with pytest.raises(
        CheckpointError, match=f"'{name}': \\(47,\\) scales of torch.float32 for shape \\(48, 48\\)"
    ):
        published.load_checkpoint(write_folder(tmp_path / "c", wrong, CHATGLM2))


# Wrong and hostile folders.


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
    "a shard is empty": (lambda f: cut(f, 0), "no safetensors file, or truncated within its header"),
    "a shard ends in its header": (lambda f: cut(f, 100), "truncated within its header"),
    "a shard ends in its data": (lambda f: cut(f, 0.9), "truncated: 'model"),
    "a header that is no JSON": (lambda f: (f / "model-00001-of-00003.safetensors").write_bytes((10).to_bytes(8, "little") + b"x" * 10), "header is not JSON"),
    "a header that claims much": (lambda f: (f / "model-00001-of-00003.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{}" * 10), "no safetensors file"),
    "a header of a list": (lambda f: (f / "model-00001-of-00003.safetensors").write_bytes((2).to_bytes(8, "little") + b"[]"), "header is not a JSON object"),
    "a header with an odd type": (lambda f: header(f, lambda e: e.update(dtype="F8_E4M3")), "makes no sense"),
    "a header with a negative size": (lambda f: header(f, lambda e: e.update(shape=[-61, -48])), "makes no sense"),
    "a header with a wrong size": (lambda f: header(f, lambda e: e.update(shape=[10**9, 10**9])), "makes no sense"),
    "a header that points behind the file": (lambda f: header(f, lambda e: e.update(data_offsets=[n + (1 << 40) for n in e["data_offsets"]])), "truncated: "),
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
        published.load_checkpoint(folder)
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
        published.load_checkpoint(folder)
    assert not (tmp_path / "ran").exists()


def test_the_links_of_a_hugging_face_cache_are_followed(tmp_path):
    snapshot = write_folder(tmp_path / "hub" / "snapshots" / "abc", random_weights(LLAMA), LLAMA)
    blobs = tmp_path / "hub" / "blobs"
    blobs.mkdir()
    for file in list(snapshot.iterdir()):
        shutil.move(file, blobs / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    assert published.load_checkpoint(snapshot).config.dim == 48


def test_the_weights_survive_the_folder(tmp_path):
    weights = random_weights(LLAMA)
    model = published.load_checkpoint(write_folder(tmp_path / "m", weights, LLAMA))
    shutil.rmtree(tmp_path / "m")
    assert torch.equal(model.head.weight, weights["lm_head.weight"])
    model.head.weight.zero_()  # writing changes no file, and works


MEASURE = """
import json, sys, torch
from pathlib import Path
from minillm import zoo
def peak():
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
from minillm.transformer import ModelConfig, Transformer
Transformer(ModelConfig(vocab_size=8, dim=8, n_layers=1, n_heads=1, n_kv_heads=1, hidden_dim=8, max_seq_len=8))(torch.zeros(1, 2, dtype=torch.long))
before = peak()
model = zoo.load_checkpoint(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
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
    from published import shapes

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
    tokenizer = tokenizers.load_published_tokenizer(tmp_path)
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
    tokenizer = tokenizers.load_published_tokenizer(tmp_path)
    assert tokenizer.encode("今天 2025") == plain.encode("今天 2025")
    assert tokenizer.chat("a dog", [("hello", "the cat")]) == [
        195, *plain.encode("hello"), 196, *plain.encode("the cat"), 195, *plain.encode("a dog"), 196,
    ]  # fmt: skip
    (tmp_path / "generation_config.json").write_text('{"user_token_id": 7, "assistant_token_id": 8}')
    assert tokenizers.load_published_tokenizer(tmp_path).chat("a")[0::100] == [7]
    with pytest.raises(ValueError, match="baichuan has no place for a system text"):
        tokenizer.chat("a", system="b")


def test_chatglm2_begins_with_gmask_and_sop(tmp_path):
    plain = sentencepiece_model(tmp_path / "tokenizer.model")
    (tmp_path / "config.json").write_text(json.dumps(CHATGLM2))
    tokenizer = tokenizers.load_published_tokenizer(tmp_path)
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
    assert tokenizers.chatglm_prompt("a dog", [("hello", "the cat")], second=True) == text
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
    tokenizer = tokenizers.load_published_tokenizer(tmp_path)
    text = "the cat\n\tsat" + " " * 5 + "on" + " " * 83 + "mat"
    assert tokenizers.glm_text(text) == "the cat<n><|tab|>sat<|blank_5|>on<|blank_80|><|blank_3|>mat"
    assert tokenizers.glm_plain(tokenizers.glm_text(text)) == text
    encoded = tokenizer.encode(text)
    assert encoded[-2:] == [ids["gmask_token_id"], ids["bos_token_id"]]
    assert [i - offset for i in encoded[:-2]] == plain.encode(tokenizers.glm_text(text))
    assert tokenizer.decode(encoded) == text
    assert (tokenizer.eos_id, tokenizer.pad_id) == (ids["eos_token_id"], 3)
    assert tokenizers.chatglm_prompt("b", [("a", "x")]) == "[Round 0]\n问：a\n答：x\n[Round 1]\n问：b\n答："


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(TokenizerError, match="neither tokenizer.model nor ice_text.model"):
        tokenizers.load_published_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(TokenizerError, match=r"tokenizer\.model"):
        tokenizers.load_published_tokenizer(tmp_path)


# The command line.


@pytest.fixture
def published(tmp_path):
    plain = sentencepiece_model(tmp_path / "hf" / "tokenizer.model", split_digits=True)
    settings = {**LLAMA, "vocab_size": plain.vocab_size(), "max_position_embeddings": 64}
    write_folder(tmp_path / "hf", random_weights(settings), settings)
    return tmp_path / "hf"


def test_generate_reads_a_published_folder(published, capsys):
    command = [
        "generate",
        "the cat",
        "--model",
        str(published),
        "--max-new-tokens",
        "8",
        "--temperature",
        "0",
        "--device",
        "cpu",
    ]
    assert main.main(command) == 0
    said = capsys.readouterr().out
    assert said.startswith("the cat")
    model, tokenizer = folder.load_folder(published)
    new = generate(
        model, [tokenizer.encode("the cat")], max_new_tokens=8, sampler=Sampler.greedy(), eos_id=2
    )[0]
    assert tokenizer.decode(tokenizer.encode("the cat") + new).split() == said.split()


def test_convert_goes_both_ways_and_changes_nothing(published, tmp_path, capsys):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert main.main(["convert", str(published), str(ours)]) == 0
    assert json.loads((ours / "config.json").read_text())["format"] == "minillm"
    assert main.main(["convert", str(ours), str(theirs)]) == 0
    before, after = load_file(published / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    capsys.readouterr()
    texts = []
    for folder in (published, ours, theirs):
        assert (
            main.main(
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
    assert main.main(["convert", str(ours), str(theirs)]) == 2
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
    folder.convert_folder(tmp_path / "hf", tmp_path / "ours")
    for folder in ("hf", "ours"):
        model, tokenizer = folder.load_folder(tmp_path / folder)
        tokens = torch.tensor([tokenizer.encode("the cat\nsat")])
        assert tokenizer.eos_id == ids["eos_token_id"]
        logits = model(tokens)
        if folder == "hf":
            expected = logits
    assert torch.equal(logits, expected)


def test_a_model_of_ours_with_its_own_vocabulary_becomes_a_published_one(tmp_path):
    tokenizer = train_bpe(TEXT, 300)
    config = replace(zoo.read_llama(LLAMA), vocab_size=300, tied=True)
    save_model(tmp_path / "run" / "model", Transformer(config))
    tokenizer.save(tmp_path / "run" / "model")
    out = folder.convert_folder(tmp_path / "run", tmp_path / "out")
    model, again = folder.load_folder(out)
    assert model.config == config
    assert again.encode("the cat") == tokenizer.encode("the cat")
    assert not isinstance(again, SentencePieceTokenizer)


def test_info_knows_the_zoo_and_published_folders(published, capsys):
    assert main.main(["info", "llama2-70b"]) == 0
    said = capsys.readouterr().out
    assert "llama2-70b: 68,976,648,192 parameters" in said
    assert "KV cache" in said
    assert "GFLOP" in said
    assert main.main(["info", str(published)]) == 0
    assert f"{published}: " in capsys.readouterr().out
    assert main.main(["info", "llama3"]) == 2
    error = capsys.readouterr().err
    assert "tiny" in error
    assert "baichuan2-13b" in error


# Laws.


def solution_inside(folder, name):
    return weights.inside(folder, name)


def glm_positions(tokens, gmask, mask, sop):
    first, second = PromptLayout(mask, gmask, sop)(
        torch.tensor([tokens]), zoo_mask(torch.tensor([tokens]), 0)
    )[1][0].tolist()
    return first, second


SOLUTIONS = {
    "zoo.split_heads": lambda fused, n_heads: zoo.split_heads(fused, 3, n_heads),
    "zoo.pairs_to_halves": zoo.pairs_to_halves,
    "zoo.unpack_int4": zoo.unpack_int4,
    "zoo.glm_positions": glm_positions,
    "zoo.inside": solution_inside,
}


@pytest.mark.parametrize(
    ("exercise", "law"), [(name, law) for name in SOLUTIONS for law in laws(name)], ids=str
)
def test_the_package_obeys_its_laws(exercise, law):
    law(SOLUTIONS[exercise])


def first_broken(exercise, candidate):
    for law in laws(exercise):
        try:
            law(candidate)
        except Exception:
            return law.name
    return None


def wrong_positions(first=lambda t, c, blank: blank, second=lambda t, c: t - c + 1, g=True):
    def f(tokens, gmask, mask, sop):
        c = tokens.index(sop)
        kinds = (gmask, mask) if g else (mask, gmask)
        blank = next(tokens.index(k) for k in kinds if k in tokens)
        return [t if t < c else first(t, c, blank) for t in range(len(tokens))], [
            0 if t < c else second(t, c) for t in range(len(tokens))
        ]

    return f


@pytest.mark.parametrize(
    ("exercise", "wrong", "law"),
    [
        ("split_heads", lambda w, h: [w, w, w], "q, k and v come out, each (H Dh, D)"),
        ("split_heads", lambda w, h: list(w.chunk(3))[::-1], "one head: three blocks"),
        ("split_heads", lambda w, h: list(w.chunk(3)), "each head's rows are q, k, v; not all q before all k"),
        ("split_heads", lambda w, h: [w.view(h, 3, -1, w.shape[1])[:, i].reshape(-1, w.shape[1]) for i in range(3)], "a bias is split like its matrix"),
        ("pairs_to_halves", lambda w, h: w.flip(0), "rows are reordered, none is lost"),
        ("pairs_to_halves", lambda w, h: w, "row 2i goes to i, row 2i + 1 to i + Dh / 2"),
        ("pairs_to_halves", lambda w, h: w.unflatten(0, (h, 2, -1)).transpose(1, 2).reshape(w.shape), "row 2i goes to i, row 2i + 1 to i + Dh / 2"),
        ("unpack_int4", lambda p: torch.stack((p, p), -1).flatten(-2), "twice as many columns, from -8 to 7"),
        ("unpack_int4", lambda p: torch.stack(((p << 4) >> 4, p >> 4), -1).flatten(-2), "the even column is in the high half"),
        ("unpack_int4", lambda p: torch.stack((p >> 4, (p & 15) - 8), -1).flatten(-2), "the even column is in the high half"),
        ("unpack_int4", lambda p: torch.stack((p >> 4, ((p & 15) + 1) % 16 - 1 - 8 * ((p & 15) == 8)), -1).flatten(-2), "twice as many columns, from -8 to 7"),
        ("unpack_int4", lambda p: torch.stack((p >> 4, torch.where((p & 15) > 8, (p & 15) - 16, (p & 15) - 16 * ((p & 15) == 8))), -1).flatten(-2).abs() if p.numel() == 1 else zoo.unpack_int4(p), "negative numbers in either half"),
        ("glm_positions", wrong_positions(second=lambda t, c: t - c), "the second position is 0 before sop, and sop has 1"),
        ("glm_positions", wrong_positions(first=lambda t, c, b: t), "the first counts, and stays at the blank from sop on"),
        ("glm_positions", wrong_positions(first=lambda t, c, b: c - 1), "the blank may stand in the middle"),
        ("glm_positions", wrong_positions(g=False), "gMASK is the blank where there is one, even behind a MASK"),
        ("inside", lambda folder, name: (_ for _ in ()).throw(ValueError(name)), "a plain name is fine"),
        ("inside", lambda folder, name: folder / name, "no way up, no absolute path"),
    ],
)  # fmt: skip
def test_check_names_the_broken_law(exercise, wrong, law):
    assert first_broken(f"zoo.{exercise}", wrong) == law


def by_prefix(folder, name):
    path = os.path.normpath(folder / name)
    if not name or not path.startswith(str(folder)) or path == str(folder):
        raise ValueError(name)
    return path


def test_check_finds_the_sibling_and_the_link():
    assert first_broken("zoo.inside", by_prefix) == "no sibling that merely begins alike"

    def by_name(folder, name):
        if not name or name == ".." or "/" in name:
            raise ValueError(name)
        return folder / name

    assert first_broken("zoo.inside", by_name) == "no link that leads out"
