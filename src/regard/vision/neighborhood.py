"""Neighborhood attention: each token sees a window around it, shifted inward at borders."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, fits, refuse
from regard.kernels import neighborhood as kernel
from regard.kernels.finite import honest
from regard.masks import neighborhood as neighborhood_mask
from regard.masks.grids import Neighborhood
from regard.pipeline.function import attention
from regard.shapes import head_shape
from regard.tracing import as_it_is
from regard.vision.maps import AXES, to_map, to_tokens
from regard.vision.neighborhood_lse import differences, posed, spoilt
from regard.weights import Loaded, same

CARD = Card(
    "neighborhood",
    equation="""y_i = softmax over the window of i of (<q_i, k_j> / sqrt(D) + R[(j - i) / d]) v_j
window k, dilation d, stride s and causality of each axis: see `regard.masks.neighborhood` for the keys of a window
s = 1 slides (NAT, with d > 1 DiNAT), s = k is attention in blocks
R (NAT) has one value for each head and difference, and needs odd windows and s = 1""",
    papers=(
        Paper(
            "Neighborhood Attention Transformer",
            "Hassani, Walton, Li, Li, Shi",
            2023,
            "2204.07143",
            "abstract; official code; the printed formula from a third party's summary",
        ),
        Paper(
            "Dilated Neighborhood Attention Transformer",
            "Hassani, Shi",
            2022,
            "2209.15001",
            "abstract; official code; the model in transformers",
        ),
        Paper(
            "Faster Neighborhood Attention: Reducing the O(n^2) Cost of Self Attention at the Threadblock Level",
            "Hassani, Hwu, Shi",
            2024,
            "2403.04690",
            "abstract; official code of functions and masks, not of the GPU kernels",
        ),
        Paper(
            "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of Light",
            "Hassani et al.",
            2025,
            "2504.16922",
            "abstract; official code of functions and masks, not of the GPU kernels",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "causal", "gqa", "compile"},
    cost=Cost("2*B*H*N*window**axes*D", ""),
    claim="Work is linear in the number of tokens; `python -m benchmarks.neighborhood` measures time and memory: "
    "tests/vision/test_neighborhood.py::test_keys_looked_at_grow_with_tokens_and_fall_to_the_window_where_windows_are_blocks.",
    differs=(
        "The bias is added after scaling, as in all of the authors' code; the printed formula scales it.",
        "Tiles gather their slab of keys and run torch's attention on it; the authors' fused kernels copy no "
        "keys. On GPUs `regard.attention` under the mask has the Triton kernel for its blocks.",
        "A window of one token is allowed, which the authors' code refuses.",
        "Left out: the backbones; `alternating_dilations` says DiNAT's. The model of speed-ups, `masks.tile_cost`, is "
        "made after their words, as theirs is not public.",
    ),
    verified="third-party",
    example={"window": 3},
    tries={"causal_axes": (True, False), "small_maps": {"window": 16}},
    tasks=("digits", "shapes"),
    defaults={
        "axes": "code, NAT",
        "window": "code, the released models",
        "dilation": "code, NAT",
        "stride": "code, NAT",
        "causal_axes": "ours, as `causal`",
        "relative": "code, natten from 0.20",
        "small_maps": "ours, as the function",
        "bias": "code",
    },
)

Each = int | Sequence[int]
"""One value for all axes, or one for each."""


@checked()
def neighborhood_attention(
    q: Float[Tensor, "B H X *sizes D"],
    k: Float[Tensor, "B G X *sizes D"],
    v: Float[Tensor, "B G X *sizes V"],
    *,
    window: Each,
    dilation: Each = 1,
    stride: Each = 1,
    causal: bool | Sequence[bool] = False,
    bias: Float[Tensor, " H *differences"] | None = None,
    scale: float | None = None,
    extra_keys: Float[Tensor, "B G E D"] | None = None,
    extra_values: Float[Tensor, "B G E V"] | None = None,
) -> Float[Tensor, "B H X *sizes V"]:
    """Attention of every token to its window, in time and memory linear in the number of tokens.

    The same as `regard.attention` under `regard.masks.neighborhood`, of 1 to 3 axes.

    Args:
        window, dilation, stride, causal: of all axes, or of each; see `regard.masks.neighborhood`.
        bias: added to the scaled scores: (H, 2 k - 1, ...), entry k - 1 being the query's own place on that axis.
        scale: multiplies q . k; default 1 / sqrt(D).
        extra_keys, extra_values: besides the map's, as of a text; every query sees them, in the same softmax.
    """
    given = {"window": window, "dilation": dilation, "stride": stride, "causal": causal}
    p, extra = posed("neighborhood_attention", q, k, v, given, bias, scale, extra_keys, extra_values)
    assert isinstance(p.mask, Neighborhood)
    if bias is None and all(axis.window == axis.size and not axis.causal for axis in p.mask.axes):
        keys, values = (p.k, p.v) if extra is None else (torch.cat(z, 2) for z in zip((p.k, p.v), extra, strict=True))
        out = attention(p.q, keys, values, scale=p.scale)
    else:
        with as_it_is(q.device):
            out = honest(p, partial(kernel.run, table=bias, extra=extra))
    return spoilt(out, extra_keys, extra_values).unflatten(2, q.shape[2:-1])


@CARD.module
class NeighborhoodAttention(nn.Module):
    """`neighborhood_attention` with projections.

    Args:
        dim, num_heads, num_kv_heads, head_dim: as for `regard.Attention`.
        axes: of the maps it takes, 1 to 3.
        window, dilation, stride, causal: of all axes, or of each. The released models' window is 7.
        causal_axes: in place of `causal`, where some axes only are causal.
        small_maps: "refuse" those that window times dilation does not fit, or "pad" them with zeros on the right and
            below, which are attended to, as in DiNAT.
        relative: whether differences of place have a learned bias, as in NAT and DiNAT.
        bias: whether the projections have one.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        axes: int = 2,
        window: Each = 7,
        dilation: Each = 1,
        stride: Each = 1,
        causal: bool | Sequence[bool] = False,
        causal_axes: Sequence[bool] | None = None,
        small_maps: Literal["refuse", "pad"] = "refuse",
        relative: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        shape = head_shape(dim, num_heads, num_kv_heads, head_dim, who=type(self).__name__)
        choice(self, AXES, axes=axes)
        choice(self, ("refuse", "pad"), small_maps=small_maps)
        if causal_axes is not None and causal is not False:
            refuse(
                self, "causal_axes", "is given beside causal", causal_axes, "causal=True, or causal_axes for some axes"
            )
        G, D = shape.num_kv_heads, shape.head_dim
        self.dim, self.num_heads, self.num_kv_heads, self.head_dim, self.axes = dim, num_heads, G, D, axes
        self.window, self.dilation, self.stride, self.small_maps = window, dilation, stride, small_maps
        self.causal = causal if causal_axes is None else tuple(causal_axes)
        # A map that is surely large enough shows whether the options fit each other.
        self._fitting = mask = self.mask([math.prod(_largest(z) for z in (window, dilation))] * axes)
        self.q_proj = nn.Linear(dim, num_heads * D, bias=bias)
        self.k_proj = nn.Linear(dim, G * D, bias=bias)
        self.v_proj = nn.Linear(dim, G * D, bias=bias)
        self.o_proj = nn.Linear(num_heads * D, dim, bias=bias)
        self.table: nn.Parameter | None = None
        if relative:
            self.table = nn.Parameter(torch.empty(num_heads, *differences(self, mask)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The table as the authors: truncated normal of 0.02."""
        if self.table is not None:
            nn.init.trunc_normal_(self.table, std=0.02)

    def mask(self, sizes: Sequence[int]) -> Neighborhood:
        """Who sees whom on a map of these sizes."""
        return neighborhood_mask(sizes, self.window, dilation=self.dilation, stride=self.stride, causal=self.causal)

    def forward(self, x: Float[Tensor, "B M *sizes"]) -> Float[Tensor, "B M *sizes"]:
        fits(self, f"B M {AXES[self.axes]}", {"M": self.dim}, x=x)
        whole_map: tuple[Any, ...] = (..., *(slice(0, n) for n in x.shape[2:]))
        if self.small_maps == "pad":
            short = [max(0, a.window * a.dilation - n) for a, n in zip(self._fitting.axes, x.shape[2:], strict=True)]
            x = F.pad(x, [n for one in reversed(short) for n in (0, one)])
        sizes, tokens = tuple(x.shape[2:]), to_tokens(x)
        q, k, v = (
            f(tokens).unflatten(-1, (-1, self.head_dim)).transpose(1, 2).unflatten(2, sizes)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = neighborhood_attention(
            q,
            k,
            v,
            window=self.window,
            dilation=self.dilation,
            stride=self.stride,
            causal=self.causal,
            bias=self.table,
        )
        return to_map(self.o_proj(out.flatten(2, -2).transpose(1, 2).flatten(2)), sizes)[whole_map]

    def extra_repr(self) -> str:
        options = f"window={self.window}, dilation={self.dilation}, stride={self.stride}, causal={self.causal}"
        return f"{self.dim}, {self.num_heads}, axes={self.axes}, {options}"


def _largest(value: Each) -> int:
    return max(value, default=1) if isinstance(value, tuple | list) else value  # type: ignore[return-value]


@CARD.loads("transformers", "NeighborhoodAttention")
def _transformers(theirs: Any) -> Loaded:
    """NAT's and DiNAT's, on maps (B, M, Y, X) in place of (B, Y, X, M). It has no output projection."""
    biased = theirs.query.bias is not None

    def build() -> NeighborhoodAttention:
        dim, window = theirs.all_head_size, {"window": theirs.kernel_size, "dilation": theirs.dilation}
        return NeighborhoodAttention(dim, theirs.num_attention_heads, **window, relative=True, bias=biased)

    return Loaded(build, same(theirs, {"q_proj": "query", "k_proj": "key", "v_proj": "value", "table": "rpb"}))
