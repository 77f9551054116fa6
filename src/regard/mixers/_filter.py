"""Queries that filter keys and values as measurements of a linear system, some at a time."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.kernels.problem import combine
from regard.mixers.linear_system import Bias, Dynamics, propagated_variance, residual_square, residual_squares
from regard.normalizers.softmax import softmax

TILE_BYTES = 16 * 2**20
"""Weights formed at once."""


def filtered(
    q: Float[Tensor, "B H t W"],
    k: Float[Tensor, "B H S W"],
    v: Float[Tensor, "B H S W"],
    distance: Float[Tensor, "#B t S"],
    given: Dynamics,
    allowed: Bool[Tensor, "#B 1 t S"] | None,
    *,
    residual_metric: bool,
    robust: bool,
    additive: Bias | None,
    multiplicative: Bias | None,
) -> Float[Tensor, "B H t W"]:
    """sum_j A_ij E_ij v_j, of turned queries, keys and values. E and V are (B or 1, H, t, S, F)."""
    far, D = distance[:, None, :, :, None], q.shape[-1] // 2
    mu, process, key_noise, query_noise = (z[:, None, None] for z in given[1:5])
    nu, tau = (z[:, None, None, None] for z in given[5:])
    left = torch.exp((mu * far).clamp(-10, 10))
    bias, share = torch.zeros_like(left), torch.full_like(left, 1 / D)
    if "covariance" in (additive, multiplicative):
        variance = propagated_variance(far, mu, process, key_noise, query_noise)
        bias = -variance.log() if additive == "covariance" else bias
        share = 1 / (nu * D * variance) if multiplicative == "covariance" else share
    if additive == "linear":
        bias = -nu * far
    if multiplicative == "linear":
        share = 1 / (D * (process * far + key_noise))
    if left.shape[-1] == 1:
        off = residual_square(q, k, left[..., 0], full=residual_metric)[..., None] * share
    else:
        off = (residual_squares(q, k, left, full=residual_metric) * share).sum(-1, keepdim=True)
    scores = tau.square() * (bias - (off.log1p() if robust else off))
    if left.shape[-1] == 1:
        return combine(softmax(scores[..., 0], allowed) * left[..., 0], v)
    each = scores.expand(*scores.shape[:-1], D).movedim(-1, 2)  # every feature has weights of its own
    weights = softmax(each, None if allowed is None else allowed[:, :, None]) * left.movedim(-1, 2)
    return torch.einsum("bhcts,bhsrc->bhtrc", weights, v.unflatten(-1, (2, -1))).flatten(-2)
