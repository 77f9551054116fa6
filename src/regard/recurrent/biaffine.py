"""Deep biaffine attention: tokens point at their heads in a tree, by products with a prior of heads.

Token 0 is the root; rows are dependents, columns heads. `regard.recurrent.arborescence` makes trees of the scores.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, flag, number, refuse, whole
from regard.masks import Mask
from regard.pipeline.tokens import quarantine, spoil
from regard.recurrent._aligner import Aligner

CARD = Card(
    "biaffine",
    equation="""d_i = LeakyReLU(W_d x_i + b_d),   h_j = LeakyReLU(W_h x_j + b_h)     slope 0.1; dropout shared over time
s_ij = d_i . U h_j + u . h_j,   p(j is the head of i) = softmax_j(s_ij)
labels, of networks of their own:  s^c_ij = d_i . U_c h_j + p_c . d_i + q_c . h_j + b_c""",
    papers=(
        Paper(
            "Deep Biaffine Attention for Neural Dependency Parsing",
            "Dozat, Manning",
            2017,
            "1611.01734",
            "abstract; introduction; third-party code (supar); the model's sections not read",
        ),
    ),
    protocol="Pointer",
    supports={"bidirectional", "padding", "dropout", "compile"},
    traits={"position_free"},
    cost=Cost("B*T*(arc_dim + 1)*arc_dim + B*T*S*arc_dim", ""),
    claim="Tokens are heads by themselves, whoever asks: a prior that a product of two sides has not; at the start all "
    "heads are alike: tests/recurrent/test_biaffine.py::test_a_token_is_a_head_whoever_asks.",
    differs=(
        "`forward` gives log-probabilities, as pointers do; the scores are those of `scores`.",
        "Hidden tokens get a probability of exactly 0, where the library's scores are -1e32.",
        "Of two vectors a label, the second starts as torch's linear layers do: two zeros would never learn.",
        "Dropout is 0 unless said; that of the paper's parser, `BiaffineParser`, is 0.33 as remembered.",
    ),
    verified="third-party",
    example={"arc_dim": 7},
    defaults={
        "context_dim": "ours, as wide as dim",
        "arc_dim": "paper, as remembered",
        "scale": "code, supar",
    },
)


def _with_one(z: Tensor, bias: bool) -> Tensor:
    return F.pad(z, (0, 1), value=1.0) if bias else z


def biaffine(
    x: Float[Tensor, "B T X"],
    y: Float[Tensor, "B S Y"],
    weight: Float[Tensor, "O X1 Y1"],
    *,
    bias_x: bool = True,
    bias_y: bool = True,
    scale: float = 0.0,
) -> Float[Tensor, "B O T S"]:
    """x_i . weight_o . y_j / X^scale, each side with a 1 behind its numbers where it has a bias."""
    flag("biaffine", bias_x=bias_x, bias_y=bias_y)
    number("biaffine", scale=scale)
    if x.dim() != 3 or y.dim() != 3 or len(x) != len(y):
        refuse("biaffine", "y", "does not go with x", (*x.shape, *y.shape), "(B, T, X) and (B, S, Y)")
    want = (x.shape[2] + bias_x, y.shape[2] + bias_y)
    if weight.dim() != 3 or weight.shape[1:] != want:
        refuse("biaffine", "weight", "has the wrong shape", tuple(weight.shape), f"(O, {want[0]}, {want[1]})")
    every = _with_one(x, bias_x).flatten(0, 1).expand(len(weight), -1, -1)
    left = torch.bmm(every, weight).unflatten(1, x.shape[:2]).transpose(0, 1)
    return left @ _with_one(y, bias_y)[:, None].mT * int(x.shape[2]) ** -scale


def biaffine_rank_one(
    x: Float[Tensor, "B T X"],
    y: Float[Tensor, "B S Y"],
    left: Float[Tensor, "O X1"],
    right: Float[Tensor, "O Y1"],
    *,
    bias_x: bool = True,
    bias_y: bool = True,
    scale: float = 0.0,
) -> Float[Tensor, "B O T S"]:
    """`biaffine` with the weights left_o right_o^T."""
    for name, z, bias, w in (("left", x, bias_x, left), ("right", y, bias_y, right)):
        if w.dim() != 2 or w.shape[1] != z.shape[-1] + bias or len(w) != len(left):
            want = f"({len(left)}, {z.shape[-1] + bias})"
            refuse("biaffine_rank_one", name, "has the wrong shape", tuple(w.shape), want)
    rows, columns = (_with_one(x, bias_x) @ left.mT).mT, (_with_one(y, bias_y) @ right.mT).mT
    return rows[..., :, None] * columns[..., None, :] * int(x.shape[2]) ** -scale


class Biaffine(nn.Module):
    """Scores of all pairs of two sequences, all 0 at the start: (B, T, dim_x), (B, S, dim_y) -> (B, outputs, T, S).

    Args:
        bias_x, bias_y: whether that side is extended by a 1, so that the other side also counts by itself.
        scale: scores are divided by dim_x to this power.
        rank_one: each output has two vectors for a matrix.
    """

    def __init__(
        self,
        dim_x: int,
        dim_y: int,
        outputs: int = 1,
        *,
        bias_x: bool = True,
        bias_y: bool = True,
        scale: float = 0.0,
        rank_one: bool = False,
    ) -> None:
        super().__init__()
        whole(self, dim_x=dim_x, dim_y=dim_y, outputs=outputs)
        flag(self, bias_x=bias_x, bias_y=bias_y, rank_one=rank_one)
        number(self, scale=scale)
        self.bias_x, self.bias_y, self.scale, self.rank_one = bias_x, bias_y, scale, rank_one
        X, Y = dim_x + bias_x, dim_y + bias_y
        self.weight = nn.Parameter(torch.empty((outputs, X) if rank_one else (outputs, X, Y)))
        self.right = nn.Parameter(torch.empty(outputs, Y)) if rank_one else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zeros; of two vectors, the first alone."""
        nn.init.zeros_(self.weight)
        if self.right is not None:
            nn.init.uniform_(self.right, -(self.right.shape[1] ** -0.5), self.right.shape[1] ** -0.5)

    def forward(self, x: Float[Tensor, "B T X"], y: Float[Tensor, "B S Y"]) -> Float[Tensor, "B O T S"]:
        rest: dict[str, Any] = {"bias_x": self.bias_x, "bias_y": self.bias_y, "scale": self.scale}
        if self.right is None:
            return biaffine(x, y, self.weight, **rest)
        return biaffine_rank_one(x, y, self.weight, self.right, **rest)


def dropped(z: Float[Tensor, "B T D"], p: float, training: bool) -> Float[Tensor, "B T D"]:
    """Dropout of the same features at all times of a sequence."""
    return z * F.dropout(z.new_ones(z.shape[0], 1, z.shape[2]), p) if training and p > 0 else z


class Sides(Aligner):
    """The networks of dependents and heads."""

    def __init__(self, dim: int, context_dim: int | None, hidden: int, dropout: float) -> None:
        super().__init__(dim, context_dim)
        number(self, least=0, most=1, dropout=dropout)
        self.dropout = dropout
        self.q_proj, self.k_proj = nn.Linear(dim, hidden), nn.Linear(self.context_dim, hidden)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Orthogonal weights, and biases of 0."""
        for layer in (self.q_proj, self.k_proj):
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def sides(self, x: Float[Tensor, "B T M"], context: Float[Tensor, "B S C"]) -> list[Tensor]:
        """Dependents of x, and heads of the context."""
        made = (F.leaky_relu(self.q_proj(x), 0.1), F.leaky_relu(self.k_proj(context), 0.1))
        return [dropped(z, self.dropout, self.training) for z in made]


@CARD.module
class BiaffineArcs(Sides):
    """Which token is the head of each: x (B, T, dim)[, context (B, S, context_dim)] -> (B, T, S).

    Args:
        dim, context_dim: widths of dependents and heads; without a context, heads are tokens of x.
        arc_dim: width in which they are compared.
        scale: scores are divided by arc_dim to this power.
        dropout: of both sides' features, the same at all times of a sequence.
    """

    def __init__(
        self,
        dim: int,
        *,
        context_dim: int | None = None,
        arc_dim: int = 500,
        scale: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        whole("BiaffineArcs", arc_dim=arc_dim)
        super().__init__(dim, context_dim, arc_dim, dropout)
        self.arc = Biaffine(arc_dim, arc_dim, bias_y=False, scale=scale)

    def scores(
        self, x: Float[Tensor, "B T M"], context: Float[Tensor, "B S C"] | None = None
    ) -> Float[Tensor, "B T S"]:
        """Before any mask and softmax."""
        return self.arc(*self.sides(x, x if context is None else context))[:, 0]

    @checked(M="dim", C="context_dim")
    def forward(
        self,
        x: Float[Tensor, "B T M"],
        context: Float[Tensor, "B S C"] | None = None,
        *,
        mask: Mask | Bool[Tensor, "B S"] | Bool[Tensor, "B 1 1 S"] | None = None,
    ) -> Float[Tensor, "B T S"]:
        """Log-probabilities of each head. `mask` hides heads: `regard.masks.padding`, or True = a real token."""
        source, keep = self.source(x, x if context is None else context, mask)
        x, bad = quarantine(x)
        source, bad_source = quarantine(source)
        s = self.scores(x, source)
        s = s.to(torch.promote_types(s.dtype, torch.float32))
        if keep is None:
            return spoil(s.log_softmax(-1).to(x.dtype), bad, bad_source, None)
        hidden = ~keep[:, None]
        none = hidden.all(-1, keepdim=True)  # their softmax would be NaN
        out = s.masked_fill(hidden & ~none, -torch.inf).log_softmax(-1).to(x.dtype)
        return spoil(out, bad, bad_source, None).masked_fill(hidden, -torch.inf)
