"""Strided attention of the Efficient Conformer, and how its local attention is built.

Local attention, windows of K frames that do not overlap, is `regard.Attention` with the mask `regard.masks.blocks(K)`
and, for its relative form, the position `RelativeSinusoids`. (The authors' code of that form mixes up heads and windows
where there are several of both.)
"""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from regard.checks import choice, divides, tokens, whole
from regard.kernels import Problem, execute
from regard.masks import Mask, full, padding, predicate
from regard.pipeline.head_mixer import HeadMixer
from regard.pipeline.tokens import key_padding, quarantine, spoil
from regard.positions.relative_sinusoids import RelativeSinusoids


class StridedAttention(HeadMixer):
    """Attention that makes a sequence shorter: every `stride`-th frame asks, all frames answer.

    Args:
        dim, num_heads, causal, bias: as of `HeadMixer`; H divides M.
        stride: s.
        position: "relative", or "none".

    Shapes: x (B, T, M) -> (B, ceil(T / s), M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        stride: int = 2,
        position: Literal["relative", "none"] = "relative",
        causal: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, causal=causal, bias=bias)
        whole(self, stride=stride)
        divides(self, num_heads=num_heads, dim=dim)
        choice(self, ("relative", "none"), position=position)
        self.stride = stride
        self.relative = RelativeSinusoids(dim, num_heads, causal=causal) if position == "relative" else None

    def forward(self, x: Float[Tensor, "B T M"], *, mask: Mask | Tensor | None = None) -> Float[Tensor, "B n M"]:  # type: ignore[override]
        """`mask` hides keys: `regard.masks.padding`, or True = a real key."""
        tokens(self, "x", x, self.dim)
        keep = key_padding(self, mask, x)
        x, bad = quarantine(x)
        q, k, v = self.split(x[:, :: self.stride], x)
        T, S = q.shape[2], k.shape[2]
        sees = full()
        if self.causal:  # masks count queries from the end
            sees = predicate(lambda b, h, i, j: j <= (i - S + T) * self.stride)
        if keep is not None:
            sees = sees & padding(keep)
            k, v = (z.masked_fill(~keep[:, None, :, None], 0) for z in (k, v))
        where = torch.arange(T, device=x.device) * self.stride
        out = self.merge(execute(Problem(q, k, v, q.shape[3] ** -0.5, sees, position=self.relative, positions=where)))
        return out if bad is None else spoil(out, None, bad, sees)
