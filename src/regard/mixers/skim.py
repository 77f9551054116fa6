"""Skim-Attention: queries and keys come from where words stand on the page, values from what they say."""

from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, fits, refuse, whole
from regard.kernels.problem import dots, softmax
from regard.pipeline.layer import Attention
from regard.positions._boxes import boxes_at
from regard.stages import Position
from regard.tracing import readable

CARD = Card(
    "skim",
    equation="""l = LN(Ex[x0] + Ex[x1] + Ey[y0] + Ey[y1] + Eh[y1 - y0] + Ew[x1 - x0])   of a box (x0, y0, x1, y1)
A = softmax((W_q l + b_q) (W_k l + b_k)^T / sqrt(D)),   y = concat_h(A_h (W_v x + b_v)) W_o + b_o
layout="centre": l = LN(Ex[(x0 + x1) // 2] + Ey[(y0 + y1) // 2]),   layout="sequence": l = LN(E[place])
a Skimformer makes A once, for all of its layers""",
    papers=(
        Paper(
            "Skim-Attention: Learning to Focus via Document Layout",
            "Nguyen, Scialom, Staiano, Piwowarski",
            2021,
            "2109.01078",
            "abstract; official code, by an account of it and the numbers that it gave",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "mask", "gqa", "streaming", "dropout", "compile"},
    lacks={"cross": "both sides would need a layout"},
    traits={"normalised", "nonnegative", "linear_in_values", "head_independent"},
    cost=Cost("2*B*H*T*S*D", "2*S*G*D"),
    claim="Weights depend on the layout alone: they are the same whatever the text says, and find the value right of "
    "its label wherever it stands: tests/mixers/test_skim.py::test_weights_do_not_depend_on_the_text, "
    "tests/mixers/test_skim.py::test_finds_the_value_of_a_field.",
    differs=(
        "Boxes are handed in as `positions=`; without them words stand in a line, in boxes of 1 x 1.",
        "Hidden keys have weight 0, also where a row sees no other; the authors' code adds -10000 to their scores.",
        "Causal, streaming and grouped forms are ours.",
        "A layer makes its own weights, which a kernel need not form; a `Skimformer` makes them once, and its layout "
        "encoder sees no padding, which the authors' code lets it see.",
        "Left out: LongSkimformer, whose code was not read.",
    ),
    verified="third-party",
    example={"layout_dim": 18, "max_position": 256, "bias": False},  # a row that sees nothing gives b_o, else 0
    tries={"max_position": 200, "layout_dim": 30},
    defaults={
        "layout": "paper",
        "layout_dim": "code, as wide as dim",
        "max_position": "code",
        "bias": "code",
        "num_kv_heads": "code, as many as heads",
        "head_dim": "code, dim / num_heads",
    },
)

Kind = Literal["boxes", "centre", "sequence"]
EPS = 1e-12


def start(*modules: nn.Module) -> None:
    """BERT's: N(0, 0.02^2) and zero biases, in all that stands within."""
    for part in (part for module in modules for part in module.modules()):
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=0.02)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)


class Layout(Position):
    """Embeds boxes: (B, T, 4) -> (B, T, L), one of 1 x 1 after the other where only places are known, (T) or (B, T).

    Args:
        dim: L.
        kind: "boxes" sums six embeddings, "centre" two, "sequence" takes places alone.
        max_position: coordinates, and places, are below it.
    """

    def __init__(self, dim: int, kind: Kind = "boxes", max_position: int = 1024) -> None:
        super().__init__()
        whole(self, dim=dim)
        whole(self, 2, max_position=max_position)
        choice(self, get_args(Kind), kind=kind)
        self.kind, self.max_position = kind, max_position
        self.axes = 1 if kind == "sequence" else 4
        names = {"boxes": ("x", "y", "h", "w"), "centre": ("x", "y"), "sequence": ("place",)}[kind]
        self.tables = nn.ModuleDict({name: nn.Embedding(max_position, dim) for name in names})
        self.norm = nn.LayerNorm(dim, eps=EPS)
        start(self)

    def forward(self, positions: Int[Tensor, "*b T"] | Int[Tensor, "B T 4"]) -> Float[Tensor, "*b T L"]:
        if self.kind == "sequence":
            found = positions.clamp(min=0)
            self._check(found, "place")
            return self.norm(self.tables["place"](found))
        x0, y0, x1, y1 = self.corners(boxes_at(positions))
        x, y = self.tables["x"], self.tables["y"]
        if self.kind == "centre":
            return self.norm(x((x0 + x1) // 2) + y((y0 + y1) // 2))
        sizes = self.tables["h"](y1 - y0) + self.tables["w"](x1 - x0)
        return self.norm(x(x0) + x(x1) + y(y0) + y(y1) + sizes)

    def corners(self, boxes: Int[Tensor, "*b T 4"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x0, y0, x1, y1, of boxes that are none upside down."""
        if boxes.is_floating_point():
            refuse(self, "boxes", "have the wrong dtype", boxes.dtype, "whole numbers, of pages scaled to them")
        self._check(boxes, "box")
        x0, y0, x1, y1 = boxes.unbind(-1)
        if readable(boxes) and bool(((x1 < x0) | (y1 < y0)).any()):
            refuse(self, "boxes", "are upside down", "x1 < x0 or y1 < y0", "x0 <= x1 and y0 <= y1")
        return x0, y0, x1, y1

    def _check(self, at: Tensor, what: str) -> None:
        if at.numel() and readable(at):  # compiled code can't branch on data; there the lookup itself fails
            least, most = int(at.min()), int(at.max())
            if least < 0 or most >= self.max_position:
                got = f"{least} to {most}"
                refuse(self, what, "reaches beyond the tables", got, f"0 to max_position - 1 = {self.max_position - 1}")


@CARD.module(closed=("kernel",))
class SkimAttention(Attention):
    """A layer whose queries and keys are those of the layout; called with `positions=boxes`.

    Args:
        dim, num_heads, num_kv_heads, head_dim, causal, dropout, kernel: as in `regard.Attention`.
        layout: "boxes"; "centre", of them alone; or "sequence", of places in the text, integers (T,) or (B, T).
        layout_dim: L; default dim.
        max_position: how many coordinates (or places) there are.
        bias: whether the four projections have one.

    Shapes: x (B, T, M), boxes (B or 1, T, 4) of whole numbers x0 <= x1, y0 <= y1 -> (B, T, M).

    Raises:
        ValueError: boxes that are upside down, or beyond the tables.
    """

    position: Layout

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layout: Kind = "boxes",
        layout_dim: int | None = None,
        max_position: int = 1024,
        causal: bool = False,
        dropout: float = 0.0,
        bias: bool = True,
        kernel: str = "auto",
    ) -> None:
        choice(self, get_args(Kind), layout=layout)
        width = dim if layout_dim is None else layout_dim
        whole(self, dim=dim, layout_dim=width)
        whole(self, 2, max_position=max_position)
        made: dict[str, Any] = {"num_kv_heads": num_kv_heads, "head_dim": head_dim, "dropout": dropout, "bias": bias}
        place = Layout(width, layout, max_position)
        super().__init__(dim, num_heads, causal=causal, kernel=kernel, position=place, **made)
        self.q_proj = nn.Linear(width, self.q_proj.out_features, bias=bias)
        self.k_proj = nn.Linear(width, self.k_proj.out_features, bias=bias)
        start(self)

    def _project(
        self, x: Tensor, source: Tensor, where: Tensor, where_keys: Tensor, turn: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        layout = self.position(where)
        layout = layout.expand(len(x), *layout.shape[-2:])
        q, k = self._split(self.q_proj(layout), self.num_heads), self._split(self.k_proj(layout), self.num_kv_heads)
        return q, k, self._split(self.v_proj(source), self.num_kv_heads), x, source


def skim_weights(
    q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G T D"], keep: Bool[Tensor, "B T"] | None = None
) -> Float[Tensor, "B H T T"]:
    """A of the layout's queries and keys; hidden keys have 0, and so has a row that sees none."""
    return softmax(dots(q, k) * q.shape[-1] ** -0.5, None if keep is None else keep[:, None, None])


def skimming_mask(
    weights: Float[Tensor, "B H T S"], k: int, keep: Bool[Tensor, "B S"] | None = None
) -> Bool[Tensor, "B H T S"]:
    """The k keys with the greatest weight, of each row and head: a mask for any other layer. No gradient passes.

    Args:
        weights: of any attention, as `Skimformer.weights` makes.
        k: how many; all, where there are fewer.
        keep: True = a real key; others are never kept, and their places not given to any.

    Raises:
        ValueError: k below 1, and weights or keep of other shapes.
    """
    whole("skimming_mask", k=k)
    sizes = fits("skimming_mask", "B H T S", weights=weights)
    found = weights.detach().topk(min(k, sizes["S"]), -1).indices
    chosen = torch.zeros_like(weights, dtype=torch.bool).scatter(-1, found, True)
    if keep is None:
        return chosen
    fits("skimming_mask", "B S", sizes, keep=keep)
    return chosen & keep[:, None, None]
