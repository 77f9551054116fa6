"""What convolutional layers share: maps that they take, a batch norm that checkpoints may run twice, a gate."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.checks import refuse
from regard.tracing import recomputing, transformed

SLOPE = 0.1666666716337204
"""1/6 in float32."""


def no_empty_map(who: object, x: Float[Tensor, "B C Y X"], least: int = 1) -> None:
    """Refuse maps with sides below `least`, on which torch's convolutions, pools or norms fail somewhere inside."""
    if min(x.shape[2:]) < least:
        what = "has no pixels" if 0 in x.shape[2:] else "is too small a map"
        refuse(who, "x", what, tuple(x.shape), f"(B, C, Y, X) with both sides {least} or more")


class MapNorm(nn.BatchNorm2d):
    """torch's, whose running statistics move once a step even where a checkpoint runs `forward` again."""

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        if self.training and recomputing() and self.running_mean is not None and self.running_var is not None:
            moved = (self.running_mean.clone(), self.running_var.clone())
            return F.batch_norm(x, *moved, self.weight, self.bias, True, 0.0, self.eps)
        return super().forward(x)


def hard_sigmoid(z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """torch's, which has no forward mode; there it is written out, with the slope that its backward has: 1/6 as a
    float32 number."""
    if not transformed(z):
        return F.hardsigmoid(z)
    sixths = (z + 3).clamp(0, 6)
    return SLOPE * sixths + (sixths / 6 - SLOPE * sixths).detach()
