"""ETC: a few global tokens see everything; long tokens see a window and the global tokens."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, divides, number, refuse, whole
from regard.masks import Mask, global_tokens
from regard.masks import window as near
from regard.mixers.global_local import NOTHING, Pieces, Table, distance_labels, global_local_attention, window
from regard.pipeline.tokens import key_padding
from regard.tracing import exporting

CARD = Card(
    "etc",
    equation="""long i:    one softmax over long j with |i - j| <= R, and all global j      time O(N (2R + 1 + NG))
global i:  one softmax over all global j and all long j
s_ij = (q_i . k_j + q_i . E[label_ij] + e0[label_ij]) / sqrt(D)    a table (E, e0) for each kind of query
label of d = j - i: min(d, K) for d >= 0, K + min(-d, K) for d < 0, so 0 .. 2K""",
    papers=(
        Paper(
            "ETC: Encoding Long and Structured Inputs in Transformers",
            "Ainslie et al.",
            2020,
            "2004.08483",
            "abstract; a public note; official code",
        ),
    ),
    supports={"bidirectional", "padding", "dropout", "compile"},
    lacks={"packed": "a row begins with its global tokens, and a document has none of its own"},
    traits={"normalised", "nonnegative", "linear_in_values"},
    cost=Cost(
        "B*M*(6*min(T, max(radius, 32))**2*ceil(T/min(T, max(radius, 32))) + T*(4*num_global + 2*max_distance + 2))", ""
    ),
    claim="Far tokens are reached in two layers through the globals, and in no other way: "
    "tests/mixers/test_etc.py::test_far_tokens_are_reached_in_two_layers_through_the_globals.",
    differs=(
        "Masks are hard, where the code adds -10000, so that a query that may see nothing gives 0.",
        "Global and long tokens have one width.",
        "Every pair of a long and a global token has one extra label, 2K + 1; structured labels go to "
        "`global_local_attention`.",
    ),
    verified="third-party",
    example={"num_global": 2, "radius": 2, "max_distance": 3},
    defaults={
        "num_global": "ours",
        "radius": "paper, base model",
        "max_distance": "paper, base model",
        "share": "code",
    },
)

_PROJECTIONS = {
    "qkv": {"l2l": "all", "l2g": "all", "g2g": "all", "g2l": "all"},
    "kv": {"l2l": "long", "l2g": "long", "g2g": "global", "g2l": "global"},
    "none": {"l2l": "l2l", "l2g": "l2g", "g2g": "g2g", "g2l": "g2l"},
}
"""Which key and value projection each piece uses under each form of sharing."""


@CARD.module
class ETCAttention(nn.Module):
    """Bidirectional global-local self-attention. The first `num_global` tokens are the global ones.

    Args:
        dim, num_heads: M and H; the head width is dim / num_heads.
        num_global: NG; the default is this library's.
        radius: R, a long token sees that many neighbours on each side; 84 in the paper's base model.
        max_distance: K, beyond which distances share a label; None leaves labels out. 12 in the paper's base model.
        share: "qkv", the code's default, uses one set of projections for everything; else queries and outputs have one
            for each side, keys and values one for each side's queries ("kv") or for each piece ("none").
        dropout: of the weights, in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_global: int = 2,
        radius: int = 84,
        max_distance: int | None = 12,
        share: Literal["qkv", "kv", "none"] = "qkv",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads, num_global=num_global, radius=radius)
        if max_distance is not None:
            whole(self, max_distance=max_distance)
        divides(self, num_heads=num_heads, dim=dim)
        choice(self, _PROJECTIONS, share=share)
        number(self, least=0, most=1, dropout=dropout)
        self.dim, self.num_heads, self.num_global = dim, num_heads, num_global
        self.radius, self.max_distance, self.share, self.dropout = radius, max_distance, share, dropout
        sides = ["all"] if share == "qkv" else ["long", "global"]
        pieces = sorted(set(_PROJECTIONS[share].values()))
        self.q_proj = nn.ModuleDict({name: nn.Linear(dim, dim) for name in sides})
        self.k_proj = nn.ModuleDict({name: nn.Linear(dim, dim) for name in pieces})
        self.v_proj = nn.ModuleDict({name: nn.Linear(dim, dim) for name in pieces})
        self.o_proj = nn.ModuleDict({name: nn.Linear(dim, dim) for name in sides})
        if max_distance is not None:
            count = 2 * max_distance + 2
            for side in ("long", "global"):
                vector = torch.empty(count, num_heads, dim // num_heads)
                self.register_parameter(f"{side}_vector", nn.Parameter(vector))
                self.register_parameter(f"{side}_number", nn.Parameter(torch.empty(count, num_heads)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, p in self.named_parameters():
            if name.endswith(("bias", "_number")):
                nn.init.zeros_(p)
            else:
                std = 0.5 if name.endswith("_vector") else 0.02
                nn.init.trunc_normal_(p, std=std, a=-2 * std, b=2 * std)

    def receptive_field(self) -> Mask:
        """Global tokens see and are seen by all; long ones see `radius` neighbours on each side."""
        return global_tokens(self.num_global) | near(self.radius + 1)

    @checked(M="dim")
    def forward(
        self,
        x: Float[Tensor, "B T M"],
        *,
        mask: Mask | Bool[Tensor, "B T"] | Bool[Tensor, "B 1 1 T"] | None = None,
    ) -> Float[Tensor, "B T M"]:
        """x is [global tokens, long tokens]; mask hides keys (`regard.masks.padding`, or True = seen)."""
        NG, T = self.num_global, x.shape[1]
        if T < NG:
            refuse(self, "x", "has too few tokens", T, f"at least num_global = {NG}")
        radius = self.radius if exporting() else min(self.radius, max(1, T - NG))  # nobody stands farther apart
        keep = key_padding(self, mask, x)
        # What is not finite must reach all rows that may see it and no others, not even as 0 * NaN.
        bad = ~x.detach().isfinite().all(-1)
        x = x.masked_fill(bad[..., None], 0)
        parts = {"global": x[:, :NG], "long": x[:, NG:]}

        def heads(projections: nn.ModuleDict, name: str, side: str) -> Float[Tensor, "B H t D"]:
            return projections[name](parts[side]).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        query = {side: heads(self.q_proj, side if side in self.q_proj else "all", side) for side in parts}
        key_side = {"l": "long", "g": "global"}
        k, v = (
            Pieces(
                **{piece: heads(proj, name, key_side[piece[-1]]) for piece, name in _PROJECTIONS[self.share].items()}
            )
            for proj in (self.k_proj, self.v_proj)
        )
        tables = {}
        if self.max_distance is not None:
            for side in parts:
                tables[f"{side}_table"] = Table(getattr(self, f"{side}_vector"), getattr(self, f"{side}_number"))
        long_out, global_out = global_local_attention(
            query["long"],
            query["global"],
            k,
            v,
            radius=radius,
            masks=NOTHING if keep is None else self._masks(keep, radius),
            labels=self._labels(T - NG, radius, x.device),
            dropout=self.dropout if self.training else 0.0,
            **tables,
        )
        out = {"global": global_out, "long": long_out}
        merged = {side: z.transpose(1, 2).flatten(2).to(x.dtype) for side, z in out.items()}
        y = [self.o_proj[side if side in self.o_proj else "all"](merged[side]) for side in ("global", "long")]
        return torch.cat(y, 1).masked_fill(self._sees(bad, keep, radius)[..., None], torch.nan)

    def _sees(self, bad: Bool[Tensor, "B T"], keep: Bool[Tensor, "B T"] | None, radius: int) -> Bool[Tensor, "B T"]:
        """Which tokens are bad or may see a bad one."""
        seen = bad if keep is None else bad & keep
        of_global, of_long = seen[:, : self.num_global], seen[:, self.num_global :]
        by_long = of_global.any(1, keepdim=True) | window(of_long, radius).any(-1)
        return bad | torch.cat([seen.any(1, keepdim=True).expand_as(of_global), by_long], 1)

    def _masks(self, keep: Bool[Tensor, "B T"], radius: int) -> Pieces[Tensor | None]:
        NG, N = self.num_global, keep.shape[1] - self.num_global
        near, far = keep[:, None, :NG], keep[:, None, NG:]
        l2l = window(keep[:, NG:], radius)
        return Pieces(l2l, near.expand(-1, N, -1), near.expand(-1, NG, -1), far.expand(-1, NG, -1))

    def _labels(self, N: int, radius: int, device: torch.device) -> Pieces[Tensor | None]:
        if self.max_distance is None:
            return NOTHING
        K, NG = self.max_distance, self.num_global
        offsets = torch.arange(-radius, radius + 1, device=device)
        i = torch.arange(NG, device=device)
        across = torch.full((1, N, NG), 2 * K + 1, device=device)
        l2l = distance_labels(offsets, K).expand(1, N, -1)
        return Pieces(l2l, across, distance_labels(i - i[:, None], K)[None], across.mT)
