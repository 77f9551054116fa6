"""SpAtten: a stack of layers that prunes tokens and heads for good, by the attention they have got.

A token's score is the sum of all weights that fell on it, over heads, queries and layers; a head's is the size of its
outputs. What is pruned takes part in no later layer. A pruned token keeps the features that it had.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost
from regard.checks import choice, flag, number, tokens, whole
from regard.masks import Mask
from regard.mixers.cascade import Cascade, schedule
from regard.normalizers.softmax import softmax
from regard.normalizers.value_pruning import PAPERS, local_value_topk
from regard.pipeline.tokens import apart, key_mask, quarantine, spoil
from regard.shapes import head_shape
from regard.tracing import as_it_is, exporting, readable

CARD = Card(
    "spatten",
    equation="""layer l, alive tokens and heads alone:  h <- h + concat_m(E_m) Wo,  E = A V,  h <- h + MLP(h)
A = softmax(Q K^T / sqrt(D)), without each row's smallest weights where keep_values < 1
s_j <- s_j + sum_m sum_i P_mij                z_m <- z_m + sum_i sum_d |E_mid|
behind it only floor(n_l / n_(l-1) of them) with the largest s or z stay alive, and at least one
n_l = 1 in the first max(3, ceil(.15 L)) layers, then falls linearly to the share kept in the last one""",
    papers=PAPERS,
    supports={"bidirectional", "padding", "packed", "gqa", "compile"},
    lacks={"causal": "a token is pruned by what later ones think of it"},
    traits={"routed"},
    cost=Cost(
        "B*(2*H*D*T**2*((layers - unpruned + 1)/2*(1 + keep_tokens**2) + unpruned - 1)"
        " + 2*T*mlp_ratio*M**2*((layers - unpruned + 1)/2*(1 + keep_tokens) + unpruned - 1))",
        "",
    ),
    claim="What others look at survives, and what is pruned is not computed: "
    "tests/mixers/test_spatten.py::test_marked_tokens_survive_and_others_are_left_alone.",
    differs=(
        "The published code has no cascade: equations 1 to 3 are as others quote them, the schedule is the reading of "
        "Learned Token Pruning, and value pruning without a new normalisation is inferred.",
        "What comes out is what the layers add to x, so that a host adds x as around any mixer.",
        "Layers have a LayerNorm before each part, as no formula says where it stands.",
        "Pruned heads are multiplied by 0, not left out, as each sequence prunes others; `gather` leaves out tokens.",
        "Progressive quantisation is a function, `progressive`, for one scale per tensor; the layers compute in full.",
        "Of the cache that the authors published there is the rule, `cache_keep`, and no cache policy.",
    ),
    verified="reconstructed",
    example={"layers": 3, "unpruned": 1, "mlp_ratio": 1, "keep_heads": 0.6, "keep_values": 0.8},
    tries={"form": ..., "unpruned": {"unpruned": 2}},
    exceptions={"L56": "its first layers show every token to all, so that in the end each counts a little"},
    defaults={
        "layers": "ours",
        "keep_tokens": "ours",
        "keep_heads": "ours, all",
        "keep_values": "ours, all",
        "unpruned": "code, Learned Token Pruning's reading",
        "mlp_ratio": "ours, BERT's",
        "form": "ours",
        "bias": "ours",
    },
)

Form = Literal["gather", "mask"]
CHUNK = 1024
"""Queries whose weights stand in memory together."""


class CascadeLayer(nn.Module):
    """One layer: what attention and MLP add to the alive tokens, and the cascade behind it."""

    def __init__(self, dim: int, shape: tuple[int, int, int], *, hidden: int, bias: bool) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = H, G, D = shape
        self.norm = nn.LayerNorm(dim)
        self.q_proj = nn.Linear(dim, H * D, bias=bias)
        self.k_proj, self.v_proj = (nn.Linear(dim, G * D, bias=bias) for _ in range(2))
        self.o_proj = nn.Linear(H * D, dim, bias=bias)
        mlp = (nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.mlp = nn.Sequential(*mlp) if hidden else None

    def forward(
        self, h: Float[Tensor, "B T M"], cascade: Cascade, value_ratio: float
    ) -> tuple[Float[Tensor, "B T M"], Cascade]:
        u, alive = self.norm(h), cascade.tokens
        q, k, v = (
            f(u).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (z.repeat_interleave(self.num_heads // self.num_kv_heads, 1) for z in (k, v))
        wide, outs = torch.promote_types(q.dtype, torch.float32), []
        working = alive[:, None, :, None] & cascade.heads[:, :, None, None]
        parts = [(q, working)] if exporting() else zip(q.split(CHUNK, 2), working.split(CHUNK, 2), strict=True)
        for rows, works in parts:
            allowed = works & alive[:, None, None]
            with as_it_is(q.device):
                weights = softmax(rows.to(wide) @ k.to(wide).mT / math.sqrt(self.head_dim), allowed)
                cascade = cascade.add_token_scores(weights)
                if value_ratio:
                    weights = local_value_topk(weights, value_ratio, allowed)
                read = weights @ v.to(wide)
            cascade = cascade.add_head_scores(read)
            outs.append(read.to(v.dtype))
        out = torch.cat(outs, 2) if outs else q
        added = self.o_proj(out.transpose(1, 2).flatten(2))
        if self.mlp is not None:
            added = added + self.mlp(h + added)
        return added.masked_fill(~alive[..., None], 0), cascade


@CARD.module
class SpAtten(nn.Module):
    """What a stack of attention layers adds to x (B, T, M), and prunes as it goes.

    Args:
        dim, num_heads, num_kv_heads, head_dim, bias: of every layer, as of `regard.Attention`.
        layers: L.
        keep_tokens, keep_heads: the shares that are alive in the last layer.
        keep_values: the share of values that each query and head reads.
        unpruned: the first layers that see everything; default max(3, ceil(.15 L)).
        mlp_ratio: how many times as wide MLPs are; 0 leaves them out.
        form: "gather" lays out the alive tokens alone, "mask" hides the others; the same to rounding.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        layers: int = 4,
        keep_tokens: float = 0.5,
        keep_heads: float = 1.0,
        keep_values: float = 1.0,
        unpruned: int | None = None,
        mlp_ratio: int = 4,
        form: Form = "gather",
        bias: bool = True,
    ) -> None:
        super().__init__()
        shape = head_shape(dim, num_heads, num_kv_heads, head_dim, who="SpAtten")
        flag(self, bias=bias)
        whole(self, layers=layers)
        whole(self, 0, mlp_ratio=mlp_ratio)
        number(self, above=0, most=1, keep_tokens=keep_tokens, keep_heads=keep_heads, keep_values=keep_values)
        choice(self, get_args(Form), form=form)
        self.dim, self.num_heads, self.form = dim, num_heads, form
        self.unpruned = min(layers, max(3, math.ceil(0.15 * layers))) if unpruned is None else unpruned
        self.value_ratio = 1 - keep_values
        self.token_ratios, self.head_ratios = (
            [1 - after / before for before, after in pairwise(shares)] + [0.0]
            for shares in (schedule(layers, share, unpruned=self.unpruned) for share in (keep_tokens, keep_heads))
        )
        sizes = (num_heads, shape.num_kv_heads, shape.head_dim)
        self.layers = nn.ModuleList(CascadeLayer(dim, sizes, hidden=mlp_ratio * dim, bias=bias) for _ in range(layers))

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, form={self.form!r}"

    def forward(
        self, x: Float[Tensor, "B T M"], *, mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None
    ) -> Float[Tensor, "B T M"]:
        """`mask` hides tokens: `regard.masks.padding`, or True = a real one. To those nothing is added."""
        return self.cascade(x, mask=mask)[0]

    def cascade(
        self, x: Float[Tensor, "B T M"], *, mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None
    ) -> tuple[Float[Tensor, "B T M"], Cascade | None]:
        """The output, and what was alive in the last layer with its scores; None of that for packed documents."""
        tokens(self, "x", x, self.dim)
        keep, packed = key_mask(self, mask, x)
        if packed is not None:
            return apart(self, x, packed, keep), None
        alive = x.new_ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
        x, bad = quarantine(x.masked_fill(~alive[..., None], 0))
        out, state = run(x, list(self.layers), Cascade.start(alive, self.num_heads, dtype=x.dtype), self.token_ratios,
                         self.head_ratios, value_ratio=self.value_ratio, form=self.form)  # fmt: skip
        return spoil(out, bad, bad, None), state


def run(
    x: Float[Tensor, "B T M"], layers: Sequence[nn.Module], cascade: Cascade, token_ratios: Sequence[float],
    head_ratios: Sequence[float], *, value_ratio: float = 0.0, form: Form = "gather",
) -> tuple[Float[Tensor, "B T M"], Cascade]:  # fmt: skip
    """What layers such as `CascadeLayer` add to x, each followed by pruning these shares of what is alive."""
    added = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))
    more = x
    for layer, tokens_, heads in zip(layers, token_ratios, head_ratios, strict=True):
        if form == "gather" and readable(x):
            most = int(cascade.tokens.sum(1).amax()) if cascade.tokens.numel() else 0
            at = (~cascade.tokens).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
            small = cascade._replace(**{n: getattr(cascade, n).gather(1, at) for n in ("token_scores", "tokens")})
            wide = at[..., None].expand(-1, -1, x.shape[2])
            more, small = layer((x + added).to(x.dtype).gather(1, wide), small, value_ratio)
            added = added.scatter_add(1, wide, more.to(added.dtype))
            scores = cascade.token_scores.scatter(1, at, small.token_scores.to(cascade.token_scores.dtype))
            cascade = small._replace(token_scores=scores, tokens=cascade.tokens)
        else:
            more, cascade = layer((x + added).to(x.dtype), cascade, value_ratio)
            added = added + more.to(added.dtype)
        cascade = cascade.keep_tokens(tokens_).keep_heads(heads)
    return added.to(more.dtype), cascade
