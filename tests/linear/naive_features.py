"""Feature maps of linear attention, each of one vector x (D,), and cosFormer by loops.

Written from the equations alone, by someone who has read neither code nor test of the library.
"""

import math

import torch

from naive import linear, softmax


def hedgehog(x, weight, bias, factor=2.0):
    y = factor * linear(x, weight, bias)
    return torch.stack(softmax(list(y) + list(-y)))


def t2r(x, weight):
    return torch.clamp(linear(x, weight), min=0)


def dpfp(x, nu, as_coded=False):
    """The paper's [relu(x) ; relu(-x)], or the library's [relu(x) ; -relu(x)]; roll(z, j)_i = z_{i-j}."""
    up = torch.clamp(x, min=0)
    z = list(up) + list(-up if as_coded else torch.clamp(-x, min=0))
    n = len(z)
    return torch.stack([z[i] * z[(i - j) % n] for j in range(1, nu + 1) for i in range(n)])


def taylor(x):
    d = len(x)
    out = [torch.ones((), dtype=x.dtype)] + [x[i] / d**0.25 for i in range(d)]
    out += [x[i] ** 2 / (math.sqrt(2) * math.sqrt(d)) for i in range(d)]
    return torch.stack(out + [x[i] * x[j] / math.sqrt(d) for i in range(d) for j in range(i + 1, d)])


def layer_norm(x, gamma, beta, eps=1e-5):
    mean = x.mean()
    return (x - mean) / torch.sqrt(((x - mean) ** 2).mean() + eps) * gamma + beta


def rebased(x, gamma, beta, eps=1e-5):
    u, d = layer_norm(x, gamma, beta, eps), len(x)
    out = [u[i] ** 2 / math.sqrt(d) for i in range(d)]
    return torch.stack(out + [u[i] * u[j] * math.sqrt(2 / d) for i in range(d) for j in range(i + 1, d)])


def hadamard(x, w1, b1, w2, b2):
    return linear(x, w1, b1) * linear(x, w2, b2)


def cosformer_map(x, place, length):
    r, angle = torch.clamp(x, min=0), math.pi / 2 * place / length
    return torch.cat([r * math.cos(angle), r * math.sin(angle)])


def cosformer(q, k, v, *, length=None, causal=False, eps=0.0):
    """Eq. 7 (R) by its weights relu(q_i).relu(k_j) cos(pi/2 (i-j)/N), divided by their sum. q, k (B,H,T,D)."""
    batch, heads, size, _ = q.shape
    n = max(size, k.shape[2]) if length is None else length
    outs = []
    for b in range(batch):
        for h in range(heads):
            for i in range(size):
                y, total = torch.zeros(v.shape[3], dtype=q.dtype), torch.zeros((), dtype=q.dtype)
                for j in range(i + 1 if causal else k.shape[2]):
                    dot = (torch.clamp(q[b, h, i], min=0) * torch.clamp(k[b, h, j], min=0)).sum()
                    w = dot * math.cos(math.pi / 2 * (i - j) / n)
                    y, total = y + w * v[b, h, j], total + w
                outs.append(y / (total + eps))
    return torch.stack(outs).reshape(batch, heads, size, -1)


def every(f, x, *args):
    """f on each vector of x (..., D)."""
    flat = x.reshape(-1, x.shape[-1])
    return torch.stack([f(row, *args) for row in flat]).reshape(*x.shape[:-1], -1)
