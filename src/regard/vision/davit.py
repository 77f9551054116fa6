"""DaViT's two attentions: among the pixels of a window, and among the channels of a group.

    window:   softmax(Q K^T / sqrt(D)) V      for each head and each window of w x w pixels that do not overlap
    channel:  softmax(Q^T K / sqrt(C)) V^T    for each group of C = M / G channels; Q, K, V (N, C), N all the pixels

A channel's token is its whole map, so that channel attention sees the entire image at a cost linear in N; windows
refine what is near. A DaViT layer is one after the other.

Ding et al. 2022, https://arxiv.org/abs/2204.03645: abstract read, the authors' released code followed. Differs from
it: their projection is cut into what we call V, Q and K, in that order, for channels. A map that windows don't divide
is padded with zeros on the right and below before the projections; as in their code those tokens are attended to.
"""

from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard._former import Card, Cost, Paper, register
from regard.pipeline.function import attention
from regard.shapes import HeadShape
from regard.vision.maps import check_map, to_map, to_tokens

PAPER = Paper(
    "DaViT: Dual Attention Vision Transformers",
    "Ding, Xiao, Codella, Luo, Wang, Yuan",
    2022,
    "2204.03645",
    "abstract; official code",
)


def window_attention(
    q: Float[Tensor, "B H Y X D"], k: Float[Tensor, "B H Y X D"], v: Float[Tensor, "B H Y X V"], *, window: int
) -> Float[Tensor, "B H Y X V"]:
    """Attention among the pixels of each window; `window` divides Y and X."""
    B, H, Y, X, _ = q.shape
    down, across = Y // window, X // window

    def windows(z: Tensor) -> Float[Tensor, "windows H pixels d"]:
        parts = z.reshape(B, H, down, window, across, window, -1).permute(0, 2, 4, 1, 3, 5, 6)
        return parts.reshape(B * down * across, H, window * window, -1)

    out = attention(windows(q), windows(k), windows(v)).view(B, down, across, H, window, window, -1)
    return out.permute(0, 3, 1, 4, 2, 5, 6).reshape(B, H, Y, X, -1)


def channel_attention(
    q: Float[Tensor, "B G N C"],
    k: Float[Tensor, "B G N C"],
    v: Float[Tensor, "B G N C"],
    *,
    scale: Literal["channels", "tokens"] = "channels",
) -> Float[Tensor, "B G N C"]:
    """Attention among the channels of each group, by the products of their whole maps.

    `scale` divides them by sqrt(C), or by sqrt(N), which keeps them of one size on maps of all sizes (as timm's V2).
    """
    size = q.shape[3] if scale == "channels" else q.shape[2]
    return attention(q.mT, k.mT, v.mT, scale=size**-0.5).mT


class _DualAttention(nn.Module):
    """What both kinds share: four projections of tokens."""

    def __init__(self, dim: int, num_heads: int, *, bias: bool) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"{type(self).__name__}: {num_heads} heads or groups do not divide {dim} channels")
        self.dim, self.num_heads = dim, num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.o_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As vision transformers are: truncated normal of 0.02, no bias."""
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def _heads(self, tokens: Float[Tensor, "B N M"]) -> list[Float[Tensor, "B H N D"]]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return [f(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in projections]

    def _merged(self, heads: Float[Tensor, "B H N D"], sizes: tuple[int, ...]) -> Float[Tensor, "B M *sizes"]:
        return to_map(self.o_proj(heads.transpose(1, 2).flatten(2)), sizes)


class WindowAttention(_DualAttention):
    """`window_attention` with projections.

    Args:
        dim, num_heads: M and H.
        window: w, in pixels.
        bias: of queries, keys and values.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = 7,
        bias: bool = True,
    ) -> None:
        if window < 1:
            raise ValueError(f"WindowAttention: window is {window}; expected at least 1")
        super().__init__(dim, num_heads, bias=bias)
        self.window = window

    def forward(self, x: Float[Tensor, "B M Y X"]) -> Float[Tensor, "B M Y X"]:
        check_map("WindowAttention", x, self.dim)
        Y, X = x.shape[2:]
        padded = F.pad(x, (0, -X % self.window, 0, -Y % self.window))
        sizes = padded.shape[2:]
        q, k, v = (z.unflatten(2, sizes) for z in self._heads(to_tokens(padded)))
        out = window_attention(q, k, v, window=self.window)[:, :, :Y, :X]
        return self._merged(out.flatten(2, 3), (Y, X))

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, window={self.window}"


class ChannelAttention(_DualAttention):
    """`channel_attention` with projections, on a map of any number of axes.

    Args:
        dim: M.
        num_groups: G.
        scale: as for `channel_attention`.
        bias: of queries, keys and values.
    """

    def __init__(
        self,
        dim: int,
        num_groups: int,
        *,
        scale: Literal["channels", "tokens"] = "channels",
        bias: bool = True,
    ) -> None:
        if scale not in ("channels", "tokens"):
            raise ValueError(f"ChannelAttention: scale is {scale!r}; expected 'channels' or 'tokens'")
        super().__init__(dim, num_groups, bias=bias)
        self.scale = scale

    def forward(self, x: Float[Tensor, "B M *sizes"]) -> Float[Tensor, "B M *sizes"]:
        check_map("ChannelAttention", x, self.dim, axes=None)
        q, k, v = self._heads(to_tokens(x))
        return self._merged(channel_attention(q, k, v, scale=self.scale), x.shape[2:])  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, scale={self.scale!r}"


def _plain(name: str, shape: HeadShape) -> None:
    if shape.head_dim * shape.num_heads != shape.dim:
        raise ValueError(f"{name}: head_dim must be dim / num_heads (got {shape.head_dim} for {shape.num_heads} heads)")


def _spatial(
    shape: HeadShape,
    *,
    causal: bool,
    window: int = 7,
) -> WindowAttention:
    _plain("davit_spatial", shape)
    return WindowAttention(shape.dim, shape.num_heads, window=window)


def _channel(
    shape: HeadShape,
    *,
    causal: bool,
    scale: Literal["channels", "tokens"] = "channels",
) -> ChannelAttention:
    _plain("davit_channel", shape)
    return ChannelAttention(shape.dim, shape.num_heads, scale=scale)


SPATIAL = register(
    Card(
        name="davit_spatial",
        family="vision",
        gist="Attention among the pixels of windows that do not overlap.",
        equation="softmax(Q K^T / sqrt(D)) V inside each window of window x window pixels",
        paper=PAPER,
        build=_spatial,
        protocol="FeatureMixer",
        supports=frozenset({"bidirectional", "compile"}),
        cost=Cost("2*B*Y*X*window**2*M", ""),
        claim="Linear in pixels: tests/vision/test_davit.py.",
        differs=("maps are padded with zeros to whole windows, and those tokens are attended to, as in their code",),
        verified="third-party",
        example={"window": 3},
    )
)

CHANNEL = register(
    Card(
        name="davit_channel",
        family="vision",
        gist="Attention among channels: a channel's token is its whole map.",
        equation="softmax(Q^T K / sqrt(C)) V^T for each group of C channels",
        paper=PAPER,
        build=_channel,
        protocol="FeatureMixer",
        supports=frozenset({"bidirectional", "compile"}),
        cost=Cost("2*B*Y*X*M*D", ""),
        claim="Linear in pixels while every channel token sees the entire image: tests/vision/test_davit.py.",
        differs=("queries, keys and values carry their usual names; the authors' are our keys, values and queries",),
        verified="third-party",
    )
)
