"""Naive TTT-Linear in loops, in the form where the token that reads sets the rate. Its author has read neither code nor
tests."""

import math

import torch


def normed(z, eps):
    """-> LN(z) without affine, and the standard deviation used."""
    d = z - z.mean()
    std = torch.sqrt((d**2).mean() + eps)
    return d / std, std


def slope(k, v, weight, bias, ln_w, ln_b, eps):
    """Gradient of 1/2 |LN(z) w + c - (v - k)|^2 with respect to z = k W + b, in closed form."""
    z = (k[:, None] * weight).sum(0) + bias
    y, std = normed(z, eps)
    r = (y * ln_w + ln_b - (v - k)) * ln_w
    return (r - r.mean() - y * (r * y).mean()) / std


def slope_by_autograd(k, v, weight, bias, ln_w, ln_b, eps):
    """The same by autograd, for the check."""
    z = ((k[:, None] * weight).sum(0) + bias).detach().requires_grad_()
    loss = 0.5 * ((normed(z, eps)[0] * ln_w + ln_b - (v - k)) ** 2).sum()
    return torch.autograd.grad(loss, z)[0]


def ttt_linear(q, k, v, ln_w, ln_b, eta, mini_batch=16, eps=1e-6, state=None, gradient=slope, padded=False):
    """q, k, v (B,T,H,D), ln_w, ln_b (H,D), eta (B,T,H) or (B,T,H,1) -> out (B,T,H,D), W (B,H,D,D), b (B,H,D).

    padded: also the gradients of tokens of zeros that fill the last mini-batch, as in the published numbers' last b.
    """
    batch, length, heads, d = q.shape
    eta = eta.reshape(batch, length, heads)
    outs, ends, end_biases = [], [], []
    for b in range(batch):
        for h in range(heads):
            weight, bias = q.new_zeros(d, d), q.new_zeros(d)
            if state is not None:
                weight, bias = state[0][b, h], state[1][b, h].reshape(d)
            for start in range(0, length, mini_batch):
                d_weight, d_bias = torch.zeros_like(weight), torch.zeros_like(bias)
                stop = min(start + mini_batch, length)
                for t in range(start, stop):
                    g = gradient(k[b, t, h], v[b, t, h], weight, bias, ln_w[h], ln_b[h], eps)
                    d_weight = d_weight + k[b, t, h][:, None] * g[None, :]
                    d_bias = d_bias + g
                    mine = weight - eta[b, t, h] * d_weight
                    z = (q[b, t, h][:, None] / math.sqrt(d) * mine).sum(0) + bias - eta[b, t, h] * d_bias
                    outs.append(z + normed(z, eps)[0] * ln_w[h] + ln_b[h])
                if padded:
                    zero = torch.zeros_like(bias)
                    for _ in range(start + mini_batch - stop):
                        d_bias = d_bias + gradient(zero, zero, weight, bias, ln_w[h], ln_b[h], eps)
                weight = weight - eta[b, stop - 1, h] * d_weight
                bias = bias - eta[b, stop - 1, h] * d_bias
            ends.append(weight)
            end_biases.append(bias)
    out = torch.stack(outs).reshape(batch, heads, length, d).transpose(1, 2)
    return out, torch.stack(ends).reshape(batch, heads, d, d), torch.stack(end_biases).reshape(batch, heads, d)
