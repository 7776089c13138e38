"""Chapter 14: fourteen shapes, four families of names and settings, and logits that agree with somebody else's."""

import json
import os
from dataclasses import replace

import pytest
import torch
from published import (
    BAICHUAN_7B,
    BAICHUAN_13B,
    CHATGLM,
    CHATGLM2,
    FAMILIES,
    LLAMA,
    apart,
    glm_peer,
    llama_peer,
    quantized,
    random_weights,
    weights_for,
    write_folder,
)
from references import baichuan_reference, chatglm_reference
from tolerances import LOGITS
from torch.nn import functional as F

from minillm.attention import Mask
from minillm.check import laws
from minillm.hub import ModelFolder
from minillm.hub.weights import inside
from minillm.transformer import PromptLayout, Transformer, count_parameters
from minillm.zoo import (
    MODELS,
    family_of,
    pairs_to_halves,
    published_shape,
    read_chatglm,
    split_heads,
    unpack_int4,
)

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


def load(folder, norm_head=None, **options):
    return ModelFolder.open(folder, norm_head=norm_head).model(**options)


def prompts(settings, batch=2, length=12):
    """Tokens that suit a family: ChatGLM-6B's have gMASK and sop."""
    tokens = torch.randint(3, 50, (batch, length))
    if settings is CHATGLM:
        tokens[:, length // 2] = 51
        tokens[:, length // 2 + 1] = 54
    return tokens


# Configurations.


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_parameters_are_as_published(name, parameters):
    config = published_shape(name)
    assert count_parameters(config).total == parameters
    with torch.device("meta"):
        model = Transformer(config)
    assert sum(weight.numel() for weight in model.parameters()) == parameters


def test_configurations_follow_the_specification():
    assert set(MODELS) == set(PUBLISHED)
    assert count_parameters(replace(published_shape("chatglm-6b"), tied=True)).total == 6_173_286_400
    assert published_shape("chatglm-6b").glm_ids == (130000, 130001, 130004)
    assert isinstance(Transformer(replace(published_shape("chatglm-6b"), **SMALL_GLM)).layout, PromptLayout)
    assert (published_shape("chatglm2-6b").rope_scale, published_shape("chatglm2-6b-32k").rope_scale) == (
        1,
        16,
    )
    assert {published_shape(n).norm_eps for n in ("llama-7b", "llama-13b", "llama-33b", "baichuan2-13b")} == {
        1e-6
    }
    assert {published_shape(n).norm_eps for n in ("llama-65b", "llama2-7b", "chatglm2-6b", "chatglm-6b")} == {
        1e-5
    }
    assert {n for n in PUBLISHED if published_shape(n).position == "alibi"} == {
        "baichuan-13b",
        "baichuan2-13b",
    }
    assert {n for n in PUBLISHED if published_shape(n).norm_head} == {"baichuan2-7b", "baichuan2-13b"}
    assert {n: c.n_kv_heads for n, c in MODELS.items() if c.n_kv_heads != c.n_heads} == {
        "chatglm2-6b": 2, "chatglm2-6b-32k": 2, "llama2-70b": 8,
    }  # fmt: skip
    lengths = {n: c.max_seq_len for n, c in MODELS.items()}
    assert {n for n in lengths if lengths[n] == 4096} == {
        n for n in PUBLISHED if "llama2" in n or "baichuan" in n
    }
    with pytest.raises(ValueError, match=r"no model 'llama3-8b'; there are chatglm-6b, .*baichuan2-13b"):
        published_shape("llama3-8b")


SMALL_GLM = {"dim": 16, "n_heads": 2, "n_kv_heads": 2, "n_layers": 1, "hidden_dim": 16}


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_shape_survives_its_family_s_config(name):
    config = published_shape(name)
    family = family_of(config)
    assert family.read(json.loads(json.dumps(family.write(config)))) == config


# Equal logits.


@peers
@both_dtypes
def test_logits_equal_transformers(settings, peer, dtype, tmp_path, exact_norms):
    weights = weights_for(settings, dtype)
    model = load(write_folder(tmp_path / "m", weights, settings))
    tokens = torch.randint(61, (2, 70))  # more than twice the context
    logits = model(tokens)
    assert logits.dtype == dtype
    assert apart(logits, peer(weights, settings, dtype)(tokens).logits) < LOGITS[dtype]


@peers
def test_left_padded_logits_equal_transformers(settings, peer, tmp_path):
    weights = weights_for(settings)
    model = load(write_folder(tmp_path / "m", weights, settings))
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
    model = load(write_folder(tmp_path / "m", weights, settings, "bin"))
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
    model = load(folder, norm_head=norm_head)
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
    assert load(folder).config.norm_head
    assert not load(folder, norm_head=False).config.norm_head
    assert not load(write_folder(tmp_path / "n", random_weights(BAICHUAN_13B), BAICHUAN_13B)).config.norm_head


@families
def test_left_padding_changes_nothing(settings, tmp_path):
    model = load(write_folder(tmp_path / "m", random_weights(settings), settings))
    tokens = prompts(settings, 1)
    padded = F.pad(tokens, (4, 0), value=3)
    mask = torch.arange(16)[None] >= 4
    assert apart(model(padded, attention_mask=mask)[:, 4:], model(tokens)) < LOGITS[torch.float32]


@families
@both_dtypes
def test_decoding_with_a_cache_equals_reading_at_once(settings, dtype, tmp_path):
    model = load(write_folder(tmp_path / "m", random_weights(settings, dtype), settings))
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
        mask = padding_mask(tokens, pad)
        return layout(tokens, mask)[1].tolist()

    assert positions([GMASK_PROMPT]) == [[[0, 1, 2, 3, 3, 3, 3, 3], [0, 0, 0, 0, 1, 2, 3, 4]]]
    assert positions([MASK_PROMPT]) == [[[0, 1, 2, 3, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 2, 3, 4, 5]]]
    padded = [[3, 3, *GMASK_PROMPT]]
    assert positions(padded, 2) == [[[0, 0, 0, 1, 2, 3, 3, 3, 3, 3], [0, 0, 0, 0, 0, 0, 1, 2, 3, 4]]]


def padding_mask(tokens, pad):
    return Mask(keys=(torch.arange(tokens.shape[1]) >= pad).expand(len(tokens), -1)) if pad else Mask()


def test_chatglm_says_what_a_prompt_lacks(tmp_path):
    model = load(write_folder(tmp_path / "m", random_weights(CHATGLM), CHATGLM))
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
    config = read_chatglm(CHATGLM)
    assert replace(config, glm_ids=[1, 2, 3]).glm_ids == (1, 2, 3)
    with pytest.raises(ValueError, match="glm_ids"):
        replace(config, **change)


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
    expected = load(write_folder(tmp_path / "plain", rounded, settings)).state_dict()
    folder = write_folder(tmp_path / "few", stored, {**settings, "quantization_bit": bits}, "bin", 2)
    model = load(folder)
    for key, weight in model.state_dict().items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, expected[key], rtol=1e-6, atol=0)
    half = load(folder, dtype=torch.bfloat16)
    assert torch.equal(half.blocks[0].mlp.w_down.weight, model.blocks[0].mlp.w_down.weight.bfloat16())


# Laws.


def solution_inside(folder, name):
    return inside(folder, name)


def glm_positions(tokens, gmask, mask, sop):
    first, second = PromptLayout(mask, gmask, sop)(
        torch.tensor([tokens]), padding_mask(torch.tensor([tokens]), 0)
    )[1][0].tolist()
    return first, second


SOLUTIONS = {
    "zoo.split_heads": lambda fused, n_heads: split_heads(fused, 3, n_heads),
    "zoo.pairs_to_halves": pairs_to_halves,
    "zoo.unpack_int4": unpack_int4,
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
        ("unpack_int4", lambda p: torch.stack((p >> 4, torch.where((p & 15) > 8, (p & 15) - 16, (p & 15) - 16 * ((p & 15) == 8))), -1).flatten(-2).abs() if p.numel() == 1 else unpack_int4(p), "negative numbers in either half"),
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
