"""Many-to-many attention with interaction of maps, pair by pair, written from its equations before the module."""

import torch


def linear(weight, bias, row):
    """Rows of a weight against one vector, plus the bias."""
    return [sum(w * z for w, z in zip(line, row, strict=True)) + b for line, b in zip(weight, bias, strict=True)]


def relu(row):
    return [torch.clamp(z, min=0) for z in row]


def naive_scores(q, k, p, scale):
    """q (B, H, T, D), k (B, G, S, D) -> (B, H, T, S).

    Of each pair of tokens: each query head meets each key head; the G numbers of one query head go through two linear
    maps of its own with a ReLU between (inner), what comes of all heads, one after the other, through two more (cross).
    """
    B, H, T, _ = q.shape
    G, S = k.shape[1:3]
    out = q.new_zeros(B, H, T, S)
    rows = []
    for b in range(B):
        for t in range(T):
            for s in range(S):
                gathered = []
                for i in range(H):
                    met = [torch.dot(q[b, i, t], k[b, j, s]) * scale for j in range(G)]
                    hidden = relu(linear(p["inner_up"][i], p["inner_up_bias"][i], met))
                    gathered += linear(p["inner_down"][i], p["inner_down_bias"][i], hidden)
                hidden = relu(linear(p["cross_up"], p["cross_up_bias"], gathered))
                rows.append(torch.stack(linear(p["cross_down"], p["cross_down_bias"], hidden)))
    return torch.stack(rows).view(B, T, S, H).permute(0, 3, 1, 2) + out


def naive_layer(x, layer, p, allowed):
    """The layer around it: (B, T, M); allowed (B, T, S)."""
    H, G, D = layer.num_heads, layer.num_kv_heads, layer.head_dim
    q, k, v = ((x @ layer.get_parameter(f"{n}_proj.weight").T).unflatten(-1, (-1, D)).transpose(1, 2) for n in "qkv")
    scores = naive_scores(q, k, p, D**-0.5)
    out = []
    for b in range(len(x)):
        rows = []
        for t in range(x.shape[1]):
            seen = [s for s in range(x.shape[1]) if allowed[b, t, s]]
            heads = []
            for h in range(H):
                grown = [torch.exp(scores[b, h, t, s]) for s in seen]
                parts = [e / sum(grown) * v[b, h // (H // G), s] for e, s in zip(grown, seen, strict=True)]
                heads.append(sum(parts, torch.zeros(D, dtype=x.dtype)))
            rows.append(layer.o_proj.weight @ torch.cat(heads))
        out.append(torch.stack(rows))
    return torch.stack(out)
