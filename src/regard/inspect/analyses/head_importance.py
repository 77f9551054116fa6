"""Head importance: how much the loss feels each head; ablation of heads and greedy pruning.

`token_importance` is what the authors' code computes: absolute values token by token, where the formula sums over an
example's tokens first; the two rank heads differently.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import checked, fits, number, refuse, whole

CARD = Card(
    "head_importance",
    equation="""head h of layer l puts out xi[l, h] Att_h(x)        I[l, h] = E_x |dL(x) / d xi[l, h]| at xi = 1
normalised: I[l, h] / (sum_h' I[l, h']^2)^(1/2)     pruned: the heads of least I over all layers""",
    papers=(
        Paper(
            "Are Sixteen Heads Really Better than One?",
            "Michel, Levy, Neubig",
            2019,
            "1905.10650",
            "abstract; the authors' code; formulas quoted by a review",
        ),
    ),
    protocol="Analysis",
    supports=set(),
    cost=Cost("B*H*T*D", ""),
    claim="Heads can go without retraining: the least important quarter of a small model costs little, the most "
    "important one more: tests/inspect/analyses/test_head_importance.py::test_the_least_important_heads_can_go.",
    verified="third-party",
)

Gates = Float[Tensor, "L H"]
Loss = Callable[[Gates], Float[Tensor, "*B"]]
"""Runs the model with its heads scaled by the gates; one loss, or one for each example."""


@CARD.function
def head_importance(
    losses: Loss | Sequence[Loss], num_layers: int, num_heads: int, *, gates: Gates | None = None
) -> Float[Tensor, "L H"]:
    """E_x |dL(x) / d gates|: how much the loss feels each head. Normalise the layers before comparing across them.

    Args:
        losses: from gates (num_layers, num_heads) to the losses (B,) of a batch of examples, each of which counts, or
            to one loss (), which counts as one example. Several for several batches. With a transformers model:
            `with scale_heads(model, gates): return cross_entropy(model(**batch).logits, labels, reduction="none")`.
        gates: where the gradient is taken; default all 1. Pruned heads are those at 0.

    Raises:
        ValueError: sizes below 1, losses that don't hang on the gates.
    """
    whole("head_importance", num_layers=num_layers, num_heads=num_heads)
    start = torch.ones(num_layers, num_heads) if gates is None else gates.detach().clone()
    fits("head_importance", "L H", {"L": num_layers, "H": num_heads}, gates=start)
    total, examples = torch.zeros_like(start), 0
    for loss in [losses] if callable(losses) else losses:
        at = start.clone().requires_grad_()
        value = loss(at)
        if value.dim() > 1 or not value.requires_grad:
            got = f"shape {tuple(value.shape)}, requires_grad={value.requires_grad}"
            refuse("head_importance", "losses", "give what has no gradient", got, "() or (B,), computed from the gates")
        for one in value.reshape(-1):
            (gradient,) = torch.autograd.grad(one, at, retain_graph=True, allow_unused=True, materialize_grads=True)
            total += gradient.abs()
        examples += value.numel()
    if not examples:
        refuse("head_importance", "losses", "give no example", examples, "one at least")
    return total / examples


@checked()
def gate_importance(outputs: Float[Tensor, "L B H T D"], gradients: Float[Tensor, "L B H T D"]) -> Float[Tensor, "L H"]:
    """The same from head outputs before the output projection and dL(x)/d outputs, one loss for each example."""
    return (outputs * gradients).sum((-1, -2)).abs().mean(1)


@checked()
def token_importance(
    outputs: Float[Tensor, "L B H T D"],
    gradients: Float[Tensor, "L B H T D"],
    mask: Bool[Tensor, "B T"],
    *,
    last_reads_one_token: bool = True,
) -> Float[Tensor, "L H"]:
    """As the authors' code has it: |sum_d o dL/do| for each token, summed, divided by the tokens that `mask` keeps.

    Args:
        last_reads_one_token: divide the last layer's by the examples: a classifier reads only one token of it.
    """
    L, B = outputs.shape[:2]
    count = mask.sum().to(outputs.dtype).repeat(L)
    if last_reads_one_token:
        count[-1] = B
    return (outputs * gradients).sum(-1).abs().sum((1, 3)) / count[:, None]


def normalize_layers(importance: Float[Tensor, "L H"]) -> Float[Tensor, "L H"]:
    """Each layer divided by its Euclidean length, so that layers compare."""
    return importance / (importance.norm(dim=1, keepdim=True) + 1e-20)


class Ablation(NamedTuple):
    """What a score becomes, and what it is with all heads."""

    full: Float[Tensor, ""]
    without: Float[Tensor, "L H"]
    """With that head alone off."""
    only: Float[Tensor, "L H"]
    """With all other heads of its layer off."""


def ablate(score: Callable[[Gates], float], num_layers: int, num_heads: int) -> Ablation:
    """Each head off, and each layer reduced to each of its heads: 1 + 2 L H runs of `score`, without gradients."""
    whole("ablate", num_layers=num_layers, num_heads=num_heads)

    def run(gates: Tensor) -> float:
        with torch.no_grad():
            return float(score(gates))

    full = torch.ones(num_layers, num_heads)
    without, only = torch.zeros(num_layers, num_heads), torch.zeros(num_layers, num_heads)
    for layer in range(num_layers):
        for head in range(num_heads):
            off, alone = full.clone(), full.clone()
            off[layer, head] = 0
            alone[layer] = 0
            alone[layer, head] = 1
            without[layer, head], only[layer, head] = run(off), run(alone)
    return Ablation(torch.tensor(run(full)), without, only)


@checked()
def prune(importance: Float[Tensor, "L H"], shares: Sequence[float], *, keep: int = 0) -> list[Bool[Tensor, "L H"]]:
    """Which heads stay (True) once int(share * L H) of those of least importance, over all layers, are gone.

    A greater share prunes what a smaller one does, and more. Where heads tie, the first goes first. To rank anew after
    each step, call `head_importance` with the gates of the last one and prune again.

    Args:
        importance: usually normalised by layer.
        shares: of all heads, from 0 to 1.
        keep: so many best heads of each layer stay in any case.
    """
    L, H = importance.shape
    whole("prune", 0, most=H, keep=keep)
    for n, share in enumerate(shares):
        number("prune", least=0, most=1, **{f"shares[{n}]": share})
    if bool((wrong := ~importance.isfinite()).any()):
        refuse("prune", "importance", "is not finite everywhere", float(importance[wrong][0]), "finite numbers")
    rank = importance.clone()
    best = rank.sort(dim=1, descending=True, stable=True).indices[:, :keep]
    rank.scatter_(1, best, torch.inf)
    order = rank.flatten().sort(stable=True).indices
    kept = []
    for share in shares:
        count = min(int(L * H * share + 1e-9), L * H - keep * L)  # 0.07 * 100 is a little less than 7
        gates = torch.ones(L * H, dtype=torch.bool, device=importance.device)
        gates[order[:count]] = False
        kept.append(gates.reshape(L, H))
    return kept
