"""FLARE by loops: its two maps, the residual MLP and the masks.

Written from the equations alone, by someone who has read neither code nor test of the library.
"""

import math

import torch

from naive import linear, softmax


def gelu_tanh(z):
    return 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def layer_norm(vec, weight, bias, eps=1e-5):
    d = vec - vec.mean()
    return d / torch.sqrt((d**2).mean() + eps) * weight + bias


def flare_attention(latents, k, v, *, scale=1.0, keep=None):
    """latents (H,L,D), k (B,H,T,D), v (B,H,T,V), keep (B,T) true = real -> out (B,H,T,V), A (B,H,T,T).

    Padded keys are left out of step 5, padded rows come out as 0.
    """
    batch, heads, length, _ = k.shape
    rank = latents.shape[1]
    outs, mats = [], []
    for b in range(batch):
        real = [t for t in range(length) if keep is None or bool(keep[b, t])]
        for h in range(heads):
            s = [[scale * (latents[h, m] * k[b, h, t]).sum() for t in range(length)] for m in range(rank)]
            gather, z = [], []
            for m in range(rank):
                a = softmax([s[m][t] for t in real]) if real else []
                gather.append(dict(zip(real, a, strict=True)))
                z.append(sum((w * v[b, h, t] for t, w in gather[m].items()), torch.zeros_like(v[b, h, 0])))
            for t in range(length):
                give = softmax([s[m][t] for m in range(rank)]) if t in real else [k.new_zeros(())] * rank
                outs.append(sum(w * z[m] for m, w in enumerate(give)))
                row = [sum(give[m] * gather[m].get(j, k.new_zeros(())) for m in range(rank)) for j in range(length)]
                mats.append(torch.stack(row))
    return torch.stack(outs).reshape(batch, heads, length, -1), torch.stack(mats).reshape(batch, heads, length, length)


def res_mlp(x, layers, *, act=gelu_tanh, input_residual=True, output_residual=True):
    """x (M,); layers: list of (weight, bias). One layer (n = -1): x + W x + b. Else first, n middle ones, last."""
    if len(layers) == 1:
        return x + linear(x, *layers[0])
    a = act(linear(x, *layers[0]))
    if input_residual and len(a) == len(x):
        a = a + x
    for w, b in layers[1:-1]:
        a = a + act(linear(a, w, b))
    y = linear(a, *layers[-1])
    return y + a if output_residual and len(y) == len(a) else y


def flare(x, latents, key_layers, value_layers, wo, bo, *, scale=1.0, q_norm=None, k_norm=None, keep=None):
    """x (B,T,M) -> out (B,T,M), A. q_norm, k_norm: (weight, bias) over D of eq. 3, or None."""
    batch, length, _ = x.shape
    heads, _, d = latents.shape
    k = torch.stack([res_mlp(x[b, t], key_layers) for b in range(batch) for t in range(length)])
    v = torch.stack([res_mlp(x[b, t], value_layers) for b in range(batch) for t in range(length)])
    k, v = (a.reshape(batch, length, heads, d).transpose(1, 2) for a in (k, v))
    if q_norm is not None:
        latents = torch.stack([torch.stack([layer_norm(r, *q_norm) for r in m]) for m in latents])
    if k_norm is not None:
        rows = [layer_norm(r, *k_norm) for r in k.reshape(-1, d)]
        k = torch.stack(rows).reshape(k.shape)
    o, mats = flare_attention(latents, k, v, scale=scale, keep=keep)
    outs = [linear(o[b, :, t].reshape(-1), wo, bo) for b in range(batch) for t in range(length)]
    return torch.stack(outs).reshape(x.shape), mats
