"""Neighborhood attention: every token of a line, image or volume attends to a window of its own, never cut at borders.

    y_i = softmax over the window of i of (<q_i, k_j> / sqrt(D) + R[(j - i) / d]) v_j

Window k, dilation d, stride s and causality may differ from axis to axis; which keys they make a window of, shifted
inward at the borders, is written in `regard.masks.neighborhood`. s = 1 is a sliding window (NAT, with d > 1 DiNAT),
s = k attention in blocks. R, one value for each head and difference, is NAT's; it needs odd windows and s = 1.

Hassani et al. 2023, https://arxiv.org/abs/2204.07143 (windows, bias); Hassani, Shi 2022, https://arxiv.org/abs/2209.15001
(dilation); Hassani et al. 2025, https://arxiv.org/abs/2504.16922 (stride, causality): abstracts read, the authors' code
followed. Differs from the printed formula: the bias is added after scaling, as in all their code.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard._former import Card, Cost, Paper, register
from regard.kernels import neighborhood as kernel
from regard.kernels.check import check_inputs
from regard.kernels.problem import Problem, honest
from regard.masks import neighborhood as neighborhood_mask
from regard.masks.neighborhood import Neighborhood
from regard.shapes import HeadShape, head_counts
from regard.vision.maps import check_map, to_map, to_tokens

Each = int | Sequence[int]
"""One value for all axes, or one for each."""


def neighborhood_attention(
    q: Float[Tensor, "B H *sizes D"],
    k: Float[Tensor, "B G *sizes D"],
    v: Float[Tensor, "B G *sizes V"],
    *,
    window: Each,
    dilation: Each = 1,
    stride: Each = 1,
    causal: bool | Sequence[bool] = False,
    bias: Float[Tensor, "H *differences"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H *sizes V"]:
    """Attention of every token to its window, in time and memory linear in the number of tokens.

    The same as `regard.attention` under `regard.masks.neighborhood`, of 1 to 3 axes.

    Args:
        window, dilation, stride, causal: of all axes, or of each; see `regard.masks.neighborhood`.
        bias: added to the scaled scores: (H, 2 k - 1, ...), entry k - 1 being the query's own place on that axis.
        scale: multiplies q . k; default 1 / sqrt(D).
    """
    sizes = q.shape[2:-1]
    if q.ndim < 4 or not sizes == k.shape[2:-1] == v.shape[2:-1]:
        shapes = ", ".join(str(tuple(z.shape)) for z in (q, k, v))
        raise ValueError(
            f"neighborhood_attention: q, k, v have shapes {shapes}; expected (batch, heads, *sizes, width), sizes equal"
        )
    mask = neighborhood_mask(sizes, window, dilation=dilation, stride=stride, causal=causal)
    if bias is not None:
        _check_bias(mask, bias, q.shape[1])
    flat_q, flat_k, flat_v = (z.flatten(2, -2) for z in (q, k, v))
    check_inputs(flat_q, flat_k, flat_v)
    p = Problem(flat_q, flat_k, flat_v, q.shape[-1] ** -0.5 if scale is None else scale, mask)
    with torch.autocast(q.device.type, enabled=False):
        return honest(p, partial(kernel.run, table=bias)).unflatten(2, sizes)


def _check_bias(mask: Neighborhood, bias: Tensor, heads: int) -> None:
    if any(axis.stride > 1 or axis.causal or axis.window % 2 == 0 for axis in mask.axes):
        raise ValueError(f"neighborhood_attention: bias needs odd windows, stride 1 and no causal axis (got {mask!r})")
    shape = (heads, *(2 * axis.window - 1 for axis in mask.axes))
    if bias.shape != shape:
        raise ValueError(f"neighborhood_attention: bias has shape {tuple(bias.shape)}; expected {shape}")


class NeighborhoodAttention(nn.Module):
    """`neighborhood_attention` with projections.

    Args:
        dim, num_heads, num_kv_heads, head_dim: as for `regard.Attention`.
        axes: of the maps it takes, 1 to 3.
        window, dilation, stride, causal: of all axes, or of each.
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
        relative: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        G, D = head_counts(dim, num_heads, num_kv_heads, head_dim)
        if axes not in (1, 2, 3):
            raise ValueError(f"NeighborhoodAttention: axes is {axes}; expected 1, 2 or 3")
        self.dim, self.num_heads, self.num_kv_heads, self.head_dim, self.axes = dim, num_heads, G, D, axes
        self.window, self.dilation, self.stride, self.causal = window, dilation, stride, causal
        # A map that is surely large enough shows whether the options fit each other.
        mask = self.mask([math.prod(_largest(z) for z in (window, dilation))] * axes)
        at: dict[str, Any] = {"bias": bias}
        self.q_proj = nn.Linear(dim, num_heads * D, **at)
        self.k_proj = nn.Linear(dim, G * D, **at)
        self.v_proj = nn.Linear(dim, G * D, **at)
        self.o_proj = nn.Linear(num_heads * D, dim, **at)
        self.table: nn.Parameter | None = None
        if relative:
            differences = [2 * axis.window - 1 for axis in mask.axes]
            self.table = nn.Parameter(torch.empty(num_heads, *differences))
            _check_bias(mask, self.table, num_heads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The table as the authors: truncated normal of 0.02."""
        if self.table is not None:
            nn.init.trunc_normal_(self.table, std=0.02)

    def mask(self, sizes: Sequence[int]) -> Neighborhood:
        """Who sees whom on a map of these sizes."""
        return neighborhood_mask(sizes, self.window, dilation=self.dilation, stride=self.stride, causal=self.causal)

    def forward(self, x: Float[Tensor, "B M *sizes"]) -> Float[Tensor, "B M *sizes"]:
        check_map("NeighborhoodAttention", x, self.dim, self.axes)
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
        return to_map(self.o_proj(out.flatten(2, -2).transpose(1, 2).flatten(2)), sizes)

    def extra_repr(self) -> str:
        options = f"window={self.window}, dilation={self.dilation}, stride={self.stride}, causal={self.causal}"
        return f"{self.dim}, {self.num_heads}, axes={self.axes}, {options}"


def _largest(value: Each) -> int:
    return max(value, default=1) if isinstance(value, tuple | list) else value  # type: ignore[return-value]


def _build(
    shape: HeadShape,
    *,
    causal: bool,
    axes: int = 2,
    window: Each = 7,
    dilation: Each = 1,
    stride: Each = 1,
    causal_axes: tuple[bool, ...] | None = None,
    relative: bool = False,
) -> NeighborhoodAttention:
    if causal_axes is not None and causal:
        raise ValueError("neighborhood: give causal=True for all axes or causal_axes for some, not both")
    return NeighborhoodAttention(
        shape.dim,
        shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        axes=axes,
        window=window,
        dilation=dilation,
        stride=stride,
        causal=causal if causal_axes is None else causal_axes,
        relative=relative,
    )


CARD = register(
    Card(
        name="neighborhood",
        family="vision",
        gist="Each token sees a window around it, shifted inward at borders, on 1 to 3 axes.",
        equation="softmax over the window of i of (<q_i, k_j> / sqrt(D) + R[(j - i) / dilation]) v_j",
        paper=Paper(
            "Neighborhood Attention Transformer",
            "Hassani, Walton, Li, Li, Shi",
            2023,
            "2204.07143",
            "abstract; official code",
        ),
        build=_build,
        protocol="FeatureMixer",
        supports=frozenset({"bidirectional", "causal", "gqa", "compile"}),
        cost=Cost("2*B*H*N*window**axes*D", ""),
        claim="Time and memory are linear in the number of tokens: python -m benchmarks.neighborhood.",
        differs=("the bias is added after scaling, as in the authors' code; the printed formula scales it",),
        verified="third-party",
        example={"window": 3},
        tasks=("digits",),
    )
)
