"""Multi-head latent attention, token by token and number by number, written from its equations before the module."""

import math

import torch


def norm(row, weight, eps):
    """RMS normalisation of one vector."""
    mean = sum(value**2 for value in row) / len(row)
    return torch.stack([value / torch.sqrt(mean + eps) * w for value, w in zip(row, weight, strict=True)])


def turned(row, angles, interleaved):
    """One vector of R numbers, each pair turned by its own angle: neighbours, or one of each half."""
    half, out = len(row) // 2, list(row)
    for a in range(half):
        one, two = (2 * a, 2 * a + 1) if interleaved else (a, a + half)
        c, s = math.cos(float(angles[a])), math.sin(float(angles[a]))
        out[one], out[two] = row[one] * c - row[two] * s, row[one] * s + row[two] * c
    return torch.stack(out) if out else row


def naive_mla(
    x,
    p,
    *,
    heads,
    nope,
    rope,
    value,
    angles,
    angles_of_keys=None,
    context=None,
    allowed=None,
    interleaved=True,
    eps=1e-6,
    scale=None,
):
    """x (B, T, M), context (B, S, M) -> (B, T, M), weights (B, H, T, S).

    `p` holds tensors by transformers' names; angles (B, T, R / 2), those of keys likewise; allowed (B, T, S).
    """
    context = x if context is None else context
    angles_of_keys = angles if angles_of_keys is None else angles_of_keys
    scale = (nope + rope) ** -0.5 if scale is None else scale
    latent = p["kv_a_layernorm.weight"].shape[0]

    def linear(name, row):
        bias = p.get(f"{name}.bias")
        return p[f"{name}.weight"] @ row + (0 if bias is None else bias)

    out, weights = [], []
    for b in range(len(x)):
        keys, values = [], []
        for s in range(context.shape[1]):
            both = linear("kv_a_proj_with_mqa", context[b, s])
            c = norm(both[:latent], p["kv_a_layernorm.weight"], eps)
            shared = turned(both[latent:], angles_of_keys[b, s], interleaved)
            up = p["kv_b_proj.weight"] @ c
            of_heads = [up[h * (nope + value) : (h + 1) * (nope + value)] for h in range(heads)]
            keys.append([torch.cat([mine[:nope], shared]) for mine in of_heads])
            values.append([mine[nope:] for mine in of_heads])
        rows, maps = [], []
        for t in range(x.shape[1]):
            if "q_proj.weight" in p:
                q = p["q_proj.weight"] @ x[b, t]
            else:
                low = norm(linear("q_a_proj", x[b, t]), p["q_a_layernorm.weight"], eps)
                q = p["q_b_proj.weight"] @ low
            mixed, of_query = [], []
            for h in range(heads):
                mine = q[h * (nope + rope) : (h + 1) * (nope + rope)]
                mine = torch.cat([mine[:nope], turned(mine[nope:], angles[b, t], interleaved)])
                seen = [s for s in range(len(keys)) if allowed is None or allowed[b, t, s]]
                scores = [torch.dot(mine, keys[s][h]) * scale for s in seen]
                top = max((z.item() for z in scores), default=0.0)
                grown = [torch.exp(z - top) for z in scores]
                total = sum(grown)
                one = torch.zeros(value, dtype=x.dtype)
                line = [torch.zeros((), dtype=x.dtype)] * len(keys)
                for s, z in zip(seen, grown, strict=True):
                    line[s] = z / total
                    one = one + line[s] * values[s][h]
                mixed.append(one)
                of_query.append(torch.stack(line))
            rows.append(linear("o_proj", torch.cat(mixed)))
            maps.append(torch.stack(of_query))
        out.append(torch.stack(rows))
        weights.append(torch.stack(maps, 1))
    return torch.stack(out), torch.stack(weights)
