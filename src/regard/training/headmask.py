"""HeadMask: training silences some heads at every step, so that none is leaned on too much."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.cards import PLAIN, Card, Paper
from regard.checks import refuse, whole
from regard.stages import Gate, GateSite

CARD = Card(
    "headmask",
    equation="""O'_h = xi_h O_h,   xi_h = 0 for the masked heads of this step, else 1; all 1 outside training
random: drawn among all        important: those with the greatest mean |dL / d xi_h| over the batch's samples""",
    papers=(
        Paper(
            "Alleviating the Inequality of Attention Heads for Neural Machine Translation",
            "Sun, Huang, Dai, Chen",
            2022,
            "2009.09672",
            "abstract; the names of its variants",
        ),
        Paper(
            "Are Sixteen Heads Really Better than One?",
            "Michel, Levy, Neubig",
            2019,
            "1905.10650",
            "the importance of heads, on which the first builds, as others quote it",
        ),
    ),
    traits=PLAIN,
    claim="After training, heads put out more equally than without masks: "
    "tests/training/test_headmask.py::test_heads_come_to_matter_more_equally.",
    differs=("Heads are chosen across all layers together, and what remains is not scaled up: both inferred.",),
    verified="reconstructed",
)


@CARD.fills("gate")
class HeadMask(Gate):
    """Scales each head's output by xi, in training only. Which heads are silent is set between steps, from outside."""

    site: GateSite = "output"
    xi: Tensor

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        whole(self, num_heads=num_heads)
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
        refuse("headmask", "model", "has no HeadMask gate", type(model).__name__, "attention built with 'headmask'")
    return found


def unmask(model: nn.Module) -> None:
    """Let all heads speak."""
    for part in head_masks(model):
        part.reset_parameters()


def mask_random(model: nn.Module, count: int, *, generator: torch.Generator | None = None) -> None:
    """Silence `count` of all the model's heads, drawn at random, until the next call."""
    parts = head_masks(model)
    total = sum(len(part.xi) for part in parts)
    whole("mask_random", 0, most=total, count=count)
    _silence(parts, torch.randperm(total, generator=generator)[:count])


def mask_important(model: nn.Module, count: int, loss: Callable[[], Float[Tensor, ""]]) -> None:
    """Silence the `count` heads whose absence would change the loss most, until the next call."""
    parts = head_masks(model)
    importance = head_importance(model, loss)
    whole("mask_important", 0, most=len(importance), count=count)
    _silence(parts, importance.topk(count).indices)


def head_importance(model: nn.Module, loss: Callable[[], Float[Tensor, ""]]) -> Float[Tensor, " N"]:
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
            refuse(
                "head_importance", "loss", "does not run all attention of the model", f"{missing} layers missing", "all"
            )
        heads = [out[part] for part in parts]
        grads = torch.autograd.grad(value, heads)
    finally:
        for part, xi, hook in zip(parts, before, hooks, strict=True):
            part.xi = xi
            hook.remove()
    found = [(z.detach() * g).double().sum((2, 3)).abs().mean(0) for z, g in zip(heads, grads, strict=True)]
    return torch.cat([importance.cpu() for importance in found])


def _silence(parts: Sequence[HeadMask], heads: Int[Tensor, " count"]) -> None:
    keep = torch.ones(sum(len(part.xi) for part in parts))
    keep[heads] = 0
    for part, xi in zip(parts, keep.split([len(part.xi) for part in parts]), strict=True):
        part.xi = xi.to(part.xi)
