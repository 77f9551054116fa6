"""Mega's multi-dimensional damped moving average: N of them for each channel, mixed."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.mixers.exponential import exponential_sum, lags, work_dtype


def damped_ema(
    x: Float[Tensor, "B T M"],
    alpha: Float[Tensor, "M N"],
    delta: Float[Tensor, "M N"],
    beta: Float[Tensor, "M N"],
    eta: Float[Tensor, "M N"],
    state: Float[Tensor, "B M N"] | None = None,
) -> tuple[Float[Tensor, "B T M"], Float[Tensor, "B M N"]]:
    """sum_n eta_n h_{t,n} / sqrt(N) and the last h / (alpha beta), from 0 < alpha, delta < 1.

    The state leaves out the factor alpha beta, which every summand of it has.
    """
    alpha, delta, beta, eta = (p.to(work_dtype(x)) for p in (alpha, delta, beta, eta))
    powers = (1 - alpha * delta)[..., None] ** lags(x)
    return exponential_sum(x, powers, alpha * beta * eta / math.sqrt(alpha.shape[1]), state)


class DampedAverage(nn.Module):
    """The average over the past, and unless `causal` a second one over the future added to it.

    Shapes: x (B, T, M), state (B, M, N) or None -> the averages (B, T, M) and the state after the last token.
    """

    def __init__(
        self,
        dim: int,
        ema_dim: int,
        *,
        causal: bool,
    ) -> None:
        super().__init__()
        ways = 1 if causal else 2
        alpha, delta, beta, eta = (torch.empty(ways, dim, ema_dim) for _ in range(4))
        self.alpha, self.delta, self.beta, self.eta = (nn.Parameter(p) for p in (alpha, delta, beta, eta))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """alpha and delta stand before their sigmoid; beta alternates in sign, which the authors found stabler."""
        for p, std in ((self.alpha, 0.2), (self.delta, 0.2), (self.beta, 0.02), (self.eta, 1.0)):
            nn.init.normal_(p, std=std)
        with torch.no_grad():
            self.beta[..., ::2] += 1
            self.beta[..., 1::2] -= 1

    def forward(
        self, x: Float[Tensor, "B T M"], state: Float[Tensor, "B M N"] | None = None
    ) -> tuple[Float[Tensor, "B T M"], Float[Tensor, "B M N"]]:
        work = work_dtype(x)
        ways = list(zip(*(p.to(work).unbind(0) for p in (self.alpha, self.delta, self.beta, self.eta)), strict=True))

        def run(way: tuple[Tensor, ...], x: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
            alpha, delta, beta, eta = way
            return damped_ema(x, alpha.sigmoid(), delta.sigmoid(), beta, eta, state)

        average, last = run(ways[0], x, state)
        for way in ways[1:]:
            average = average + run(way, x.flip(1), None)[0].flip(1)
        return average, last
