"""Fenchel-Young losses: what cross-entropy is to softmax, for entmax, normmax and budget sparsemax.

A loss is 0 exactly where the prediction is the target, which sparse maps reach with scores that are finite. Its
gradient on the scores is the prediction less the target, and the second derivative the map's own first.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, number, refuse, whole
from regard.normalizers.budget import budget_sparsemax
from regard.normalizers.entmax import entmax
from regard.normalizers.normmax import alpha_norm, normmax
from regard.shapes import HeadShape
from regard.tracing import readable
from regard.training._greatest import greatest

Reduction = Literal["mean", "sum", "none"]
Kind = Literal["entmax", "normmax", "budget"]


def _inputs(shape: HeadShape) -> tuple[Tensor, ...]:
    """Scores of classes, and the right ones."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    return scores, torch.randint(7, (2, 5), generator=generator)


CARD = Card(
    "fenchel_young",
    equation="""loss(z, y) = max over p of (p.z - Omega(p)) + Omega(y) - z.y,   dz = p - y
entmax: Omega(p) = (sum p^alpha - 1) / (alpha (alpha - 1)),   normmax: |p|_alpha - 1,   both over the simplex
budget: |p|^2 / 2 over 0 <= p <= 1, sum p = b""",
    papers=(
        Paper(
            "Learning with Fenchel-Young Losses",
            "Blondel, Martins, Niculae",
            2020,
            "1901.02324",
            "abstract; the losses of the entmax package (1.3)",
        ),
    ),
    protocol="Loss",
    inputs=_inputs,
    supports={"causal", "bidirectional", "compile"},
    cost=Cost("8*B*C", ""),
    claim="The loss is exactly 0 once the right class leads by a margin, where cross-entropy never is: "
    "tests/training/test_fenchel_young.py::test_is_zero_beyond_a_margin.",
    differs=("Targets may be distributions too, and alpha is given, not learned: losses of two alphas don't compare.",),
    verified="third-party",
    defaults={
        "kind": "ours, the package's best known",
        "alpha": "code",
        "budget": "ours, one class",
        "reduction": "code",
        "ignore_index": "code",
    },
    tries={"alpha": 1.2, "budget": ..., "ignore_index": 3},
)


def _powers(p: Tensor, alpha: float) -> Tensor:
    """(sum p^alpha - sum p) / (alpha (alpha - 1)) of each row, which is sum p log p for alpha = 1."""
    log_p = torch.where(p > 0, p, 1).log()
    e = alpha - 1
    return (p * (torch.expm1(e * log_p) / e if e else log_p)).sum(-1) / alpha


def _loss(
    scores: Tensor,
    target: Tensor,
    predict: Callable[[Tensor], Tensor],
    omega: Callable[[Tensor], Tensor],
    reduction: Reduction,
    ignore_index: int,
) -> Tensor:
    z = scores.to(torch.promote_types(scores.dtype, torch.float32))
    p = predict(z)
    counted = None
    if target.is_floating_point():
        y = target.to(z.dtype)
    else:
        counted = target != ignore_index
        y = torch.nn.functional.one_hot(target.where(counted, 0), z.shape[-1]).to(z.dtype)
    best = z.detach().amax(-1, keepdim=True)  # both sum to the same, and nothing large is left to cancel
    z = z - best.masked_fill(best == -torch.inf, 0)
    wanted = torch.where(y == 0, 0, y * z).sum(-1)
    loss = greatest(z, p) - omega(p.detach()) + (omega(y) if target.is_floating_point() else omega(y).detach()) - wanted
    if counted is not None:
        loss = loss.masked_fill(~counted, 0)
    if reduction == "none":
        return loss.to(scores.dtype)
    total = loss.sum()
    if reduction == "mean":
        total = total / (loss.numel() if counted is None else counted.sum())
    return total.to(scores.dtype)


def _targets(who: str, scores: Tensor, target: Tensor, ignore_index: int, reduction: str) -> None:
    choice(who, ("mean", "sum", "none"), reduction=reduction)
    whole(who, -(2**63), ignore_index=ignore_index)
    if target.is_floating_point():
        if target.shape != scores.shape:
            refuse(who, "target", "has the wrong shape", tuple(target.shape), f"{tuple(scores.shape)}, as the scores")
        return
    if target.shape != scores.shape[:-1]:
        words = f"{tuple(scores.shape[:-1])} of classes, or floating point {tuple(scores.shape)}"
        refuse(who, "target", "has the wrong shape", tuple(target.shape), words)
    if target.is_cpu and readable(target):
        wrong = (target != ignore_index) & ((target < 0) | (target >= scores.shape[-1]))
        if bool(wrong.any()):
            words = f"classes from 0 to {scores.shape[-1] - 1}, or ignore_index = {ignore_index}"
            refuse(who, "target", "is out of range", int(target[wrong][0]), words)


@checked()
def entmax_loss(
    scores: Float[Tensor, "*n C"],
    target: Int[Tensor, "..."] | Float[Tensor, "..."],
    alpha: float = 1.5,
    *,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
) -> Float[Tensor, "..."]:
    """The loss of alpha-entmax, for any alpha >= 1; alpha = 1 is cross-entropy.

    `target` holds classes (*n), of which `ignore_index` counts for nothing, or distributions (*n, C). `reduction` is
    "mean", "sum" or "none" of the rows' losses.
    """
    number("entmax_loss", least=1, alpha=alpha)
    _targets("entmax_loss", scores, target, ignore_index, reduction)
    alpha = float(alpha)
    return _loss(scores, target, lambda z: entmax(z, alpha), lambda p: _powers(p, alpha), reduction, ignore_index)


@checked()
def sparsemax_loss(
    scores: Float[Tensor, "*n C"],
    target: Int[Tensor, "..."] | Float[Tensor, "..."],
    *,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
) -> Float[Tensor, "..."]:
    """`entmax_loss` with alpha = 2."""
    return entmax_loss(scores, target, 2.0, reduction=reduction, ignore_index=ignore_index)


@checked()
def normmax_loss(
    scores: Float[Tensor, "*n C"],
    target: Int[Tensor, "..."] | Float[Tensor, "..."],
    alpha: float = 2.0,
    *,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
) -> Float[Tensor, "..."]:
    """The loss of alpha-normmax, for any alpha > 1; the rest as in `entmax_loss`."""
    number("normmax_loss", above=1, alpha=alpha)
    _targets("normmax_loss", scores, target, ignore_index, reduction)
    alpha = float(alpha)

    def omega(p: Tensor) -> Tensor:
        return alpha_norm(p, alpha)[..., 0] - 1

    return _loss(scores, target, lambda z: normmax(z, alpha), omega, reduction, ignore_index)


@checked()
def budget_loss(
    scores: Float[Tensor, "*n C"],
    target: Int[Tensor, "..."] | Float[Tensor, "..."],
    budget: float = 1.0,
    *,
    reduction: Reduction = "mean",
    ignore_index: int = -100,
) -> Float[Tensor, "..."]:
    """The loss of budget sparsemax. Targets of a budget other than 1 are (*n, C): 1 at the right classes, that sum to
    the budget, which is at most C; the rest as in `entmax_loss`."""
    number("budget_loss", above=0, most=max(1, int(scores.shape[-1])), budget=budget)
    _targets("budget_loss", scores, target, ignore_index, reduction)
    if not target.is_floating_point() and budget != 1:
        refuse(
            "budget_loss", "target", "holds one class a row", f"budget {budget}", "floating point (*n, C), or budget 1"
        )
    budget = float(budget)

    def omega(p: Tensor) -> Tensor:
        return p.square().sum(-1) / 2

    return _loss(scores, target, lambda z: budget_sparsemax(z, budget), omega, reduction, ignore_index)


@CARD.module
class FenchelYoungLoss(nn.Module):
    """The loss of one of the maps, in the place of `nn.CrossEntropyLoss`.

    Args:
        kind: "entmax" (alpha = 2 is sparsemax, 1 cross-entropy), "normmax" or "budget".
        alpha: of entmax (>= 1) or normmax (> 1).
        budget: of "budget".
        reduction: "mean", "sum" or "none" of the rows' losses.
        ignore_index: a class that counts for nothing.
    """

    def __init__(
        self,
        *,
        kind: Kind = "entmax",
        alpha: float = 1.5,
        budget: float = 1.0,
        reduction: Reduction = "mean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        choice(self, ("entmax", "normmax", "budget"), kind=kind)
        choice(self, ("mean", "sum", "none"), reduction=reduction)
        number(self, above=0, budget=budget)
        if kind == "normmax":
            number(self, above=1, alpha=alpha)
        number(self, least=1, alpha=alpha)
        whole(self, -(2**63), ignore_index=ignore_index)
        self.kind, self.alpha, self.budget = kind, float(alpha), float(budget)
        self.reduction: Reduction = reduction
        self.ignore_index = ignore_index

    @checked()
    def forward(
        self, scores: Float[Tensor, "*n C"], target: Int[Tensor, "..."] | Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """The loss of scores of C classes against classes (*n) or distributions (*n, C)."""
        rest = {"reduction": self.reduction, "ignore_index": self.ignore_index}
        if self.kind == "budget":
            return budget_loss(scores, target, self.budget, **rest)  # type: ignore[arg-type]
        loss = entmax_loss if self.kind == "entmax" else normmax_loss
        return loss(scores, target, self.alpha, **rest)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        knob = f"budget={self.budget}" if self.kind == "budget" else f"alpha={self.alpha}"
        return f"kind={self.kind!r}, {knob}, reduction={self.reduction!r}"
