"""HeadMask: in training some heads are silenced at every step, so that none is leaned on too much.

    O'_h = xi_h O_h        xi_h = 0 for the masked heads of this step, else 1; all 1 outside training
    random: drawn among all        important: those with the greatest mean |dL / d xi_h| over the batch's samples

Sun, Huang, Dai, Chen 2022, "Alleviating the Inequality of Attention Heads for Neural Machine Translation"
(https://arxiv.org/abs/2009.09672): abstract and the names of its variants read; the importance is that of Michel et
al. 2019 (https://arxiv.org/abs/1905.10650, as others quote it), on which the paper builds. Inferred: heads are chosen
across all layers together, and what remains is not scaled up.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard._former import FEATURES, PLAIN, Card, Cost, Paper, register
from regard.shapes import HeadShape
from regard.stages import Gate, GateSite


class HeadMask(Gate):
    """Scales each head's output by xi, in training only. Which heads are silent is set between steps, from outside."""

    site: GateSite = "output"
    xi: Tensor

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"HeadMask: num_heads must be at least 1 (got {num_heads})")
        self.register_buffer("xi", torch.empty(num_heads), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """No head is masked."""
        nn.init.ones_(self.xi)

    def forward(self, z: Tensor, x: Float[Tensor, "B T M"], at: GateSite) -> Tensor:
        if at != self.site or not self.training:
            return z
        return z * self.xi[:, None, None].to(z.dtype)

    def extra_repr(self) -> str:
        return str(len(self.xi))


def head_masks(model: nn.Module) -> list[HeadMask]:
    """All of a model's, in order; raises if there are none."""
    found = [part for part in model.modules() if isinstance(part, HeadMask)]
    if not found:
        raise ValueError(f"HeadMask: {type(model).__name__} has no HeadMask gate; build its attention with 'headmask'")
    return found


def unmask(model: nn.Module) -> None:
    """Let all heads speak."""
    for part in head_masks(model):
        part.reset_parameters()


def mask_random(model: nn.Module, count: int, *, generator: torch.Generator | None = None) -> None:
    """Silence `count` of all the model's heads, drawn at random, until the next call."""
    parts = head_masks(model)
    total = sum(len(part.xi) for part in parts)
    _silence(parts, torch.randperm(total, generator=generator)[: _checked(count, total)])


def mask_important(model: nn.Module, count: int, loss: Callable[[], Float[Tensor, ""]]) -> None:
    """Silence the `count` heads whose absence would change the loss most, until the next call."""
    parts = head_masks(model)
    importance = head_importance(model, loss)
    _silence(parts, importance.topk(_checked(count, len(importance))).indices)


def head_importance(model: nn.Module, loss: Callable[[], Float[Tensor, ""]]) -> Float[Tensor, "N"]:
    """Mean over samples of |dL / d xi|, for all the model's heads, none masked. `loss` runs the model on the batch.

    dL / d xi_h is what the head puts out times the loss's gradient there, summed over tokens and channels.
    """
    parts = head_masks(model)
    before, out = [part.xi for part in parts], {}

    def keep(part: nn.Module, given: tuple[Tensor, Tensor, GateSite], z: Tensor) -> None:
        if given[2] == HeadMask.site:
            out[part] = z

    hooks = [part.register_forward_hook(keep) for part in parts]
    try:
        for part in parts:
            part.xi = torch.ones_like(part.xi)
        with torch.enable_grad():
            value = loss()
        missing = sum(part not in out for part in parts)
        if missing:
            raise ValueError(f"HeadMask: the loss does not run all attention of the model ({missing} layers missing)")
        heads = [out[part] for part in parts]
        grads = torch.autograd.grad(value, heads)
    finally:
        for part, xi, hook in zip(parts, before, hooks, strict=True):
            part.xi = xi
            hook.remove()
    found = [(z.detach() * g).double().sum((2, 3)).abs().mean(0) for z, g in zip(heads, grads, strict=True)]
    return torch.cat([importance.cpu() for importance in found])


def _silence(parts: Sequence[HeadMask], heads: Int[Tensor, "count"]) -> None:
    keep = torch.ones(sum(len(part.xi) for part in parts))
    keep[heads] = 0
    for part, xi in zip(parts, keep.split([len(part.xi) for part in parts]), strict=True):
        part.xi = xi.to(part.xi)


def _checked(count: int, total: int) -> int:
    if not 0 <= count <= total:
        raise ValueError(f"HeadMask: cannot mask {count} of {total} heads; expected 0 to {total}")
    return count


def _slots(shape: HeadShape) -> dict[str, object]:
    return {"gate": HeadMask(shape.num_heads)}


CARD = register(
    Card(
        name="headmask",
        family="training",
        gist="Silences random or the most important heads of a training step.",
        equation="O'_h = xi_h O_h, xi_h = 0 for masked heads",
        paper=Paper(
            "Alleviating the Inequality of Attention Heads for Neural Machine Translation",
            "Sun, Huang, Dai, Chen",
            2022,
            "2009.09672",
            "abstract",
        ),
        slots=_slots,
        supports=FEATURES,
        traits=PLAIN,
        cost=Cost("2*B*H*T*S*D", "2*S*G*D"),
        claim="After training, heads put out more equally than without masks: tests/training/test_headmask.py.",
        differs=("Heads are chosen across all layers together, and the rest is not scaled up: both inferred.",),
        verified="reconstructed",
    )
)
