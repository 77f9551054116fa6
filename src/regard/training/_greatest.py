"""The greatest value of a linear function, whose gradient is the place where it is taken."""

import torch
from jaxtyping import Float
from torch import Tensor

from regard.tracing import transformed


class _Greatest(torch.autograd.Function):
    """p.z of each row, with gradient p on z: where p is the best for z, what moves it changes nothing."""

    @staticmethod
    def forward(z: Tensor, p: Tensor) -> Tensor:
        return torch.where(p > 0, p * z, 0).sum(-1)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx, d: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        return d[..., None] * p, None


class _Transformed(_Greatest):
    """With rules for torch.func and forward mode, which torch.compile refuses to see."""

    generate_vmap_rule = True

    @staticmethod
    def jvp(ctx, dz: Tensor, _: Tensor | None) -> Tensor:
        (p,) = ctx.saved_tensors
        return (p * dz).sum(-1)


def greatest(z: Float[Tensor, "*n C"], p: Float[Tensor, "*n C"]) -> Float[Tensor, "*n"]:
    """p.z of each row, for the p that is best for z."""
    return (_Transformed if transformed(z, p) else _Greatest).apply(z, p)
