"""EDAFormer's embedding-free attention: tokens are queries, and one pooled map is keys and values.

Keys may be pooled more at inference than in training, with the same weights.
"""

import math
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, divides, flag, number, refuse, whole
from regard.pipeline.function import attention
from regard.vision.maps import to_map, to_tokens

CARD = Card(
    "embedding_free",
    equation="""y_i = W_o concat_h(softmax_j(x_i . k_j / sqrt(D)) k_j)      head h has its D channels of x and of k
k = W mean_r(x) + b      mean_r: of r x r pixels, what is left over at the right and below dropped;  k = v
pooled_norm: k = GELU(LN(W mean_r(x) + b));      at inference r is pool * reduction""",
    papers=(
        Paper(
            "Embedding-Free Transformer with Inference Spatial Reduction for Efficient Semantic Segmentation",
            "Yu, Cho, Kang, Moon, Kong, Kang",
            2024,
            "2407.17261",
            "abstract; official code",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("2*B*Y*X*(Y//pool)*(X//pool)*M + B*(Y//pool)*(X//pool)*M*M", ""),
    claim="Trained keys can be averaged over larger cells, with the same weights, where features are smooth: "
    "tests/vision/test_embedding_free.py::test_pooling_more_at_inference_changes_little_where_maps_are_smooth.",
    differs=(
        "Free of embeddings are the queries alone: as the authors' code has it, keys and values come from one "
        "pointwise map; pooled_conv=False is without.",
        "`reduction` counts in eval mode alone.",
        "With pooled_norm, but without pooled_conv, norm and GELU act on the pooled map, which no code has.",
        "Left out: dropout of the weights.",
    ),
    verified="third-party",
    example={"pool": 2},
    tries={"pool": 3},
    defaults={
        "pool": "code, the last stage of encoder and decoder",
        "pooled_conv": "code",
        "pooled_norm": "code, the encoder",
    },
)


def embedding_free_attention(
    x: Float[Tensor, "B M Y X"], pooled: Float[Tensor, "B S M"], num_heads: int
) -> Float[Tensor, "B M Y X"]:
    """Attention from the pixels themselves to tokens that are both keys and values."""
    q, k = (z.unflatten(-1, (num_heads, -1)).transpose(1, 2) for z in (to_tokens(x).to(pooled.dtype), pooled))
    return to_map(attention(q, k, k).transpose(1, 2).flatten(2), x.shape[2:])


@CARD.module
class EmbeddingFreeAttention(nn.Module):
    """`embedding_free_attention` with what keys and values go through. The map is normed before, by the block.

    Args:
        dim, num_heads: M and H.
        pool: r, sides of the cells whose means are keys.
        pooled_conv: whether the means go through a pointwise map.
        pooled_norm: whether they are normed and go through a GELU then, as in the decoder.

    Raises:
        ValueError: maps that are smaller than a cell.
    """

    def __init__(
        self, dim: int, num_heads: int, *, pool: int = 1, pooled_conv: bool = True, pooled_norm: bool = False
    ) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads, pool=pool)
        divides(self, num_heads=num_heads, dim=dim)
        flag(self, pooled_conv=pooled_conv, pooled_norm=pooled_norm)
        self.dim, self.num_heads, self.pool, self._reduction = dim, num_heads, pool, 1
        self.kv_proj = nn.Linear(dim, dim) if pooled_conv else None
        self.norm = nn.LayerNorm(dim) if pooled_norm else None
        self.o_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The pointwise convolution normal with variance 2 / M, the output truncated normal of 0.02, no bias."""
        if self.kv_proj is not None:
            nn.init.normal_(self.kv_proj.weight, std=math.sqrt(2 / self.dim))
            nn.init.zeros_(self.kv_proj.bias)
        if self.norm is not None:
            self.norm.reset_parameters()
        nn.init.trunc_normal_(self.o_proj.weight, std=0.02)
        nn.init.zeros_(self.o_proj.bias)

    @property
    def reduction(self) -> int:
        """How much larger the cells' sides are in eval mode: inference spatial reduction. No weight depends on it."""
        return self._reduction

    @reduction.setter
    def reduction(self, value: int) -> None:
        whole(self, reduction=value)
        self._reduction = value

    def pooled(self, x: Float[Tensor, "B M Y X"]) -> Float[Tensor, "B S M"]:
        """Keys, which are the values too."""
        side = self.pool if self.training else self.pool * self.reduction
        if min(x.shape[2:]) < side:
            refuse(self, "x", "is smaller than a cell", tuple(x.shape), f"sides of at least {side}")
        k = to_tokens(F.avg_pool2d(x, side))
        k = k if self.kv_proj is None else self.kv_proj(k)
        return k if self.norm is None else F.gelu(self.norm(k))

    @checked(M="dim")
    def forward(self, x: Float[Tensor, "B M Y X"]) -> Float[Tensor, "B M Y X"]:
        out = embedding_free_attention(x, self.pooled(x), self.num_heads)
        return to_map(self.o_proj(to_tokens(out)), x.shape[2:])

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, pool={self.pool}, reduction={self.reduction}"


class EmbeddingFreeBlock(nn.Module):
    """x + attention(LN x), then x + MLP(LN x), with a depthwise convolution within the MLP.

    Args:
        dim, num_heads, pool: as of the attention.
        mlp_ratio: the MLP's width over M.
        form: "encoder" has a ReLU before that convolution, "decoder" a norm and a GELU on the keys.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        pool: int = 1,
        mlp_ratio: float = 4.0,
        form: Literal["encoder", "decoder"] = "encoder",
    ) -> None:
        super().__init__()
        number(self, above=0, mlp_ratio=mlp_ratio)
        choice(self, ("encoder", "decoder"), form=form)
        hidden, eps = int(dim * mlp_ratio), 1e-6 if form == "encoder" else 1e-5
        self.dim, self.form = dim, form
        self.attention = EmbeddingFreeAttention(dim, num_heads, pool=pool, pooled_norm=form == "decoder")
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.depth = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for linear in (self.up, self.down):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        _start(self.depth)

    @checked(M="dim")
    def forward(self, x: Float[Tensor, "B M Y X"]) -> Float[Tensor, "B M Y X"]:
        sizes = x.shape[2:]
        x = x + self.attention(to_map(self.norm1(to_tokens(x)), sizes))
        h = self.up(self.norm2(to_tokens(x)))
        h = self.depth(to_map(F.relu(h) if self.form == "encoder" else h, sizes))
        return x + to_map(self.down(F.gelu(to_tokens(h))), sizes)


class EmbeddingFreeStage(nn.Module):
    """A stage of the encoder: overlapping patches, blocks and a norm, (B, C, Y, X) -> (B, M, Y / stride, X / stride).

    Args:
        channels: C.
        dim, num_heads, pool, mlp_ratio: as of the blocks.
        depth: how many blocks.
        patch, stride: sides of the patches, and how far they lie apart: 7 and 4 in the first stage, 3 and 2 after it.
    """

    def __init__(
        self,
        channels: int,
        dim: int,
        num_heads: int,
        *,
        depth: int = 2,
        patch: int = 3,
        stride: int = 2,
        pool: int = 1,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        whole(self, channels=channels, depth=depth, patch=patch, stride=stride)
        self.channels = channels
        self.embed = nn.Conv2d(channels, dim, patch, stride=stride, padding=patch // 2)
        self.embed_norm, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim, eps=1e-6)
        blocks = (EmbeddingFreeBlock(dim, num_heads, pool=pool, mlp_ratio=mlp_ratio) for _ in range(depth))
        self.blocks = nn.Sequential(*blocks)
        _start(self.embed)

    @checked(C="channels")
    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B M y x"]:
        z = self.embed(x)
        z = self.blocks(to_map(self.embed_norm(to_tokens(z)), z.shape[2:]))
        return to_map(self.norm(to_tokens(z)), z.shape[2:])


def _start(conv: nn.Conv2d) -> None:
    """Normal with variance 2 / fan out, no bias."""
    fan_out = conv.kernel_size[0] * conv.kernel_size[1] * conv.out_channels // conv.groups
    nn.init.normal_(conv.weight, std=math.sqrt(2 / fan_out))
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
