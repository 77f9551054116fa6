"""DaViT's spatial half: attention among the pixels of windows that do not overlap.

Its other half attends among the channels of a group. A channel's token is its whole map, so that it sees the entire
image at a cost linear in the pixels; windows refine what is near. A DaViT layer is one after the other.
"""

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, divides, refuse, whole
from regard.pipeline.function import attention
from regard.vision.maps import in_windows, to_map, to_tokens
from regard.weights import Loaded, Move, same, setting, stacked

PAPERS = (
    Paper(
        "DaViT: Dual Attention Vision Transformers",
        "Ding, Xiao, Codella, Luo, Wang, Yuan",
        2022,
        "2204.03645",
        "abstract; official code",
    ),
)

SPATIAL = Card(
    "davit_spatial",
    equation="softmax(Q K^T / sqrt(D)) V      for each head and each window of window x window pixels",
    papers=PAPERS,
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("2*B*ceil(Y/window)*ceil(X/window)*window**4*M", ""),
    claim="Linear in pixels: tests/vision/test_davit.py::test_cost_is_linear_in_pixels.",
    differs=(
        "A map that windows don't divide is padded with zeros on the right and below before the projections; as in the "
        "authors' code those tokens are attended to.",
    ),
    verified="third-party",
    example={"window": 3},
    defaults={"window": "code", "bias": "code"},
)

CHANNEL = Card(
    "davit_channel",
    equation="""softmax(Q^T K / sqrt(C)) V^T    for each of G groups of C = M / G channels
Q, K, V (N, C), N all the pixels; scale="tokens" divides by sqrt(N) instead""",
    papers=PAPERS,
    gist="DaViT's channel half: attention among channels; a channel's token is its whole map.",
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("2*B*Y*X*M*D", ""),
    claim="Linear in pixels while every channel token sees the entire image: "
    "tests/vision/test_davit.py::test_cost_is_linear_in_pixels, "
    "tests/vision/test_davit.py::test_channels_see_the_whole_image_and_windows_only_their_own.",
    differs=(
        "Queries, keys and values carry their usual names: the authors' projection is cut into what we call V, Q and "
        "K, in that order.",
    ),
    verified="third-party",
    defaults={"bias": "code", "scale": "code"},
)


class Beyond(NamedTuple):
    """Pixels outside of the map that are all the same: one key and value, and how many of them each window has."""

    k: Float[Tensor, "1 H 1 D"]
    v: Float[Tensor, "1 H 1 V"]
    number: int


@checked()
def window_attention(
    q: Float[Tensor, "B H Y X D"],
    k: Float[Tensor, "B H Y X D"],
    v: Float[Tensor, "B H Y X V"],
    *,
    window: int | tuple[int, int],
    beyond: Beyond | None = None,
    bias: Float[Tensor, "H pixels pixels"] | None = None,
    mask: Bool[Tensor, "windows pixels pixels"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H Y X V"]:
    """Attention among the pixels of each window; `window`, its sides or both of them, divides Y and X.

    Args:
        bias: added to the scores of every window.
        mask: of each window, row by row, True = may attend. Neither goes with `beyond`.
        scale: multiplies q . k; default 1 / sqrt(D).
    """
    B, H, Y, X, _ = q.shape
    tall, wide = window if isinstance(window, tuple) else (window, window)
    down, across = Y // tall, X // wide
    if beyond is not None and not (bias is None and mask is None):
        refuse("window_attention", "beyond", "does not go with a bias or mask", "both", "one of them")
    queries, keys, values = (in_windows(z, (tall, wide)) for z in (q, k, v))
    added, seen = None if bias is None else bias[None], None if mask is None else mask.repeat(B, 1, 1)[:, None]
    if beyond is not None:  # n equal keys are one whose score is log n greater
        keys, values = (
            torch.cat([z, one.expand(len(z), -1, -1, -1)], 2) for z, one in ((keys, beyond.k), (values, beyond.v))
        )
        added = F.pad(keys.new_zeros(1, 1, 1, tall * wide), (0, 1), value=math.log(beyond.number))
    out = attention(queries, keys, values, bias=added, mask=seen, scale=scale)
    V = v.shape[-1]
    return out.view(B, down, across, H, tall, wide, V).permute(0, 3, 1, 4, 2, 5, 6).reshape(B, H, Y, X, V)


@checked()
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
        whole(self, dim=dim, num_heads=num_heads)
        divides(self, num_heads=num_heads, dim=dim)
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


@SPATIAL.module
class WindowAttention(_DualAttention):
    """`window_attention` with projections.

    Args:
        dim, num_heads: M and H.
        window: w, in pixels; 7 in the released models.
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
        super().__init__(dim, num_heads, bias=bias)
        whole(self, window=window)
        self.window = window

    @checked(M="dim")
    def forward(self, x: Float[Tensor, "B M Y X"]) -> Float[Tensor, "B M Y X"]:
        Y, X = x.shape[2:]
        tall, wide = (max(1, min(self.window, size)) for size in (Y, X))
        padded = F.pad(x, (0, -X % wide, 0, -Y % tall))
        sizes, beyond = padded.shape[2:], None
        if count := self.window**2 - tall * wide:  # a window wider than the map: its zeros are not laid out
            _, k, v = self._heads(x.new_zeros(1, 1, self.dim))
            beyond = Beyond(k, v, count)
        q, k, v = (z.unflatten(2, sizes) for z in self._heads(to_tokens(padded)))
        out = window_attention(q, k, v, window=(tall, wide), beyond=beyond)[:, :, :Y, :X]
        return self._merged(out.flatten(2, 3), (Y, X))

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, window={self.window}"


@CHANNEL.module
class ChannelAttention(_DualAttention):
    """`channel_attention` with projections, on a map of any number of axes.

    Args:
        dim: M.
        num_heads: G, the number of groups.
        scale: as for `channel_attention`.
        bias: of queries, keys and values.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        scale: Literal["channels", "tokens"] = "channels",
        bias: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, bias=bias)
        choice(self, ("channels", "tokens"), scale=scale)
        self.scale = scale

    @checked(M="dim")
    def forward(self, x: Float[Tensor, "B M X *sizes"]) -> Float[Tensor, "B M X *sizes"]:
        q, k, v = self._heads(to_tokens(x))
        return self._merged(channel_attention(q, k, v, scale=self.scale), x.shape[2:])  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, scale={self.scale!r}"


def _moved(theirs: Any, ours: str = "qkv") -> list[Move]:
    return [*stacked(theirs, [f"{n}_proj" for n in ours], "qkv"), *same(theirs, {"o_proj": "proj"})]


@SPATIAL.loads("transformers", "Florence2VisionWindowAttention")
def _florence_window(theirs: Any) -> Loaded:
    bias = theirs.qkv.bias is not None
    return Loaded(
        lambda: WindowAttention(theirs.dim, theirs.num_heads, window=theirs.window_size, bias=bias), _moved(theirs)
    )


@SPATIAL.loads("timm.models.davit", "WindowAttention")
def _timm_window(theirs: Any) -> Loaded:
    bias, window = theirs.qkv.bias is not None, theirs.window_size
    if window[0] != window[1]:
        refuse(theirs, "window_size", "is no square", window, "both sides alike")
    return Loaded(lambda: WindowAttention(theirs.dim, theirs.num_heads, window=window[0], bias=bias), _moved(theirs))


@CHANNEL.loads("transformers", "Florence2VisionChannelAttention")
def _florence_channel(theirs: Any) -> Loaded:
    bias = theirs.qkv.bias is not None
    return Loaded(lambda: ChannelAttention(theirs.dim, theirs.groups, scale="tokens", bias=bias), _moved(theirs))


@CHANNEL.loads("timm.models.davit", "ChannelAttention")
def _timm_channel(theirs: Any) -> Loaded:
    """Its names of the three are the authors'."""
    return _timm_channels(theirs, "channels", "vqk")


@CHANNEL.loads("timm.models.davit", "ChannelAttentionV2")
def _timm_channel_v2(theirs: Any) -> Loaded:
    return _timm_channels(theirs, "tokens" if theirs.dynamic_scale else "channels", "qkv")


def _timm_channels(theirs: Any, scale: Literal["channels", "tokens"], ours: str) -> Loaded:
    dim, bias, groups = theirs.qkv.in_features, theirs.qkv.bias is not None, setting(theirs, "num_heads", "groups")
    return Loaded(lambda: ChannelAttention(dim, groups, scale=scale, bias=bias), _moved(theirs, ours))
