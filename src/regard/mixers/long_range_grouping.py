"""Long-range grouping attention: tokens of all views attend where their places agree modulo s.

Each group samples every view at steps of s, so that views meet at a cost s^2 times lower than if all tokens did, and
there is no order among views. Layers of it take turns with plain attention within each view.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, divides, flag, number, refuse, whole
from regard.kernels.check import check_inputs
from regard.masks import Mask, blocks, padding, predicate
from regard.pipeline.function import attention
from regard.pipeline.head_mixer import HeadMixer
from regard.tracing import exporting

CARD = Card(
    "long_range_grouping",
    equation="""group (a, c): the tokens of all views with y mod s = a and x mod s = c
o = softmax(q k^T / sqrt(D)) v within each group and head;   y = (concat_h(o) + e) W_o + b_o
e = conv_3x3(v), depthwise, of each view's map by itself (the inter-view feature signature)""",
    papers=(
        Paper(
            "Long-Range Grouping Transformer for Multi-View 3D Reconstruction",
            "Yang, Zhu, Lin, Nong, Liang",
            2023,
            "ICCV 2023",
            "abstract; official code",
        ),
    ),
    supports={"bidirectional", "padding", "packed", "dropout", "compile"},
    cost=Cost("2*B*T*T*M/stride**2 + 9*B*T*M", ""),
    claim="A token reaches its like in all views, and through the signature its neighbours in its own; what only one "
    "view shows is read in another: "
    "tests/mixers/test_long_range_grouping.py::test_a_token_reaches_its_residues_and_its_neighbours, "
    "tests/mixers/test_long_range_grouping.py::test_learns_what_another_view_shows.",
    differs=(
        "Any map whose sides s divides; the code has 14 x 14 written into it.",
        "Tokens may be hidden, and so is what the last view lacks where there are fewer tokens than whole views have: "
        "they are no keys, and zeros for the signature.",
        "Places on the map count from the first token of a row, padding among them: pad on the right.",
        "bias=False leaves out the output's bias, too, and nothing is dropped from the output.",
        'A layer of views="apart" has no signature; the code keeps the convolution there, unused.',
        "The merger of similar tokens and the decoder to voxels are left out.",
    ),
    verified="third-party",
    example={"size": (4, 2), "stride": 2},
    tries={"stride": 1, "size": (2, 4)},
    exceptions={
        "L50 exported_with_a_free_length": "torch.export asks how strides compare that follow the number of tokens "
        "of a group, and can't tell by itself",
    },
    defaults={
        "size": "code",
        "stride": "code",
        "signature": "code",
        "views": "code, layers 5, 7, 9 and 11 of 12",
        "bias": "code, the encoder",
    },
)

Views = Literal["joined", "apart"]


def grouping_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T V"],
    *,
    size: tuple[int, int],
    stride: int,
    keep: Bool[Tensor, "B T"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H T V"]:
    """Attention in groups of like places modulo `stride`, over T / (Y X) views one behind the other.

    Args:
        size: Y and X of a view, whose tokens stand row by row.
        stride: s, which divides both.
        keep: True at real keys.
        dropout: probability with which weights are dropped.
    """
    check_inputs(q, k, v)
    (B, H, T, _), (Y, X), s, who = q.shape, size, stride, "grouping_attention"
    whole(who, Y=Y, X=X, stride=s)
    divides(who, stride=s, Y=Y)
    divides(who, stride=s, X=X)
    divides(who, view=Y * X, T=T)
    if k.shape[2] != T or k.shape[1] != H:
        refuse(who, "k", "has other heads or tokens than q", tuple(k.shape), f"{H} heads and {T} tokens")

    place = torch.arange(T, device=q.device) % (Y * X)
    order = (place // X % s * s + place % X % s).argsort(stable=True)  # by groups

    def groups(z: Tensor) -> Float[Tensor, "groups h n d"]:
        found = z.transpose(1, 2).index_select(1, order)
        return found.view(B * s * s, T // (s * s), *found.shape[2:]).transpose(1, 2)

    mask = None if keep is None else padding(keep.index_select(1, order).reshape(B * s * s, T // (s * s)))
    out = attention(groups(q), groups(k), groups(v), mask=mask, dropout=dropout)
    out = out.transpose(1, 2).contiguous().view(B, T, H, v.shape[3])
    return out.index_select(1, order.argsort()).transpose(1, 2)


@CARD.module
class LongRangeGroupingAttention(HeadMixer):
    """Mixes the tokens of several views, (B, U Y X, M) -> the same, for any number U of views.

    Args:
        dim, num_heads, bias: as of `HeadMixer`; H divides M.
        size: Y and X of each view, whose tokens stand row by row, one view behind the other.
        stride: s, which divides both.
        signature: whether the convolution of values is added.
        views: "joined" by the groups, or "apart" for plain attention within each view, without a signature.
        dropout: of weights, in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        size: tuple[int, int] = (14, 14),
        stride: int = 7,
        signature: bool = True,
        views: Views = "joined",
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(dim, num_heads, bias=bias)
        divides(self, num_heads=num_heads, dim=dim)
        if not isinstance(size, tuple | list) or len(size) != 2:
            refuse(self, "size", "is no pair", size, "(height, width)")
        whole(self, stride=stride)
        for side in size:
            whole(self, size=side)
            divides(self, stride=stride, size=side)
        choice(self, ("joined", "apart"), views=views)
        flag(self, signature=signature)
        number(self, least=0, most=1, dropout=dropout)
        self.size, self.stride, self.views, self.dropout = (size[0], size[1]), stride, views, dropout
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim) if signature and views == "joined" else None

    def receptive_field(self) -> Mask:
        """Which tokens may reach which: of like places in all views, and neighbours in their own."""
        (Y, X), s = self.size, self.stride
        N = Y * X
        if self.views == "apart":
            return blocks(N)

        def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            down, right = i % N // X - j % N // X, i % X - j % X
            like = (down % s == 0) & (right % s == 0)
            if self.conv is None:
                return like
            return like | ((i // N == j // N) & (down.abs() <= 1) & (right.abs() <= 1))

        return predicate(sees)

    def mix(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B H T D"],
        v: Float[Tensor, "B H T D"],
        keep: Bool[Tensor, "B T"] | None,
    ) -> Float[Tensor, "B H T D"]:
        T, (Y, X) = q.shape[2], self.size
        views = (T + Y * X - 1) // (Y * X) + int(exporting())  # one more, for torch would ask whether there is but one
        if exporting() or views * Y * X != T:
            keep = q.new_ones(len(q), T, dtype=torch.bool) if keep is None else keep
            at = torch.arange(views * Y * X, device=q.device).clamp(max=T)
            keep = F.pad(keep, (0, 1)).index_select(1, at)
            q, k, v = (F.pad(z, (0, 0, 0, 1)).index_select(2, at) for z in (q, k, v))
        if keep is not None:
            v = v.masked_fill(~keep[:, None, :, None], 0)
        apart = self.views == "apart"
        given = [z.unflatten(2, (-1, Y * X)).transpose(1, 2).flatten(0, 1) if apart else z for z in (q, k, v)]
        real = keep.reshape(-1, Y * X) if apart and keep is not None else keep
        stride, dropout = 1 if apart else self.stride, self.dropout if self.training else 0.0
        out = grouping_attention(*given, size=self.size, stride=stride, keep=real, dropout=dropout)
        if apart:
            out = out.unflatten(0, (len(q), -1)).transpose(1, 2).flatten(2, 3)
        if self.conv is not None:
            maps = v.unflatten(2, (-1, Y, X)).permute(0, 2, 1, 5, 3, 4)  # (B, U, H, D, Y, X)
            e = self.conv(maps.flatten(2, 3).flatten(0, 1)).view(maps.shape)
            out = out + e.permute(0, 2, 1, 4, 5, 3).flatten(2, 4)
        return out if out.shape[2] == T else out.index_select(2, torch.arange(T, device=q.device))

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, size={self.size}, stride={self.stride}, views={self.views!r}"
