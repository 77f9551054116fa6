"""EIT: every query head meets every key head, and their maps interact before the softmax."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import whole
from regard.stages import Rows, Score

CARD = Card(
    "eit",
    equation="""S_ij = q_i k_j^T / sqrt(D)   for every query head i and every key head j
within a query head:   I_i = U2_i relu(U1_i [S_i1 .. S_iG] + b) + b
across query heads:    scores_h = (W2 relu(W1 [I_1 .. I_H] + b) + b)_h
all of one pair of tokens (kernel size 1); then mask, softmax and values as usual""",
    papers=(
        Paper(
            "EIT: Enhanced Interactive Transformer",
            "Zheng, Li, Bao, Xiao, Zhu",
            2022,
            "2212.10197",
            "abstracts of two versions and the paper's beginning; the authors' repository holds no code",
        ),
    ),
    traits={"normalised", "nonnegative", "linear_in_values", "position_free", "shift_invariant"},
    cost=Cost(
        "B*H*T*S*D*(G + 1) + B*H*T*S*(G*hidden_inner + hidden_inner*channels + channels*hidden_cross + hidden_cross)",
        "2*S*G*D",
    ),
    claim="A query head finds what only another head's keys tell: "
    "tests/scores/test_eit.py::test_query_features_of_one_head_match_key_features_of_another.",
    differs=(
        "That there are two layers with a ReLU between in both interactions is recalled, not read; that they have "
        "biases, and no residual, is chosen.",
        "Kernels of size 1 alone: larger ones would let masked and later tokens in, and how the paper keeps them out "
        "is not known. Nor is the cheaper E-EIT.",
        "A position's bias is added after the interaction.",
    ),
    verified="reconstructed",
    example={"hidden_inner": 3, "hidden_cross": 5, "channels": 2},
    defaults={
        "hidden_inner": "ours, as many as can hold all maps and their negatives",
        "hidden_cross": "ours, likewise",
        "channels": "ours, the smallest form",
    },
)


def many_to_many_scores(q: Float[Tensor, "B H t D"], k: Float[Tensor, "B G s D"]) -> Float[Tensor, "B H G t s"]:
    """Every query head against every key head, in at least fp32."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return torch.einsum("bhtd,bgsd->bhgts", q.to(wide), k.to(wide))


class InnerSubspace(nn.Module):
    """What the G maps of one query head make of each other: weights of its own for each of the H heads."""

    def __init__(self, num_heads: int, num_maps: int, hidden: int, channels: int = 1) -> None:
        super().__init__()
        whole(self, num_heads=num_heads, num_maps=num_maps, hidden=hidden, channels=channels)
        self.up = nn.Parameter(torch.empty(num_heads, hidden, num_maps))
        self.up_bias = nn.Parameter(torch.empty(num_heads, hidden))
        self.down = nn.Parameter(torch.empty(num_heads, channels, hidden))
        self.down_bias = nn.Parameter(torch.empty(num_heads, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As convolutions start."""
        _start(self.up, self.up_bias)
        _start(self.down, self.down_bias)

    def forward(self, z: Float[Tensor, "B H G t s"]) -> Float[Tensor, "B H c t s"]:
        up, up_bias, down, down_bias = (p.to(z.dtype) for p in (self.up, self.up_bias, self.down, self.down_bias))
        hidden = torch.relu(torch.einsum("hng,bhgts->bhnts", up, z) + up_bias[..., None, None])
        return torch.einsum("hcn,bhnts->bhcts", down, hidden) + down_bias[..., None, None]


class CrossSubspace(nn.Module):
    """What the maps of all query heads make of each other, down to one map a head."""

    def __init__(self, num_heads: int, num_maps: int, hidden: int) -> None:
        super().__init__()
        whole(self, num_heads=num_heads, num_maps=num_maps, hidden=hidden)
        self.up = nn.Parameter(torch.empty(hidden, num_maps))
        self.up_bias = nn.Parameter(torch.empty(hidden))
        self.down = nn.Parameter(torch.empty(num_heads, hidden))
        self.down_bias = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As convolutions start."""
        _start(self.up, self.up_bias)
        _start(self.down, self.down_bias)

    def forward(self, z: Float[Tensor, "B m t s"]) -> Float[Tensor, "B H t s"]:
        up, up_bias, down, down_bias = (p.to(z.dtype) for p in (self.up, self.up_bias, self.down, self.down_bias))
        hidden = torch.relu(torch.einsum("nm,bmts->bnts", up, z) + up_bias[:, None, None])
        return torch.einsum("hn,bnts->bhts", down, hidden) + down_bias[:, None, None]


def _start(weight: Tensor, bias: Tensor) -> None:
    bound = 1 / math.sqrt(weight.shape[-1])
    nn.init.uniform_(weight, -bound, bound)
    nn.init.uniform_(bias, -bound, bound)


@CARD.fills("score")
class EnhancedScores(Score):
    """H G maps of scores, brought down to H by two interactions. Their weights don't depend on the model's width.

    Args:
        num_heads, num_kv_heads: H and G.
        hidden_inner: width within a query head; default 2 G.
        hidden_cross: width across heads; default 2 H channels.
        channels: maps that a query head hands on to the others.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        hidden_inner: int | None = None,
        hidden_cross: int | None = None,
        channels: int = 1,
    ) -> None:
        super().__init__()
        G = num_heads if num_kv_heads is None else num_kv_heads
        whole(self, num_heads=num_heads, num_kv_heads=G, channels=channels)
        inner, cross = (
            2 * n if given is None else given for given, n in ((hidden_inner, G), (hidden_cross, channels * num_heads))
        )
        whole(self, hidden_inner=inner, hidden_cross=cross)
        self.num_heads, self.num_kv_heads = num_heads, G
        self.inner = InnerSubspace(num_heads, G, inner, channels)
        self.cross = CrossSubspace(num_heads, channels * num_heads, cross)

    def forward(self, rows: Rows, scale: float) -> Float[Tensor, "B H t s"]:
        z = many_to_many_scores(rows.q * scale, rows.k)
        if rows.allowed is not None:  # what nobody may see must not reach the weights' gradient, not even as 0 * NaN
            z = z.masked_fill(~rows.allowed.any(1)[:, None, None], 0)
        return self.cross(self.inner(z).flatten(1, 2))

    @torch.no_grad()
    def start_neutral(self) -> bool:
        """Scores of a query head and its own key head, z = relu(z) - relu(-z); False where a width is too small."""
        H, R = self.num_heads, self.num_heads // self.num_kv_heads
        c = self.inner.down.shape[1]
        if self.inner.up.shape[1] < 2 or self.cross.up.shape[0] < 2 * H:
            return False
        for p in self.parameters():
            p.zero_()
        for h in range(H):
            for n, sign in enumerate((1.0, -1.0)):
                self.inner.up[h, n, h // R] = self.inner.down[h, 0, n] = sign
                self.cross.up[2 * h + n, c * h] = self.cross.down[h, 2 * h + n] = sign
        return True
