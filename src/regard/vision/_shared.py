"""What convolutional layers share: maps that they take, a batch norm that checkpoints may run twice, a gate."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.checks import refuse
from regard.tracing import recomputing, transformed


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
    """torch's, whose backward holds 1/6 in float32 and has no forward mode; there it is written out."""
    return (z + 3).clamp(0, 6) / 6 if transformed(z) else F.hardsigmoid(z)
