"""Dynamic convolution attention and GMM attention written out with loops."""

import math

import torch
from torch import Tensor


def naive_beta_binomial(length: int, a: float = 0.1, b: float = 0.9) -> list[float]:
    """pmf of k = 0 .. length - 1 under BetaBinomial(length - 1, a, b)."""
    n = length - 1

    def log_beta(x: float, y: float) -> float:
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    return [math.comb(n, k) * math.exp(log_beta(k + a, n - k + b) - log_beta(a, b)) for k in range(length)]


def naive_dca(
    s: Tensor,
    alpha: Tensor,
    F: Tensor,
    W: Tensor,
    bW: Tensor,
    Vg: Tensor,
    U: Tensor,
    Tm: Tensor,
    bT: Tensor,
    v: Tensor,
    keep: Tensor | None = None,
    *,
    Kd: int,
    prior: list[float] | None = None,
) -> Tensor:
    """Dynamic convolution attention over T steps -> weights (B, T, S).

    s (B, T, Dq) decoder states, alpha (B, S) weights before the first step, F (Cs, Ks) static filters, W (A, Dq),
    bW (A), Vg (Cd * Kd, A) makes the dynamic filters (channel-major), U (A, Cs), Tm (A, Cd), bT (A), v (A), keep (B, S)
    True = a real position (others -inf before the softmax).
      f_jc = sum_k F[c,k] alpha[j + k - (Ks-1)/2]     g likewise with G_t = reshape(Vg tanh(W s_t + bW), (Cd, Kd))
      p_j  = log max(sum_k P_k alpha[j - k], 1e-6)             e_j = v . tanh(U f_j + Tm g_j + bT) + p_j
      alpha_t = softmax_j(e_j)
    """
    B, T, _ = s.shape
    S, A = alpha.shape[1], v.shape[0]
    P = naive_beta_binomial(11) if prior is None else prior
    Cd = Vg.shape[0] // Kd

    def convolved(filters: Tensor, weights: Tensor, j: int) -> Tensor:
        channels, size = filters.shape
        out = []
        for c in range(channels):
            total = weights.new_zeros(())
            for k in range(size):
                at = j + k - (size - 1) // 2
                if 0 <= at < S:
                    total = total + filters[c, k] * weights[at]
            out.append(total)
        return torch.stack(out)

    samples = []
    for b in range(B):
        weights, steps = alpha[b], []
        for t in range(T):
            hidden = torch.stack([torch.tanh(torch.dot(W[a], s[b, t]) + bW[a]) for a in range(A)])
            flat = [torch.dot(Vg[r], hidden) for r in range(Cd * Kd)]
            G = torch.stack([torch.stack(flat[c * Kd : (c + 1) * Kd]) for c in range(Cd)])
            energies: list[Tensor | None] = []
            for j in range(S):
                if keep is not None and not bool(keep[b, j]):
                    energies.append(None)
                    continue
                f, g = convolved(F, weights, j), convolved(G, weights, j)
                mass = weights.new_zeros(())
                for k, share in enumerate(P):
                    if j - k >= 0:
                        mass = mass + share * weights[j - k]
                energy = torch.log(mass) if float(mass) > 1e-6 else weights.new_tensor(math.log(1e-6))
                for a in range(A):
                    energy = energy + v[a] * torch.tanh(torch.dot(U[a], f) + torch.dot(Tm[a], g) + bT[a])
                energies.append(energy)
            given = [e for e in energies if e is not None]
            largest = max(float(e) for e in given)
            total = sum(((e - largest).exp() for e in given), weights.new_zeros(()))
            weights = torch.stack(
                [weights.new_zeros(()) if e is None else (e - largest).exp() / total for e in energies]
            )
            steps.append(weights)
        samples.append(torch.stack(steps))
    return torch.stack(samples)


def naive_gmm(
    raw: Tensor,
    S: int,
    mu: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    version: str = "V2",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """GMM attention over T steps: raw (B, T, 3K) holds w^, d^, s^ -> weights (B, T, S) and last means (B, K).

    mu_t = mu_{t-1} + Delta_t; alpha_tj = sum_k w_k / Z_k exp(-(j - mu_k)^2 / (2 sigma_k^2)), j = 0 .. S - 1.
      V0: Z = 1, w = exp w^, Delta = exp d^, sigma = sqrt(exp(-s^) / 2)
      V1: Z = sqrt(2 pi) sigma, w = softmax w^, Delta = exp d^, sigma = sqrt(exp s^)
      V2: Z = sqrt(2 pi) sigma, w = softmax w^, Delta = softplus d^, sigma = softplus s^
    eps is added to sigma, in Z also. keep (B, S): weight 0 where False.
    """
    B, T, three = raw.shape
    K = three // 3

    def softplus(z: Tensor) -> Tensor:
        return z.clamp_min(0) + torch.log1p((-z.abs()).exp())

    samples, means = [], []
    for b in range(B):
        mean = [raw.new_zeros(()) for _ in range(K)] if mu is None else [mu[b, k] for k in range(K)]
        steps = []
        for t in range(T):
            w_, d_, s_ = raw[b, t, :K], raw[b, t, K : 2 * K], raw[b, t, 2 * K :]
            total = (w_ - w_.max().detach()).exp().sum()
            row = [raw.new_zeros(()) for _ in range(S)]
            for k in range(K):
                share = w_[k].exp() if version == "V0" else (w_[k] - w_.max().detach()).exp() / total
                mean[k] = mean[k] + (softplus(d_[k]) if version == "V2" else d_[k].exp())
                if version == "V0":
                    sigma = ((-s_[k]).exp() / 2).sqrt() + eps
                    Z = raw.new_ones(())
                else:
                    sigma = (s_[k].exp().sqrt() if version == "V1" else softplus(s_[k])) + eps
                    Z = math.sqrt(2 * math.pi) * sigma
                for j in range(S):
                    if keep is None or bool(keep[b, j]):
                        row[j] = row[j] + share / Z * (-((j - mean[k]) ** 2) / (2 * sigma**2)).exp()
            steps.append(torch.stack(row))
        samples.append(torch.stack(steps))
        means.append(torch.stack(mean))
    return torch.stack(samples), torch.stack(means)


def naive_location(weights: Tensor, H: Tensor) -> Tensor:
    """weights (B, T, S), memory H (B, S, V) -> contexts c_t = sum_j alpha_tj H_j (B, T, V)."""
    out = []
    for b in range(H.shape[0]):
        rows = []
        for t in range(weights.shape[1]):
            c = H.new_zeros(H.shape[-1])
            for j in range(H.shape[1]):
                if float(weights[b, t, j].detach()) != 0:
                    c = c + weights[b, t, j] * H[b, j]
            rows.append(c)
        out.append(torch.stack(rows))
    return torch.stack(out)
