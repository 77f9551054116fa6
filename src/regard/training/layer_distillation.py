"""Layer by layer distillation: a mixer learns to give what another one gives, on real tokens alone.

It is how nets take the place of attention in the paper on the card of `regard.mixers.flat_feed_forward`.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.checks import checked, number
from regard.masks import padding


@checked()
def distillation_loss(
    student: Float[Tensor, "B T M"], teacher: Float[Tensor, "B T M"], keep: Bool[Tensor, "B T"] | None = None
) -> Float[Tensor, ""]:
    """The mean square of their differences at real tokens; no gradient reaches the teacher.

    Args:
        keep: True = a real token. Without any the loss is 0.
    """
    off = (student - teacher.detach()).square()
    if keep is None:
        return off.mean()
    return off.masked_fill(~keep[..., None], 0).sum() / (keep.sum() * student.shape[-1]).clamp(min=1)


def distill(
    student: nn.Module,
    teacher: Callable[..., Tensor],
    batches: Iterable[tuple[tuple[Tensor, ...], Bool[Tensor, "B S"] | None]],
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-9,
) -> list[float]:
    """Train `student` to do what `teacher` does with the same inputs; the loss of every batch.

    Adam with the paper's settings. Only the student's parameters that ask for gradients change: freeze an output
    projection that is the teacher's.

    Args:
        teacher: a mixer, or any function that is called as one is.
        batches: inputs of both, (x,) or (x, context), and the mask that both are called with, of the last of them,
            True = a real token; None hides nothing. A mask of x counts in the loss too.
    """
    number("distill", above=0, lr=lr, eps=eps)
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr, betas, eps)
    losses = []
    for inputs, mask in batches:
        given: dict[str, Any] = {} if mask is None else {"mask": padding(mask)}
        with torch.no_grad():
            wanted = teacher(*inputs, **given)
        loss = distillation_loss(student(*inputs, **given), wanted, mask if len(inputs) == 1 else None)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
