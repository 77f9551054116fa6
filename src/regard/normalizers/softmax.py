"""Softmax with hard masks: the normaliser of plain attention.

    a_ij = exp(s_ij - m_i) / sum_j' exp(s_ij' - m_i),   m_i = max_j s_ij,   over the allowed j only

A row without any allowed key (or whose allowed scores are all -inf) gets weights 0 and gradient 0.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.checks import checked
from regard.kernels.sums import summed_to_one
from regard.stages import Normalizer


def softmax(scores: Float[Tensor, "... S"], allowed: Bool[Tensor, "..."] | None = None) -> Float[Tensor, "... S"]:
    """Normalise the allowed entries of each row; the rest gets weight 0. Computes in at least fp32."""
    if scores.shape[-1] == 0:
        return scores
    z = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if allowed is not None:
        z = z.masked_fill(~allowed, -torch.inf)
    # An empty row is replaced by zeros before and after: exp(-inf - -inf) never arises, so neither does a NaN
    # gradient.
    empty = z.detach().amax(-1, keepdim=True) == -torch.inf
    weights = summed_to_one(torch.softmax(z.masked_fill(empty, 0), -1)).masked_fill(empty, 0)
    return weights.to(scores.dtype)


class Softmax(Normalizer):
    """The default normaliser. Partial rows can be merged exactly by their maximum and sum, so tiles are
    enough.
    """

    sees = "tile"  # type: ignore[assignment]
    is_softmax = True

    @checked()
    def forward(
        self, scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None = None
    ) -> Float[Tensor, "B H t S"]:
        return softmax(scores, allowed)
