"""Slow, obvious versions of things: each is the specification that the real code must equal."""

import torch


def rms_norm_reference(x, weight, eps):
    """RMSNorm, one vector and one number at a time."""
    rows = []
    for row in x.reshape(-1, x.shape[-1]).tolist():
        rms = (sum(value * value for value in row) / len(row) + eps) ** 0.5
        rows.append([value / rms * w for value, w in zip(row, weight.tolist())])
    return torch.tensor(rows, dtype=x.dtype).view(x.shape)


def glm_logits_reference(weights, n_layers, n_heads, tokens, prefix):
    """ChatGLM-6B on one sequence, token by token and head by head: 2D rotary, prefix mask, the normed residual."""
    weights = {name: weight.detach() for name, weight in weights.items()}
    alpha, dtype = (2 * 28) ** 0.5, weights["embed.weight"].dtype

    def linear(x, name):
        return weights[name + ".weight"] @ x + weights[name + ".bias"]

    def layer_norm(x, name):
        centred = x - x.mean()
        normed = centred / (centred.square().mean() + 1e-6).sqrt()
        return normed * weights[name + ".weight"] + weights[name + ".bias"]

    def rotate(x, position):  # one head's half: pairs (i, i + half)
        half, out = len(x) // 2, x.clone()
        for i in range(half):
            frequency = torch.tensor(10000.0 ** (-2 * i / len(x))).half().float()
            angle = torch.tensor(float(position)) * frequency
            cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
            out[i] = x[i] * cos - x[i + half] * sin
            out[i + half] = x[i + half] * cos + x[i] * sin
        return out

    def rotate_2d(x, column):
        first = min(column, max(prefix - 1, 0))
        second = max(column - prefix + 1, 0)
        a, b = x.chunk(2)
        return torch.cat([rotate(a, first), rotate(b, second)])

    def attention(stream, layer):
        q, k, v = ([linear(x, f"{layer}.attn.w{n}").chunk(n_heads) for x in stream] for n in "qkv")
        out = []
        for t in range(len(stream)):
            heads = []
            for h in range(n_heads):
                seen = [s for s in range(len(stream)) if s < prefix or s <= t]
                query = rotate_2d(q[t][h], t)
                scores = torch.stack([query @ rotate_2d(k[s][h], s) for s in seen]) / len(query) ** 0.5
                heads.append(sum(p * v[s][h] for p, s in zip(scores.softmax(0), seen)))
            out.append(linear(torch.cat(heads), f"{layer}.attn.wo"))
        return out

    def mlp(x, layer):
        up = linear(x, f"{layer}.mlp.w_up")
        gelu = 0.5 * up * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (up + 0.044715 * up**3)))
        return linear(gelu, f"{layer}.mlp.w_down")

    stream = [weights["embed.weight"][token] for token in tokens]
    for n in range(n_layers):
        layer = f"blocks.{n}"
        normed = [layer_norm(x, f"{layer}.attn_norm") for x in stream]
        stream = [alpha * a + mixed for a, mixed in zip(normed, attention(normed, layer))]
        normed = [layer_norm(x, f"{layer}.mlp_norm") for x in stream]
        stream = [alpha * m + mlp(m, layer) for m in normed]
    return torch.stack([weights["head.weight"] @ layer_norm(x, "norm") for x in stream])


def swiglu_reference(x, w_gate, w_up, w_down):
    """The gated MLP, one token and one hidden number at a time; the arguments are nn.Linear modules."""

    def apply(linear, vector):
        bias = [0.0] * linear.out_features if linear.bias is None else linear.bias.tolist()
        return [sum(w * v for w, v in zip(row, vector)) + b for row, b in zip(linear.weight.tolist(), bias)]

    rows = []
    for token in x.reshape(-1, x.shape[-1]).tolist():
        gates, ups = apply(w_gate, token), apply(w_up, token)
        rows.append(apply(w_down, [g / (1 + 2.718281828459045**-g) * u for g, u in zip(gates, ups)]))
    return torch.tensor(rows, dtype=x.dtype).view(x.shape)


def visible_reference(n_queries, n_keys, causal=True, prefix=None, documents=None, keys=None):
    """Who sees whom in one row of a batch, one pair at a time; prefix is a number, the others lists or None."""

    def sees(row, column):
        if keys is not None and not keys[column]:
            return row == column
        if documents is not None and documents[row] != documents[column]:
            return False
        return not causal or column <= row or (prefix is not None and column < prefix)

    return [[sees(row, column) for column in range(n_keys)] for row in range(n_keys - n_queries, n_keys)]


def attention_reference(q, k, v, seen, slopes=None):
    """Attention, one query of one head at a time. q (B H T Dh), k and v (B K S Dh), seen (B T S) booleans."""
    B, H, T, Dh = q.shape
    K, S = k.shape[1:3]
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                g, row = h * K // H, S - T + t
                columns = [s for s in range(S) if seen[b][t][s]]
                scores = torch.stack([q[b, h, t] @ k[b, g, s] for s in columns]) / Dh**0.5
                if slopes is not None:
                    scores = scores - slopes[h].to(q.dtype) * torch.tensor([abs(row - s) for s in columns])
                weights = (scores - scores.max()).exp()
                weights = weights / weights.sum()
                out[b, h, t] = sum(weight * v[b, g, s] for weight, s in zip(weights, columns))
    return out


def rope_reference(x, positions, rotary_dim, theta, interleaved):
    """RoPE on (B, H, T, Dh), one pair of one token of one head at a time; positions may be fractions."""
    out = x.double().clone()
    for b, h, t in torch.cartesian_prod(*(torch.arange(n) for n in x.shape[:3])).tolist():
        for i in range(rotary_dim // 2):
            first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + rotary_dim // 2)
            turn = 1j ** (positions[b, t].item() * theta ** (-2 * i / rotary_dim) / (torch.pi / 2))
            turned = complex(x[b, h, t, first], x[b, h, t, second]) * turn
            out[b, h, t, first], out[b, h, t, second] = turned.real, turned.imag
    return out.to(x.dtype)


def pack_reference(lengths, row_tokens, decreasing=True):
    """Best fit: each length into the fullest row that has room, looking at every row every time."""
    rows = []
    for length in sorted(lengths, reverse=True) if decreasing else lengths:
        fitting = [row for row in rows if sum(row) + length <= row_tokens]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            rows.append([length])
    return rows


def bpe_learn_reference(counts, n_merges, min_count):
    """Recount every pair of every word for each merge: the definition of chapter 07, with its three limits."""
    from minillm.tokenizer import MAX_TOKEN_BYTES, keeps_characters

    words = [(list(word.encode("utf-8", "surrogatepass")), n) for word, n in counts.items()]
    tokens, merges = [bytes([i]) for i in range(256)], []
    while len(merges) < n_merges:
        pairs = {}
        for ids, n in words:
            for pair in zip(ids, ids[1:]):
                pairs[pair] = pairs.get(pair, 0) + n
        good = []
        for (a, b), n in pairs.items():
            token = tokens[a] + tokens[b]
            if n >= min_count and len(token) <= MAX_TOKEN_BYTES and keeps_characters(token):
                good.append((-n, (a, b)))
        if not good:
            break
        pair = min(good)[1]
        merges.append(pair)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        words = [(_bpe_merge(ids, pair, len(tokens) - 1), n) for ids, n in words]
    return merges


def _bpe_merge(ids, pair, new):
    out, i = [], 0
    while i < len(ids):
        step = 2 if tuple(ids[i : i + 2]) == pair else 1
        out.append(new if step == 2 else ids[i])
        i += step
    return out


def bpe_encode_reference(merges, data):
    """Apply each merge everywhere, in the order of the ranks."""
    ids = list(data)
    for rank, pair in enumerate(merges):
        ids = _bpe_merge(ids, pair, 256 + rank)
    return ids


def adamw_reference(theta, grads, *, lr, betas, eps, weight_decay):
    """AdamW, one number at a time."""
    values = theta.flatten().tolist()
    means, squares = [0.0] * len(values), [0.0] * len(values)
    for t, grad in enumerate(grads, 1):
        for i, g in enumerate(grad.flatten().tolist()):
            means[i] = betas[0] * means[i] + (1 - betas[0]) * g
            squares[i] = betas[1] * squares[i] + (1 - betas[1]) * g * g
            m, v = means[i] / (1 - betas[0] ** t), squares[i] / (1 - betas[1] ** t)
            values[i] -= lr * weight_decay * values[i]
            values[i] -= lr * m / (v**0.5 + eps)
    return torch.tensor(values, dtype=theta.dtype).view(theta.shape)


def chatglm_reference(weights, settings, tokens):
    """Logits of ChatGLM-6B for one sequence, from its published names and settings: one token, head and key at a time.

    weights: name -> tensor; settings: config.json; tokens: a list of ids without padding.
    """
    d, n_heads, dtype = (
        settings["hidden_size"],
        settings["num_attention_heads"],
        weights["lm_head.weight"].dtype,
    )
    width, eps, T = d // n_heads, settings["layernorm_epsilon"], len(tokens)
    sop = tokens.index(settings["bos_token_id"])
    blank = settings["gmask_token_id"] if settings["gmask_token_id"] in tokens else settings["mask_token_id"]
    blank = tokens.index(blank)
    position = [t if t < sop else blank for t in range(T)]
    block_position = [0 if t < sop else t - sop + 1 for t in range(T)]
    frequency = torch.tensor([10000 ** (-2 * i / (width // 2)) for i in range(width // 4)]).half().float()

    def linear(x, name):
        return weights[name + ".weight"] @ x + weights[name + ".bias"]

    def layer_norm(x, name):
        centred = x - sum(x) / d
        return (
            centred / (centred @ centred / d + eps) ** 0.5 * weights[name + ".weight"]
            + weights[name + ".bias"]
        )

    def turn(half, place):
        quarter = len(half) // 2
        cos, sin = (place * frequency).cos().to(dtype), (place * frequency).sin().to(dtype)
        a, b = half[:quarter], half[quarter:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin])

    def turned(head, t):
        return torch.cat([turn(head[: width // 2], position[t]), turn(head[width // 2 :], block_position[t])])

    stream = [weights["transformer.word_embeddings.weight"][token] for token in tokens]
    for n in range(settings["num_layers"]):
        layer, alpha = f"transformer.layers.{n}.", (2 * 28) ** 0.5
        normed = [layer_norm(x, layer + "input_layernorm") for x in stream]
        qkv = [linear(x, layer + "attention.query_key_value").view(n_heads, 3, width) for x in normed]
        for t in range(T):
            heads = []
            for h in range(n_heads):
                seen = [s for s in range(T) if s <= t or s < sop]
                query = turned(qkv[t][h, 0], t)
                scores = torch.stack([query @ turned(qkv[s][h, 1], s) for s in seen]) / width**0.5
                heads.append(sum(p * qkv[s][h, 2] for p, s in zip(scores.softmax(0), seen)))
            stream[t] = alpha * normed[t] + linear(torch.cat(heads), layer + "attention.dense")
        for t in range(T):
            x = layer_norm(stream[t], layer + "post_attention_layernorm")
            up = linear(x, layer + "mlp.dense_h_to_4h")
            gelu = 0.5 * up * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (up + 0.044715 * up**3)))
            stream[t] = alpha * x + linear(gelu, layer + "mlp.dense_4h_to_h")
    return torch.stack(
        [weights["lm_head.weight"] @ layer_norm(x, "transformer.final_layernorm") for x in stream]
    )


def baichuan_reference(weights, settings, tokens, norm_head=False):
    """Logits of Baichuan-13B for one sequence, from its published names and settings: ALiBi, one key at a time."""
    d, n_heads = settings["hidden_size"], settings["num_attention_heads"]
    width, eps, T = d // n_heads, settings["rms_norm_eps"], len(tokens)
    power = 1
    while 2 * power <= n_heads:
        power *= 2
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-8 * (2 * i + 1) / (2 * power)) for i in range(n_heads - power)]
    slopes = torch.tensor(slopes, dtype=torch.float32)  # the published bias is made of float32 numbers

    def rms_norm(x, name):
        return x / (x @ x / d + eps) ** 0.5 * weights[name + ".weight"]

    stream = [weights["model.embed_tokens.weight"][token] for token in tokens]
    for n in range(settings["num_hidden_layers"]):
        w = {name: weights[f"model.layers.{n}.{name}.weight"] for name in (
            "self_attn.W_pack", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"
        )}  # fmt: skip
        normed = [rms_norm(x, f"model.layers.{n}.input_layernorm") for x in stream]
        qkv = [(w["self_attn.W_pack"] @ x).view(3, n_heads, width) for x in normed]
        for t in range(T):
            heads = []
            for h in range(n_heads):
                scores = [
                    qkv[t][0, h] @ qkv[s][1, h] / width**0.5 - float(slopes[h] * (t - s))
                    for s in range(t + 1)
                ]
                heads.append(sum(p * qkv[s][2, h] for s, p in enumerate(torch.stack(scores).softmax(0))))
            stream[t] = stream[t] + w["self_attn.o_proj"] @ torch.cat(heads)
        for t in range(T):
            x = rms_norm(stream[t], f"model.layers.{n}.post_attention_layernorm")
            gate = w["mlp.gate_proj"] @ x
            hidden = gate / (1 + (-gate).exp()) * (w["mlp.up_proj"] @ x)
            stream[t] = stream[t] + w["mlp.down_proj"] @ hidden
    head = weights["lm_head.weight"]
    if norm_head:
        head = torch.stack([row / (row @ row) ** 0.5 for row in head])
    return torch.stack([head @ rms_norm(x, "model.norm") for x in stream])


def plain_attention(q, k, v, *, scale=None, tile=False, dim=-1, offset=True, detach=False):
    group, T, S = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = (x.repeat(1, group, 1, 1) if tile else x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) / (q.shape[-1] ** 0.5 if scale is None else scale)
    future = torch.ones(T, S, dtype=torch.bool).triu(S - T + 1 if offset else 1)
    out = scores.masked_fill(future, float("-inf")).softmax(dim).nan_to_num() @ v
    return out.detach() if detach else out


def random_qkv(B=2, H=4, K=2, T=5, S=5, Dh=6, **kwargs):
    return (
        torch.randn(B, H, T, Dh, **kwargs),
        torch.randn(B, K, S, Dh, **kwargs),
        torch.randn(B, K, S, Dh, **kwargs),
    )
