"""What gates of feature maps share: a map is multiplied by numbers that are made of it."""

from collections.abc import Callable
from typing import Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from regard.checks import checked, choice, number, whole
from regard.tracing import recomputing


def hard_sigmoid(z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """The sigmoid in three straight pieces; torch's own has 1/6 as a float32 number in its backward."""
    return (z + 3).clamp(0, 6) / 6


def hard_swish(z: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    return z * hard_sigmoid(z)


Squash = Literal["sigmoid", "hard_sigmoid"]
Activation = Literal["relu", "silu", "hard_swish"]
SQUASHES: dict[str, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "hard_sigmoid": hard_sigmoid}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "hard_swish": hard_swish}


def inner_width(
    who: object, dim: int, inner_dim: int | None, reduction: float, *, least: int = 1, multiple: int = 1
) -> int:
    """R: `inner_dim` itself, or else dim / reduction as the nearest multiple that is not below `least`."""
    whole(who, dim=dim)
    number(who, above=0, reduction=reduction)
    if inner_dim is not None:
        whole(who, inner_dim=inner_dim)
        return inner_dim
    return max(least, multiple, int(dim / reduction + multiple / 2) // multiple * multiple)


class Bottleneck(nn.Module):
    """Two linear maps of channels, C -> R -> `out`, with an activation, and maybe a norm, between them.

    Args:
        dim, inner_dim: C and R.
        out: default C.
        norm: over the R channels.
    """

    def __init__(
        self,
        dim: int,
        inner_dim: int,
        *,
        out: int | None = None,
        bias: bool = True,
        norm: nn.Module | None = None,
        activation: Activation = "relu",
    ) -> None:
        super().__init__()
        choice(self, ACTIVATIONS, activation=activation)
        self.activation = activation
        self.down = nn.Linear(dim, inner_dim, bias=bias)
        self.norm = nn.Identity() if norm is None else norm
        self.up = nn.Linear(inner_dim, dim if out is None else out, bias=bias)

    def forward(self, z: Float[Tensor, "B C"]) -> Float[Tensor, "B out"]:
        z = self.down(z)
        z = batch_normed(self.norm, z) if isinstance(self.norm, nn.BatchNorm1d) else self.norm(z)
        return self.up(ACTIVATIONS[self.activation](z))


class MapGate(nn.Module):
    """A feature map times its gate."""

    dim: int

    def gate(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "#B #C #Y #X"]:
        """What x is multiplied by."""
        raise NotImplementedError

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C Y X"]:
        return x * self.gate(x)


def batch_normed(norm: nn.Module, z: Float[Tensor, "B C *sizes"]) -> Float[Tensor, "B C *sizes"]:
    """A batch norm; a checkpoint's second run, behind which its statistics have moved already, moves copies."""
    if recomputing():
        return cast(Tensor, functional_call(norm, {name: b.clone() for name, b in norm.named_buffers()}, (z,)))
    return cast(Tensor, norm(z))


def means(x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B C"]:
    """Of each channel over its places."""
    return x.mean((2, 3))
