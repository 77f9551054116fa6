"""Adaptive filter attention, isotropic, in loops, from the equations alone, by somebody who has read neither code nor
test."""

import math

import torch
import torch.nn.functional as F

from naive import linear, softmax


def project(x, weight, bias, b, t, h, d, heads):
    """D complex features of head h: real parts first, then imaginary parts, each head-major."""
    y = linear(x[b, t], weight, bias)
    return torch.complex(y[h * d : (h + 1) * d], y[heads * d + h * d : heads * d + (h + 1) * d])


def rms(z, gamma):
    mean = (z.real**2 + z.imag**2).sum() / (2 * z.shape[0])
    return z / torch.sqrt(mean + 1e-6) * gamma


def variance(mu, dist, sigma2, eta2, gamma2):
    frac = dist if abs(float(mu.detach())) < 1e-5 else torch.expm1(2 * mu * dist) / (2 * mu)
    return sigma2 * frac + eta2 * torch.exp(2 * mu * dist) + gamma2


def adaptive_filter(
    x,
    p,
    heads,
    n,
    eps=1e-5,
    residual_metric=True,
    robust=True,
    additive="covariance",
    multiplicative="covariance",
    rotate_values=True,
    decay=True,
    inner_residual=None,
    gate=None,
    predict_next=False,
    times=None,
    causal=True,
):
    """x (B,T,M) -> out (B,T,M), weights (B,H,T,T) before the decay.

    p: names (W_q.weight, mu_v, lambda_imag_v, ..., cn_q.gamma where normalised, as (H,D)); n: the layer's
    training length; gate: logits (H,D).
    """
    batch, length, _ = x.shape
    d = p["W_q.weight"].shape[0] // (2 * heads)
    t = [float(a) for a in (range(length) if times is None else times)]
    outs, weights = [], []
    for b in range(batch):
        per_head, rows = [], []
        for h in range(heads):
            mu = (torch.sigmoid(p["mu_v"][h]) - 1) * 10 / (2 * n) - 1e-5
            if not decay:  # inferred: mu = 0
                mu = torch.zeros_like(mu)
            om = [p["lambda_imag_v"][h, c] * 10 * 2 * math.pi / (2 * n) for c in range(d // 2)]
            omega = torch.stack([s * o for o in om for s in (1, -1)])
            sigma2, eta2 = F.softplus(p["sigma_v"][h]), F.softplus(p["eta_v"][h]) + eps
            gamma2, nu = F.softplus(p["gamma_v"][h]) + eps, F.softplus(p["nu_sqrt"][h]) + eps
            z = {
                c: [project(x, p[f"W_{c}.weight"], p[f"W_{c}.bias"], b, i, h, d, heads) for i in range(length)]
                for c in "qkv"
            }
            raw_v = z["v"]
            for c in "qkv":
                if f"cn_{c}.gamma" in p:
                    z[c] = [rms(a, p[f"cn_{c}.gamma"][h]) for a in z[c]]
            ys = []
            for i in range(length):
                seen = [j for j in range(length) if j <= i or not causal]
                scores, es = [], []
                for j in seen:
                    dist = abs(t[i] - t[j])
                    e = torch.exp(torch.clamp(mu * dist, -10, 10))
                    moved = e * torch.exp(1j * omega * (t[i] - t[j])) * z["k"][j]
                    if residual_metric:
                        r = ((z["q"][i] - moved).abs() ** 2).sum()
                    else:
                        r = -2 * (z["q"][i].conj() * moved).sum().real
                    v = variance(mu, dist, sigma2, eta2, gamma2)
                    bias = {"covariance": -torch.log(v), "linear": -nu * dist, None: 0.0 * nu}[additive]
                    s = {"covariance": 1 / (nu * d * v), "linear": 1 / (d * (sigma2 * dist + eta2)), None: 1.0 / d}[
                        multiplicative
                    ]
                    scores.append(p["tau"][h] ** 2 * (bias - (torch.log(1 + r * s) if robust else r * s)))
                    es.append(e)
                a = softmax(scores)
                y = 0
                for w, e, j in zip(a, es, seen, strict=True):
                    y = y + w * e * torch.exp(1j * omega * ((t[i] if rotate_values else 0.0) - t[j])) * z["v"][j]
                if inner_residual == "gate":
                    g = torch.sigmoid(gate[h])
                    y = g * y + (1 - g) * raw_v[i]
                elif inner_residual == "add":
                    y = y + raw_v[i]
                if predict_next:
                    y = torch.exp(mu + 1j * omega) * y
                ys.append(y)
                row = [torch.zeros((), dtype=x.dtype)] * length
                for w, j in zip(a, seen, strict=True):
                    row[j] = w
                rows.append(torch.stack(row))
            per_head.append(ys)
        weights.append(torch.stack(rows).reshape(heads, length, length))
        outs.append(
            torch.stack(
                [
                    linear(
                        torch.cat(
                            [per_head[h][i].real for h in range(heads)] + [per_head[h][i].imag for h in range(heads)]
                        ),
                        p["W_o.weight"],
                        p["W_o.bias"],
                    )
                    for i in range(length)
                ]
            )
        )
    return torch.stack(outs), torch.stack(weights)
