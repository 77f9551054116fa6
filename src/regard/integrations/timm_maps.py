"""DaViT's, MaxxViT's and GCViT's attention, of windows, channels and maps, with any mechanism."""

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, fx

from regard.integrations.timm_attend import attend
from regard.integrations.timm_layers import DROPS, Adapted
from regard.shapes import HeadShape

fx.wrap("attend")  # said where it is called from


class WindowAttention(Adapted):
    """DaViT's: among the pixels of a window, which the block around it cuts."""

    holds = frozenset({"qkv", "proj", "softmax"})

    def forward(self, x: Float[Tensor, "W N C"]) -> Float[Tensor, "W N C"]:
        q, k, v = self._stacked(x).unbind(0)
        return self.proj(attend(self.parts, q, k, v, x, scale=self.scale).flatten(2))


class ChannelAttention(Adapted):
    """DaViT's: among the channels of a group."""

    holds = frozenset({"qkv", "proj"})
    placed = has_tokens = False

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        q, k, v = self._stacked(x).mT.unbind(0)
        # Its own names are others: keys ask values, and get queries.
        out = attend(self.parts, k, v, q, None, scale=self.scale)
        return self.proj(out.permute(0, 3, 2, 1).flatten(2))


class ChannelAttentionV2(Adapted):
    """DaViT's second form, which divides by the number of tokens."""

    holds = frozenset({"qkv", "proj"})
    placed = has_tokens = False

    groups: int
    head_dim: int
    dynamic_scale: bool

    def _heads(self) -> int:
        return self.groups

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        q, k, v = self._stacked(x).mT.unbind(0)
        scale = (x.shape[1] if self.dynamic_scale else self.head_dim) ** -0.5
        return self.proj(attend(self.parts, q, k, v, None, scale=scale).permute(0, 3, 2, 1).flatten(2))


class WindowAttentionGlobal(Adapted):
    """GCViT's: among the pixels of a window, whose queries may be those of the whole image."""

    holds = frozenset({"qkv", "proj", "rel_pos"}) | DROPS
    use_global: bool
    rel_pos: Any

    def samples(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        N, dim = self.rel_pos.window_area, self._shape().dim
        x = torch.randn(2, N, dim, generator=generator)
        return (x, torch.randn(1, N, dim, generator=generator)) if self.use_global else (x,)

    def _shape(self) -> HeadShape:
        H = self.num_heads
        return HeadShape(self.qkv.in_features, H, H, self.proj.in_features // H)

    def forward(self, x: Float[Tensor, "W N C"], q_global: Tensor | None = None) -> Float[Tensor, "W N C"]:
        W, N, _ = x.shape
        if self.use_global and q_global is not None:
            k, v = self.qkv(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            # The windows of an image stand together.
            q = q_global.repeat_interleave(W // q_global.shape[0], 0)
            q = q.reshape(W, N, self.num_heads, -1).transpose(1, 2)
        else:
            q, k, v = self._stacked(x).unbind(0)
        bias = self.rel_pos.get_bias()
        return self._out(attend(self.parts, q, k, v, x, scale=self.scale, drop=self.attn_drop, bias=bias))


class AttentionCl(Adapted):
    """MaxxViT's, of maps whose channels stand last."""

    holds = frozenset({"qkv", "proj"}) | DROPS
    may_hold = frozenset({"rel_pos"})
    last: ClassVar[bool] = True
    head_first: bool
    rel_pos: Any

    def samples(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        sizes = (2, 3) if self.rel_pos is None else self.rel_pos.window_size
        dim = self._shape().dim
        return (torch.randn(2, *((*sizes, dim) if self.last else (dim, *sizes)), generator=generator),)

    def forward(
        self, x: Float[Tensor, "B *sizes C"], shared_rel_pos: Tensor | None = None
    ) -> Float[Tensor, "B *sizes V"]:
        out = self._attended(self.qkv(x).flatten(1, -2), x.flatten(1, -2), shared_rel_pos)
        return self.proj_drop(self.proj(out.reshape(x.shape[:-1] + (-1,))))

    def _attended(
        self, z: Float[Tensor, "B N stacked"], x: Float[Tensor, "B N C"], shared: Tensor | None
    ) -> Float[Tensor, "B N V"]:
        if self.head_first:  # a head's queries, keys and values stand together
            q, k, v = z.unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4).unbind(0)
        else:
            q, k, v = z.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = shared if self.rel_pos is None else self.rel_pos.get_bias()
        return attend(self.parts, q, k, v, x, scale=self.scale, drop=self.attn_drop, bias=bias).flatten(2)


class Attention2d(AttentionCl):
    """MaxxViT's, of maps whose channels stand first."""

    last = False

    def _shape(self) -> HeadShape:
        H = self.num_heads
        return HeadShape(self.qkv.in_channels, H, H, self.qkv.out_channels // 3 // H)

    def forward(self, x: Float[Tensor, "B C Y X"], shared_rel_pos: Tensor | None = None) -> Float[Tensor, "B V Y X"]:
        B, _, Y, X = x.shape
        out = self._attended(self.qkv(x).flatten(2).mT, x.flatten(2).mT, shared_rel_pos)
        return self.proj_drop(self.proj(out.mT.reshape(B, -1, Y, X)))
