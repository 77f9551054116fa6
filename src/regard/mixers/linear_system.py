"""A linear system with noise: how it decays, turns and spreads, and how far measurements are from what it says.

Features are complex, and lie as all real parts, then all imaginary parts, of a head.
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.kernels.problem import dots

Bias = Literal["covariance", "linear"]
FLAT = 1e-5
"""Decays below this are none."""


class Dynamics(NamedTuple):
    """dx = (mu + i omega) x dt + noise, as each head has it; F is 1 or D."""

    omega: Float[Tensor, "H D"]
    mu: Float[Tensor, "H F"]
    process: Float[Tensor, "H F"]
    """sigma^2."""
    key_noise: Float[Tensor, "H F"]
    """eta^2."""
    query_noise: Float[Tensor, "H F"]
    """gamma^2."""
    nu: Float[Tensor, " H"]
    tau: Float[Tensor, " H"]


def propagated_variance(
    distance: Float[Tensor, "*t"],
    mu: Float[Tensor, "*f"],
    process: Float[Tensor, "*f"],
    key_noise: Float[Tensor, "*f"],
    query_noise: Float[Tensor, "*f"],
) -> Float[Tensor, "*tf"]:
    """sigma^2 (1 - e^(2 mu d)) / (-2 mu) + eta^2 e^(2 mu d) + gamma^2: of a key's state at a query's time, for mu <= 0.

    All arguments broadcast. Where |mu| < 1e-5 the fraction is d, its limit.
    """
    flat = mu.abs() < FLAT
    grown = torch.where(flat, distance, torch.expm1(2 * mu * distance) / (2 * torch.where(flat, 1.0, mu)))
    return process * grown + key_noise * torch.exp(2 * mu * distance) + query_noise


def residual_square(
    q: Float[Tensor, "B H t W"], k: Float[Tensor, "B H S W"], left: Float[Tensor, "#B H t S"], *, full: bool = True
) -> Float[Tensor, "B H t S"]:
    """|q_i - E_ij k_j|^2 of turned queries and keys; its last term alone, -2 E_ij q_i . k_j, where not `full`.

    Args:
        left: E_ij, how much is left of a key at the time of a query.
    """
    product = -2 * left * dots(q, k)
    if not full:
        return product
    square = q.square().sum(-1)[..., None] + left.square() * k.square().sum(-1)[..., None, :]
    return (square + product).clamp(min=0)  # the difference of large numbers may round to less


def residual_squares(
    q: Float[Tensor, "B H t W"], k: Float[Tensor, "B H S W"], left: Float[Tensor, "#B H t S D"], *, full: bool = True
) -> Float[Tensor, "B H t S D"]:
    """The same of each complex feature."""
    (a, b), (c, d) = (z.unflatten(-1, (2, -1)).unbind(-2) for z in (q[..., :, None, :], k[..., None, :, :]))
    return (a - left * c).square() + (b - left * d).square() if full else -2 * left * (a * c + b * d)


class LinearSystem(nn.Module):
    """The linear system that a layer's heads learn. What its options leave out has no parameters.

    Args:
        heads, features: H and D.
        horizon: n, a length that decays and frequencies are counted in.
        isotropic: whether all features of a head decay alike.
        decay: whether there is a mu; without it is 0.
        learn_rotation: whether frequencies are learned; if not they are a geometric series.
        biases: which forms B and S have.
        eps: the least eta^2, gamma^2 and nu.
    """

    decay_logit: nn.Parameter | None
    process: nn.Parameter | None
    key_noise: nn.Parameter | None
    query_noise: nn.Parameter | None
    nu: nn.Parameter | None
    rotation: Tensor

    def __init__(
        self,
        heads: int,
        features: int,
        *,
        horizon: int,
        isotropic: bool,
        decay: bool,
        learn_rotation: bool,
        biases: tuple[Bias | None, Bias | None],
        eps: float,
    ) -> None:
        super().__init__()
        self.horizon, self.isotropic, self.learn_rotation, self.eps = horizon, isotropic, learn_rotation, eps
        each = (heads,) if isotropic else (heads, features // 2)
        noise = "covariance" in biases or biases[1] == "linear"
        used = {"decay_logit": decay, "process": noise, "key_noise": noise, "query_noise": "covariance" in biases}
        used["nu"] = biases[1] == "covariance" or biases[0] == "linear"
        for name, needed in used.items():
            size = (heads,) if name == "nu" else each
            self.register_parameter(name, nn.Parameter(torch.empty(size)) if needed else None)
        self.tau = nn.Parameter(torch.empty(heads))
        if learn_rotation:
            self.rotation = nn.Parameter(torch.empty(heads, features // 2))
        else:
            self.register_buffer("rotation", torch.empty(heads, features // 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal numbers before their bounds, but nu and tau, which start at 1."""
        for parameter in (self.decay_logit, self.process, self.key_noise, self.query_noise):
            if parameter is not None:
                nn.init.normal_(parameter)
        for parameter in (self.nu, self.tau):
            if parameter is not None:
                nn.init.ones_(parameter)
        if self.learn_rotation:
            nn.init.normal_(self.rotation)
        else:
            half = self.rotation.shape[1]
            with torch.no_grad():
                self.rotation.copy_(10000 ** (-torch.arange(half, device=self.rotation.device) / half))

    def forward(self, dtype: torch.dtype) -> Dynamics:
        """What the parameters say, within their bounds."""
        none = self.tau.new_zeros(self.tau.shape, dtype=dtype)

        def positive(z: Tensor | None, least: float) -> Tensor:
            return none if z is None else F.softplus(z.to(dtype)) + least

        def each(z: Tensor) -> Tensor:  # (H, 1), or (H, D) with both of a pair alike
            return z[:, None] if z.dim() == 1 else z.repeat_interleave(2, 1)

        turns = self.rotation.to(dtype) * (10 * math.pi / self.horizon)
        omega = torch.stack([turns, -turns], -1).flatten(-2)  # pairs of neighbours turn against each other
        mu = none if self.isotropic else none[:, None].expand_as(turns)
        if self.decay_logit is not None:
            mu = -torch.sigmoid(-self.decay_logit.to(dtype)) * (5 / self.horizon) - 1e-5
        process, key_noise = each(positive(self.process, 0)), each(positive(self.key_noise, self.eps))
        query_noise = each(positive(self.query_noise, self.eps))
        nu, tau = positive(self.nu, self.eps), self.tau.to(dtype)
        return Dynamics(omega, each(mu), process, key_noise, query_noise, nu, tau)
