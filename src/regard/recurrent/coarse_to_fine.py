"""Coarse-to-fine attention: a step looks at coarse cells, then at the fine cells of those it chose.

Weights within a region are normalised there, and multiplied by the region's own: a mixture, no restriction. So with one
region that holds everything all kinds are plain attention. With `regard.recurrent.LuongDecoder` it has input feeding.
"""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, fits, refuse, whole
from regard.normalizers.entmax import sparsemax
from regard.normalizers.softmax import softmax
from regard.recurrent._aligner import Padding
from regard.recurrent.luong import LuongAttention, LuongScore

CARD = Card(
    "coarse_to_fine",
    equation="""p(z) = p(z') p(z | z'),   z a fine cell of the grid, z' the coarse cell whose region it lies in
p(z | z') = softmax of score(h_t, V_z) over that region;   p(z') of score'(h_t, V'_z') over the coarse cells:
hierarchical: softmax     sparse: sparsemax     hard: 1 for a cell drawn from softmax (evaluation: the likeliest)
score = v . tanh(W1 h + W2 V)  ("concat"), or h W_a . V ("general")     c_t = sum_z p(z) V_z
o_t = tanh(W_c [c_t; h_t])     hard: loss = -log p(y_t) - (log p(y_t) - baseline) log p(z'), the bracket a constant""",
    papers=(
        Paper(
            "Image-to-Markup Generation with Coarse-to-Fine Attention",
            "Deng, Kanervisto, Ling, Rush",
            2017,
            "1609.04938",
            "abstract; a page with the equations up to the hierarchical form; the code of the first version, without "
            "coarse cells",
        ),
    ),
    protocol="CrossMixer",
    supports={"bidirectional", "padding", "compile"},
    cost=Cost("B*T*S*M + 2*B*T*M**2 + B*M**2*ceil(ceil(S/columns)/tall)*ceil(columns/wide)", ""),
    claim="About as many lookups as coarse cells and one region's, not one for each fine cell, with the same answers: "
    "tests/recurrent/test_coarse_to_fine.py::test_few_lookups_copy_a_grid_of_digits.",
    differs=(
        "The sparse and the hard form and the coarse grid are as remembered, not read: the published code lacks them.",
        "Coarse vectors are a linear map of a region's mean where none are handed in; the paper has convolutions and "
        "a second row encoder.",
        "All fine scores are computed, as steps of a batch look at different regions; `lookups` counts as the paper "
        "does.",
        "The convolutions in front, which are plain ones, are left out; the encoder of rows is `RowEncoder`.",
    ),
    verified="reconstructed",
    example={"columns": 3, "tall": 2, "wide": 2},
    tries={"tall": 1, "wide": 1, "columns": 2},
    defaults={
        "context_dim": "ours, as wide as dim",
        "kind": "ours, the one that was read",
        "columns": "ours",
        "tall": "paper, a figure",
        "wide": "paper, a figure",
        "score": "paper",
        "hidden": "ours, as wide as dim",
    },
)

Kind = Literal["hierarchical", "sparse", "hard"]


class Looked(NamedTuple):
    """What each step looked at."""

    weights: Float[Tensor, "B T S"]
    lookups: Int[Tensor, "B T"]
    """Cells that were scored: all coarse ones, and the fine ones of regions with a weight; padding is none."""
    cell: Int[Tensor, "B T"]
    """The coarse cell drawn, or the one of the greatest weight."""
    log_cell: Float[Tensor, "B T"]
    """log p(z') of that cell."""


class Regions(NamedTuple):
    """Which fine cells a region holds."""

    members: Int[Tensor, "L m"]
    exists: Bool[Tensor, "L m"]
    slot: Int[Tensor, " S"]
    """Where each fine cell stands among the members of all regions."""


def regions_of(S: int, columns: int, tall: int, wide: int, device: torch.device | None = None) -> Regions:
    """Of S fine cells, row by row, in regions of tall x wide; those at the right and below may be smaller."""
    whole("regions_of", columns=columns, tall=tall, wide=wide)
    columns = max(1, min(columns, S))
    rows = max(1, -(-S // columns))
    tall, wide = min(tall, rows), min(wide, columns)
    at = torch.arange(S, device=device)
    y, x = at // columns, at % columns
    across, m = -(-columns // wide), tall * wide
    slot = ((y // tall) * across + x // wide) * m + (y % tall) * wide + x % wide
    number = -(-rows // tall) * across
    members = torch.zeros(number * m, dtype=torch.long, device=device).scatter(0, slot, at)
    exists = torch.zeros(number * m, dtype=torch.bool, device=device).scatter(0, slot, torch.ones_like(slot).bool())
    return Regions(members.view(number, m), exists.view(number, m), slot)


@checked()
def coarse_to_fine(
    coarse: Float[Tensor, "B T L"],
    fine: Float[Tensor, "B T S"],
    regions: Regions,
    *,
    kind: Kind = "hierarchical",
    keep: Bool[Tensor, "B S"] | None = None,
    cell: Int[Tensor, "B T"] | None = None,
) -> Looked:
    """Weights of fine cells from the scores of both grids; a region without real cells gets none.

    Args:
        cell: which coarse cell each step takes; of the hard kind alone, where None is the likeliest.
    """
    choice("coarse_to_fine", get_args(Kind), kind=kind)
    if cell is not None and kind != "hard":
        refuse("coarse_to_fine", "cell", "is for the hard kind", kind, "kind='hard'")
    real = regions.exists.expand(len(fine), -1, -1)
    if keep is not None:
        real = real & keep[:, regions.members]
    real = real[:, None]  # (B, 1, L, m)
    alive = real.any(-1)
    odds = softmax(coarse, alive.expand(coarse.shape)) if kind != "sparse" else None
    if odds is None:
        odds = sparsemax_over(coarse, alive)
    taken = odds.argmax(-1) if cell is None else cell
    log_cell = odds.gather(-1, taken[..., None])[..., 0].clamp(min=torch.finfo(odds.dtype).tiny).log()
    if kind == "hard":
        odds = torch.zeros_like(odds).scatter(-1, taken[..., None], 1.0)
    inside = fine[..., regions.members]
    within = softmax(inside, real.expand(inside.shape))
    weights = (odds[..., None] * within).flatten(2)[..., regions.slot]
    counts = real.sum(-1)
    lookups = alive.sum(-1) + ((odds > 0) * counts).sum(-1)
    return Looked(weights, lookups, taken, log_cell)


def sparsemax_over(scores: Float[Tensor, "B T L"], alive: Bool[Tensor, "B 1 L"]) -> Float[Tensor, "B T L"]:
    """Sparsemax among what is alive; rows without any are 0."""
    hidden = scores.masked_fill(~alive, torch.finfo(scores.dtype).min / 4)
    some = alive.any(-1, keepdim=True)
    return sparsemax(hidden.masked_fill(~some, 0.0)).masked_fill(~alive, 0.0)


@checked()
def hard_loss(
    log_target: Float[Tensor, "*n"], log_cell: Float[Tensor, "*n"], baseline: Float[Tensor, "*#n"]
) -> Float[Tensor, ""]:
    """The loss of the hard kind, a mean over steps: descent on the target's, and REINFORCE on the cell that was drawn.

    Args:
        log_target: log p(y_t | ...), which is the reward, too.
        baseline: what is taken from the reward; learned or moving, by the caller.
    """
    reward = (log_target - baseline).detach()
    return -(log_target + reward * log_cell).mean()


@CARD.module
class CoarseToFineAttention(LuongAttention):
    """Decoder states (B, T, dim) and the fine cells (B, Y X, context_dim) of a grid, row by row -> o (B, T, dim).

    Args:
        dim, context_dim, score, hidden: as of `LuongAttention`, for each of the two grids; "dot" and "location" aren't.
        kind: how coarse cells are weighted. "hard" draws them in training from torch's generator.
        columns: X, the width of the grid; any number of rows.
        tall, wide: sides of a region in fine cells.
    """

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int | None = None,
        kind: Kind = "hierarchical",
        columns: int = 16,
        tall: int = 4,
        wide: int = 4,
        score: Literal["concat", "general"] = "concat",
        hidden: int | None = None,
    ) -> None:
        choice("CoarseToFineAttention", get_args(Kind), kind=kind)
        choice("CoarseToFineAttention", ("concat", "general"), score=score)
        whole("CoarseToFineAttention", columns=columns, tall=tall, wide=wide)
        super().__init__(dim, context_dim=context_dim, score=score, hidden=hidden)
        self.kind, self.columns, self.tall, self.wide = kind, columns, tall, wide
        self.coarse_score = LuongScore(score, dim, self.context_dim, hidden=hidden)
        self.coarse_proj = nn.Linear(self.context_dim, self.context_dim)
        self.reset_parameters()

    def weights(
        self, x: Float[Tensor, "B T M"], context: Float[Tensor, "B S C"], keep: Bool[Tensor, "B S"] | None
    ) -> Float[Tensor, "B T S"]:
        """p(z)."""
        return self._look(x, context, keep, None).weights

    def look(
        self,
        x: Float[Tensor, "B T M"],
        context: Float[Tensor, "B S C"],
        *,
        mask: Padding = None,
        coarse: Float[Tensor, "B L C"] | None = None,
    ) -> tuple[Float[Tensor, "B T M"], Looked]:
        """o and what was looked at; `coarse` are vectors of the coarse cells, row by row, in place of means."""
        context, keep = self.source(x, context, mask)
        looked = self._look(x, context, keep, coarse)
        return self.combine(looked.weights @ context, x), looked

    def _look(self, x: Tensor, context: Tensor, keep: Tensor | None, coarse: Tensor | None) -> Looked:
        regions = regions_of(context.shape[1], self.columns, self.tall, self.wide, context.device)
        if coarse is None:
            coarse = self.coarse_proj(means(context, regions, keep))
        else:
            sizes = {"B": len(x), "L": len(regions.members), "C": self.context_dim}
            fits(self, "B L C", sizes, coarse=coarse)
        upper = self.coarse_score(x, self.coarse_score.keys(coarse)[:, None])
        lower = self.score(x, self.score.keys(context)[:, None])
        cell = None
        if self.kind == "hard" and self.training and upper.numel():
            exists = regions.exists.expand(len(x), -1, -1)
            alive = (exists if keep is None else exists & keep[:, regions.members]).any(-1)[:, None]
            drawn = softmax(upper.detach(), alive.expand(upper.shape)).flatten(0, 1)
            none = drawn.sum(-1, keepdim=True) == 0
            cell = torch.multinomial(drawn.masked_fill(none, 1.0), 1).view(upper.shape[:2])
        return coarse_to_fine(upper, lower, regions, kind=self.kind, keep=keep, cell=cell)


def means(
    context: Float[Tensor, "B S C"], regions: Regions, keep: Bool[Tensor, "B S"] | None
) -> Float[Tensor, "B L C"]:
    """Of the real cells of each region; 0 where there are none."""
    real = regions.exists.expand(len(context), -1, -1)
    if keep is not None:
        real = real & keep[:, regions.members]
    total = context[:, regions.members].masked_fill(~real[..., None], 0).sum(2)
    return total / real.sum(-1).clamp(min=1)[..., None].to(total.dtype)
