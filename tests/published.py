"""Tiny folders in the layout in which the models were published, written without any code of `minillm.zoo` or `minillm.hub`."""

import json

import torch
from safetensors.torch import save_file

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": 61,
    "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 6, "rms_norm_eps": 1e-6, "max_position_embeddings": 32, "tie_word_embeddings": False,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BAICHUAN_7B = {**LLAMA, "architectures": ["BaiChuanForCausalLM"], "model_type": "baichuan"}
BAICHUAN_13B = {**BAICHUAN_7B, "architectures": ["BaichuanForCausalLM"], "model_max_length": 32}
for _key in ("num_key_value_heads", "max_position_embeddings"):
    BAICHUAN_13B.pop(_key)
BAICHUAN_7B.pop("num_key_value_heads")
CHATGLM = {
    "architectures": ["ChatGLMModel"], "model_type": "chatglm", "position_encoding_2d": True, "vocab_size": 61,
    "hidden_size": 48, "inner_hidden_size": 64, "num_layers": 3, "num_attention_heads": 6, "layernorm_epsilon": 1e-5,
    "max_sequence_length": 32, "mask_token_id": 50, "gmask_token_id": 51, "bos_token_id": 54, "eos_token_id": 55,
    "pad_token_id": 3,
}  # fmt: skip
CHATGLM2 = {
    "architectures": ["ChatGLMModel"], "model_type": "chatglm", "padded_vocab_size": 61, "hidden_size": 48,
    "num_layers": 3, "num_attention_heads": 6, "kv_channels": 8, "multi_query_attention": True,
    "multi_query_group_num": 2, "ffn_hidden_size": 56, "seq_length": 32, "layernorm_epsilon": 1e-5,
    "rmsnorm": True, "apply_residual_connection_post_layernorm": False, "add_bias_linear": False,
    "add_qkv_bias": True, "post_layer_norm": True, "tie_word_embeddings": False, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": LLAMA, "baichuan-7b": BAICHUAN_7B, "baichuan-13b": BAICHUAN_13B, "chatglm": CHATGLM, "chatglm2": CHATGLM2,
}  # fmt: skip


def shapes(settings, tied=False):
    """Every tensor of a model with these settings, as the specification names it."""
    s, kind = settings, settings["model_type"]
    d = s["hidden_size"]
    if "padded_vocab_size" in s:
        yield "transformer.embedding.word_embeddings.weight", (s["padded_vocab_size"], d)
        kv = s["multi_query_group_num"] * s["kv_channels"]
        for n in range(s["num_layers"]):
            layer = f"transformer.encoder.layers.{n}."
            yield layer + "input_layernorm.weight", (d,)
            yield layer + "self_attention.query_key_value.weight", (d + 2 * kv, d)
            yield layer + "self_attention.query_key_value.bias", (d + 2 * kv,)
            yield layer + "self_attention.dense.weight", (d, d)
            yield layer + "post_attention_layernorm.weight", (d,)
            yield layer + "mlp.dense_h_to_4h.weight", (2 * s["ffn_hidden_size"], d)
            yield layer + "mlp.dense_4h_to_h.weight", (d, s["ffn_hidden_size"])
        yield "transformer.encoder.final_layernorm.weight", (d,)
        if not tied:
            yield "transformer.output_layer.weight", (s["padded_vocab_size"], d)
    elif kind == "chatglm":
        hidden = s["inner_hidden_size"]
        yield "transformer.word_embeddings.weight", (s["vocab_size"], d)
        for n in range(s["num_layers"]):
            layer = f"transformer.layers.{n}."
            for name, shape in (
                ("input_layernorm", (d,)), ("attention.query_key_value", (3 * d, d)), ("attention.dense", (d, d)),
                ("post_attention_layernorm", (d,)), ("mlp.dense_h_to_4h", (hidden, d)), ("mlp.dense_4h_to_h", (d, hidden)),
            ):  # fmt: skip
                yield f"{layer}{name}.weight", shape
                yield f"{layer}{name}.bias", shape[:1]
        yield "transformer.final_layernorm.weight", (d,)
        yield "transformer.final_layernorm.bias", (d,)
        if not tied:
            yield "lm_head.weight", (s["vocab_size"], d)
    else:
        hidden = s["intermediate_size"]
        kv = d * s.get("num_key_value_heads", s["num_attention_heads"]) // s["num_attention_heads"]
        attention = {"q_proj": (d, d), "k_proj": (kv, d), "v_proj": (kv, d)}
        attention = {"W_pack": (3 * d, d)} if kind == "baichuan" else attention
        yield "model.embed_tokens.weight", (s["vocab_size"], d)
        for n in range(s["num_hidden_layers"]):
            layer = f"model.layers.{n}."
            for name, shape in {**attention, "o_proj": (d, d)}.items():
                yield f"{layer}self_attn.{name}.weight", shape
            yield layer + "mlp.gate_proj.weight", (hidden, d)
            yield layer + "mlp.up_proj.weight", (hidden, d)
            yield layer + "mlp.down_proj.weight", (d, hidden)
            yield layer + "input_layernorm.weight", (d,)
            yield layer + "post_attention_layernorm.weight", (d,)
        yield "model.norm.weight", (d,)
        if not tied:
            yield "lm_head.weight", (s["vocab_size"], d)


def random_weights(settings, dtype=torch.float32, tied=False):
    """Weights of which every one matters: gains near 1, biases that are not 0."""
    weights = {}
    for name, shape in shapes(settings, tied):
        noise = torch.randn(shape, dtype=torch.float64)
        gain = len(shape) == 1 and name.endswith(".weight")
        weights[name] = (1 + 0.1 * noise if gain else 0.15 * noise).to(dtype)
    return weights


def weights_for(settings, dtype=torch.float32):
    """`random_weights`, with the biases that the settings ask for."""
    tied = settings.get("tie_word_embeddings", False)
    weights = random_weights(settings, dtype, tied)
    for name in list(weights):
        if settings.get("attention_bias") and name.endswith(
            ("q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight")
        ):
            weights[name.replace("weight", "bias")] = torch.randn(weights[name].shape[0], dtype=dtype)
        if settings.get("mlp_bias") and ".mlp." in name:
            weights[name.replace("weight", "bias")] = torch.randn(weights[name].shape[0], dtype=dtype)
    return weights


def apart(a, b):
    """The largest difference of two tensors of one shape."""
    assert a.shape == b.shape
    return (a - b).abs().max().item()


def write_folder(folder, weights, settings, kind="safetensors", n_shards=1):
    """A folder as on the hub: config.json, and one file or several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    stem = "model" if kind == "safetensors" else "pytorch_model"

    def write(path, part):
        if kind == "safetensors":
            save_file(part, path, metadata={"format": "pt"})
        else:
            torch.save(part, path)

    if n_shards == 1:
        write(folder / f"{stem}.{kind}", weights)
        return folder
    where = {}
    for i in range(n_shards):
        file = f"{stem}-{i + 1:05}-of-{n_shards:05}.{kind}"
        part = {name: weights[name] for name in list(weights)[i::n_shards]}
        write(folder / file, part)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in weights.values())}, "weight_map": where}
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return folder


def llama_peer(weights, settings, dtype):
    """`transformers.LlamaForCausalLM` with these weights of LLaMA, or of Baichuan-7B."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {key: value for key, value in settings.items() if key not in ("architectures", "model_type")}
    settings |= {"attn_implementation": "sdpa"}
    peer = LlamaForCausalLM(LlamaConfig(**settings)).to(dtype).eval()
    state = {}
    for name, tensor in weights.items():
        if "W_pack" in name:
            state |= {name.replace("W_pack", f"{x}_proj"): part for x, part in zip("qkv", tensor.chunk(3))}
        else:
            state[name] = tensor
    if settings["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    peer.load_state_dict(state)
    return peer


def glm_peer(weights, settings, dtype):
    """`transformers.GlmForCausalLM` with these weights of ChatGLM2."""
    from transformers import GlmConfig, GlmForCausalLM

    s = settings
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    if s.get("rope_ratio", 1) != 1:
        rope |= {"rope_type": "linear", "factor": float(s["rope_ratio"])}
    config = {
        "vocab_size": s["padded_vocab_size"], "hidden_size": s["hidden_size"], "num_hidden_layers": s["num_layers"],
        "num_attention_heads": s["num_attention_heads"], "num_key_value_heads": s["multi_query_group_num"],
        "head_dim": s["kv_channels"], "intermediate_size": s["ffn_hidden_size"], "rms_norm_eps": s["layernorm_epsilon"],
        "max_position_embeddings": s["seq_length"], "attention_bias": True, "partial_rotary_factor": 0.5, "pad_token_id": 0,
        "tie_word_embeddings": s["tie_word_embeddings"], "rope_parameters": rope, "attn_implementation": "sdpa",
    }  # fmt: skip
    d, kv = s["hidden_size"], s["multi_query_group_num"] * s["kv_channels"]
    names = {
        "transformer.embedding.word_embeddings": "model.embed_tokens", "transformer.encoder.final_layernorm": "model.norm",
        "transformer.encoder.layers": "model.layers", "transformer.output_layer": "lm_head",
        "self_attention.dense": "self_attn.o_proj", "dense_h_to_4h": "gate_up_proj", "dense_4h_to_h": "down_proj",
    }  # fmt: skip
    state = {}
    for name, tensor in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        if "query_key_value" in name:
            for x, part in zip("qkv", tensor.split([d, kv, kv])):
                state[name.replace("self_attention.query_key_value", f"self_attn.{x}_proj")] = part
        else:
            state[name] = tensor
    if s["tie_word_embeddings"]:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    peer = GlmForCausalLM(GlmConfig(**config)).to(dtype).eval()
    peer.load_state_dict(state)
    return peer


def to_meta(weights, settings, n_slices=1):
    """The weights of a LLaMA in Meta's order and names, cut into slices, and its params.json."""
    names = {
        "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers",
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    width = settings["hidden_size"] // settings["num_attention_heads"]
    slices = [{} for _ in range(n_slices)]
    for name, tensor in weights.items():
        for old, new in names.items():
            name = name.replace(old, new)
        if name.endswith(
            ("wq.weight", "wk.weight")
        ):  # row i of the first half and of the second become neighbours
            order = [
                h * width + i + half
                for h in range(len(tensor) // width)
                for i in range(width // 2)
                for half in (0, width // 2)
            ]
            tensor = tensor[order]
        dim = 1 if name.endswith(("tok_embeddings.weight", "wo.weight", "w2.weight")) else 0
        parts = [tensor] * n_slices if tensor.dim() == 1 else tensor.chunk(n_slices, dim)
        for part, piece in zip(slices, parts):
            part[name] = piece.clone()
    params = {
        "dim": settings["hidden_size"], "n_layers": settings["num_hidden_layers"],
        "n_heads": settings["num_attention_heads"], "n_kv_heads": settings["num_key_value_heads"],
        "norm_eps": settings["rms_norm_eps"], "vocab_size": -1, "multiple_of": 8,
    }  # fmt: skip
    for part in slices:
        part["rope.freqs"] = torch.ones(width // 2)
    return slices, params


def quantized(weights, bits, family):
    """The four (or five) matrices of each layer in 8 or 4 bits, one number at a time where it matters."""
    out = {}
    for name, tensor in weights.items():
        if tensor.dim() != 2 or "embed" in name or "lm_head" in name or "output_layer" in name:
            out[name] = tensor
            continue
        limit = 2 ** (bits - 1) - 1
        scale = tensor.abs().amax(1) / limit
        numbers = (tensor / scale[:, None]).round().long()
        if family == "baichuan":
            stored = numbers.T.contiguous().to(torch.int8) if bits == 8 else _pack_int32(numbers)
        else:
            stored = numbers.to(torch.int8) if bits == 8 else _pack_int8(numbers)
        out[name], out[name.replace(".weight", ".weight_scale")] = stored, scale
    return out


def _pack_int8(numbers):
    rows = []
    for row in numbers.tolist():
        packed = [((a & 15) << 4) | (b & 15) for a, b in zip(row[::2], row[1::2])]
        rows.append([value - 256 if value > 127 else value for value in packed])
    return torch.tensor(rows, dtype=torch.int8)


def _pack_int32(numbers):
    rows = []
    for row in numbers.tolist():
        packed = [sum((row[8 * j + i] & 15) << (4 * i) for i in range(8)) for j in range(len(row) // 8)]
        rows.append([value - 2**32 if value >= 2**31 else value for value in packed])
    return torch.tensor(rows, dtype=torch.int32)
