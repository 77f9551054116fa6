"""Block Transformer: equations 1-6 (lookup embedder, both decoders, "prefix" and "summation"), GPT-NeoX blocks inside.

Written from a summary of the paper and its code, by someone who has read neither code nor test of this library.
Not in that summary, recalled of GPT-NeoX: exact GELU, rotary base 10000, rotary pairs (i, i + R/2) of the first R
features, a final LayerNorm also in the token decoder (its parameters are in the authors' numbers).
"""

import math

import torch

from naive import linear, softmax


def norm(vec, w, b, eps=1e-5):
    m = vec.mean()
    return (vec - m) / torch.sqrt(((vec - m) ** 2).mean() + eps) * w + b


def rotary(vec, pos, R):
    h, new = R // 2, list(vec)
    for i in range(h):
        t = torch.tensor(pos * 10000.0 ** (-2 * i / R), dtype=vec.dtype)
        new[i], new[i + h] = vec[i] * t.cos() - vec[i + h] * t.sin(), vec[i + h] * t.cos() + vec[i] * t.sin()
    return torch.stack(new)


def affine(vec, p, at):
    return linear(vec, p[at + ".weight"], p[at + ".bias"])


def normed(vec, p, at):
    return norm(vec, p[at + ".weight"], p[at + ".bias"])


def part(qkv, h, s, D):
    """Per head [q | k | v]."""
    return qkv[h * 3 * D + s * D : h * 3 * D + (s + 1) * D]


def neox(seq, p, pre, layers, heads, rotary_part, seen=None):
    """Causal GPT-NeoX stack with final norm over a list of vectors, positions 0..; p[pre + name].

    seen (n) bool: keys that count (blocks of padding only are False).
    """
    n, M = len(seq), len(seq[0])
    D = M // heads
    R = int(D * rotary_part)
    x = list(seq)
    for number in range(layers):
        at = f"{pre}layers.{number}."
        f = [affine(normed(t, p, at + "input_layernorm"), p, at + "attention.query_key_value") for t in x]
        new = []
        for i in range(n):
            parts = []
            for h in range(heads):
                js = [j for j in range(i + 1) if seen is None or bool(seen[j]) or j == i]
                q = rotary(part(f[i], h, 0, D), i, R)
                a = softmax([(q * rotary(part(f[j], h, 1, D), j, R)).sum() / D**0.5 for j in js])
                parts.append(sum(a[m] * part(f[j], h, 2, D) for m, j in enumerate(js)))
            att = affine(torch.cat(parts), p, at + "attention.dense")
            t = affine(normed(x[i], p, at + "post_attention_layernorm"), p, at + "mlp.dense_h_to_4h")
            t = 0.5 * t * (1 + torch.erf(t / math.sqrt(2)))
            new.append(x[i] + att + affine(t, p, at + "mlp.dense_4h_to_h"))  # parallel residual
        x = new
    return [normed(t, p, pre + "final_layer_norm") for t in x]


def contexts(ids, p, *, heads, layers, rotary_part, seen=None):
    """ids (n, L) of one sample -> list of n block contexts c_t (equations 1, 2)."""
    E = p["embedder.embeddings.weight"]
    z = [torch.cat([E[int(i)] for i in block]) for block in ids]
    return neox(z, p, "block_decoder.gpt_neox.", layers, heads, rotary_part, seen)


def token_logits(c, block, p, *, prefix, decoding, bos, heads, layers, rotary_part):
    """Logits (L, vocab) of the block that follows context c (equations 4, 5)."""
    L = len(block)
    We = p["token_decoder.expansion_layer.weight"]
    We = We[:, :, 0] if We.dim() == 3 else We
    f = linear(c, We, p["token_decoder.expansion_layer.bias"])
    m = len(f) // prefix
    f = [f[r * m : (r + 1) * m] for r in range(prefix)]
    W = p["token_decoder.gpt_neox.embed_in.weight"]
    if decoding == "prefix":
        seq, first = f + [W[int(i)] for i in block[:-1]], prefix - 1
    else:  # summation, prefix = L
        assert prefix == L
        before = [bos] + [int(i) for i in block[:-1]]
        seq, first = [W[t] + f[r] for r, t in enumerate(before)], 0
    y = neox(seq, p, "token_decoder.gpt_neox.", layers, heads, rotary_part)
    return torch.stack([linear(t, p["token_decoder.embed_out.weight"]) for t in y[first:]])


def block_lm(
    ids,
    p,
    *,
    prefix=2,
    decoding="prefix",
    bos=0,
    heads=2,
    layers_global=2,
    layers_local=2,
    rotary_part=0.5,
    seen=None,
):
    """ids (B, n, L) -> logits (B, n-1, L, vocab) of blocks 1 .. n-1; p by the names of the authors' state dict.

    seen (B, n) bool: False for blocks of padding only. rotary_part: the paper's models a quarter, the authors' numbers
    half.
    """
    out = []
    for b in range(len(ids)):
        rows = None if seen is None else seen[b]
        c = contexts(ids[b], p, heads=heads, layers=layers_global, rotary_part=rotary_part, seen=rows)
        kw = {"prefix": prefix, "decoding": decoding, "bos": bos, "heads": heads, "layers": layers_local}
        kw["rotary_part"] = rotary_part
        out.append(torch.stack([token_logits(c[t], ids[b][t + 1], p, **kw) for t in range(len(c) - 1)]))
    return torch.stack(out)


def loss(logits, ids, padding=None):
    """Mean cross entropy over the predicted tokens; padding: id that is skipped."""
    terms = [
        -torch.log(softmax(list(logits[b, t, i]))[int(ids[b, t + 1, i])])
        for b in range(len(ids))
        for t in range(logits.shape[1])
        for i in range(logits.shape[2])
        if padding is None or int(ids[b, t + 1, i]) != padding
    ]
    return sum(terms) / len(terms)
