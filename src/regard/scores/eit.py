"""EIT: every query head meets every key head, and small networks on each pair make H scores of H x H.

All scores of a pair, not a head's own alone, go through convolutions: first those of one query head (inner subspace),
then what came of all query heads (cross subspace). Of each pair alone with kernels of one entry; larger ones read
earlier queries and keys, masked entries as 0, so that nothing later is seen.
"""

from typing import Literal, cast, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import choice, refuse, whole
from regard.scores._pairs import in_pieces
from regard.stages import Rows, Score

CARD = Card(
    "eit",
    equation="""S_ij = q_i k_j^T / sqrt(D)   for every query head i and key head j
I_i = conv(relu(conv(S_i1 .. S_iH)))          inner: of each i alone, `inner` maps between
scores_h = conv(relu(conv(I_1 .. I_H)))_h     cross: `cross` H maps between;   o_h = softmax(scores_h) v_h
form = "efficient":   scores_h = conv(all relu(conv(S_i1 .. S_iH)))_h""",
    papers=(
        Paper(
            "EIT: Enhanced Interactive Transformer",
            "Zheng, Li, Bao, Xiao, Zhu",
            2022,
            "2212.10197",
            "abstracts of two versions; beginning of the introduction; a reimplementation by somebody else",
        ),
    ),
    traits=PLAIN - {"head_independent"},
    cost=Cost(
        "B*H*T*S*((G + 1)*D + kernel_size*kernel_size*(inner*(H + 1) + 2*cross*H))",
        "2*S*G*D",
    ),
    claim="What one head asks is found in the keys of another, which a head's own scores can't tell: "
    "tests/scores/test_eit.py::test_a_query_head_finds_what_another_heads_keys_hold.",
    differs=(
        "The authors' repository holds no code. Layers, widths and kernels of one entry follow a reimplementation by "
        "somebody else, whose cross convolutions are grouped, so that nothing crosses, and which has no softmax and "
        "divides by sqrt(M): taken for slips.",
        "Inferred: with larger kernels masked entries are 0 before each convolution, queries and keys before a pair "
        "are read and none behind it, and streams keep queries too.",
        "The last convolution has no bias, which softmax takes away again.",
        "Positions given as a bias are added to the H scores that come out; rotation acts before.",
        "Fewer key heads than query heads count as if each stood once for every query head of its group.",
    ),
    verified="reconstructed",
    example={"inner": 3, "cross": 2},
    tries={"kernel_size": 2},
    defaults={
        "inner": "code, a reimplementation's",
        "cross": "code, a reimplementation's",
        "kernel_size": "code, a reimplementation's",
        "form": "paper",
    },
)

Form = Literal["full", "efficient"]


def many_to_many_scores(
    q: Float[Tensor, "B H t D"], k: Float[Tensor, "B G s D"], scale: float
) -> Float[Tensor, "B HH t s"]:
    """Scaled products of all query heads with all key heads, in at least fp32; channel i H + j is of heads i and j."""
    (B, H, t, D), (G, s) = q.shape, k.shape[1:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    maps = (q.to(wide).reshape(B, 1, H * t, D) @ k.to(wide).mT) * scale
    return maps.view(B, G, H, t, s).transpose(1, 2).repeat_interleave(H // G, 2).flatten(1, 2)


def convolved(
    z: Float[Tensor, "B C t s"], layer: nn.Conv2d, allowed: Bool[Tensor, "#B 1 t s"] | None
) -> Float[Tensor, "B C2 t s"]:
    """The layer's convolution, whose kernel ends at the pair itself; what no head may look at counts as 0."""
    if allowed is not None:
        z = z.masked_fill(~allowed, 0)
    rows, keys = layer.kernel_size
    if rows > 1 or keys > 1:
        z = F.pad(z, (keys - 1, 0, rows - 1, 0))
    bias = None if layer.bias is None else layer.bias.to(z.dtype)
    return F.conv2d(z, layer.weight.to(z.dtype), bias, groups=layer.groups)


@CARD.fills("score")
class ManyToManyScore(Score):
    """Scores that small convolutional networks make of every query head with every key head.

    Args:
        inner: maps of each query head between the two convolutions of the inner subspace; somebody else's efficient
            form has 2.
        cross: maps between those of the cross subspace, for each head; the efficient form has none.
        kernel_size: how many queries and keys a kernel spans: the pair's own and those before.
        form: "full", or "efficient": one convolution of each subspace, and one ReLU.
    """

    def __init__(
        self, num_heads: int, *, inner: int = 8, cross: int = 4, kernel_size: int = 1, form: Form = "full"
    ) -> None:
        super().__init__()
        whole(self, num_heads=num_heads, inner=inner, cross=cross, kernel_size=kernel_size)
        choice(self, get_args(Form), form=form)
        H = num_heads
        self.num_heads, self.inner, self.cross, self.kernel_size, self.form = H, inner, cross, kernel_size, form
        self.inner_in = nn.Conv2d(H * H, H * inner, kernel_size, groups=H)
        if form == "full":
            self.inner_out = nn.Conv2d(H * inner, H, kernel_size, groups=H)
            self.cross_in = nn.Conv2d(H, H * cross, kernel_size)
            self.cross_out = nn.Conv2d(H * cross, H, kernel_size, bias=False)
        else:
            self.cross_out = nn.Conv2d(H * inner, H, kernel_size, bias=False)
        self.halo = len(list(self.children())) * (kernel_size - 1)
        self.sees = "tile" if kernel_size == 1 else "rows"

    def reset_parameters(self) -> None:
        """As torch's convolutions."""
        for layer in self.children():
            cast(nn.Conv2d, layer).reset_parameters()

    @torch.no_grad()
    def start_neutral(self) -> bool:
        """Scores come out as a head's own, each as its positive less its negative part; other maps stay as they are,
        and are not read yet."""
        full, H = self.form == "full", self.num_heads
        if self.inner < 2 or (full and self.cross < 2):
            return False

        def split(layer: nn.Conv2d, own: Tensor) -> None:
            """Of head h, maps 0 and 1 become the positive and the negative part of its input `own[h]`."""
            h, maps = torch.arange(H), layer.out_channels // H
            for at, sign in ((0, 1.0), (1, -1.0)):
                layer.weight[h * maps + at] = 0
                layer.weight[h * maps + at, own, -1, -1] = sign
                if layer.bias is not None:
                    layer.bias[h * maps + at] = 0

        def join(layer: nn.Conv2d, maps: int) -> None:
            h = torch.arange(H)
            first = h * maps if layer.groups == 1 else 0 * h
            layer.weight.zero_()
            layer.weight[h, first, -1, -1] = 1
            layer.weight[h, first + 1, -1, -1] = -1
            if layer.bias is not None:
                layer.bias.zero_()

        split(self.inner_in, torch.arange(H))
        if full:
            join(self.inner_out, self.inner)
            split(self.cross_in, torch.arange(H))
        join(self.cross_out, self.cross if full else self.inner)
        return True

    def interact(
        self, maps: Float[Tensor, "B HH t s"], allowed: Bool[Tensor, "#B 1 t s"] | None = None
    ) -> Float[Tensor, "B H t s"]:
        """H x H scores of each pair to H."""
        z = convolved(maps, self.inner_in, allowed).relu()
        if self.form == "full":
            z = convolved(z, self.inner_out, allowed)
            z = convolved(z, self.cross_in, allowed).relu()
        return convolved(z, self.cross_out, allowed)

    def forward(self, rows: Rows, scale: float) -> Float[Tensor, "B H t s"]:
        q, k, H = rows.q, rows.k, self.num_heads
        if q.shape[1] != H:
            refuse(self, "q", "has another number of heads than the convolutions", q.shape[1], f"{H} heads")
        allowed = None if rows.allowed is None else rows.allowed.any(1, keepdim=True)

        def run(at: Tensor) -> Tensor:
            some, seen = q, allowed
            if at.shape[2] < q.shape[2]:
                some = q.index_select(2, at.flatten())
                seen = allowed if allowed is None else allowed.index_select(2, at.flatten())
            return self.interact(many_to_many_scores(some, k, scale), seen)

        where = torch.arange(q.shape[2], device=q.device).view(1, 1, -1, 1)
        numbers = len(q) * H * (H + 2 * self.inner) * k.shape[2]
        return in_pieces(run, where, numbers, rows=q.shape[2] if self.halo else None)

    def extra_repr(self) -> str:
        return f"{self.num_heads}, inner={self.inner}, cross={self.cross}, form={self.form!r}"
