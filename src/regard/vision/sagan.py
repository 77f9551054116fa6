"""SAGAN's block: a place of a map takes cues from all others, by as much as gamma, first 0.

The block that was released is not the one that was printed: it pools keys and values, and projects once more.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, flag, refuse, whole
from regard.pipeline.function import attention
from regard.vision.maps import to_map, to_tokens
from regard.vision.spectral import SpectralLinear

CARD = Card(
    "sagan",
    equation="""y = x + gamma o,   o_i = W_o sum_j softmax_j(q_i . k_j) v_j  one head, no 1 / sqrt(D); gamma starts at 0
q = W_q x and k = W_k x have C / 8 channels
"pooled", as released:   k and v (C / 2 channels) are then max-pooled 2 x 2, so that j counts cells of four pixels
"full", as first printed:  v has C channels, W_o = 1;   "narrow", as last printed:  v has C / 8
each W is divided by its largest singular value, sigma = u^T W v, from one step of u = n(W v), v = n(W^T u) a pass""",
    papers=(
        Paper(
            "Self-Attention Generative Adversarial Networks",
            "Zhang, Goodfellow, Metaxas, Odena",
            2018,
            "1805.08318",
            "abstract; official code; accounts of its equations",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("B*Y*X*Y*X/4*(M/8 + M/2)", ""),
    claim="It starts as the identity, and later takes cues from all locations at once: "
    "tests/vision/test_sagan.py::test_starts_as_the_identity_and_learns_how_much, "
    "tests/vision/test_sagan.py::test_cues_come_from_all_locations.",
    differs=(
        "Power steps of the spectral norm are torch's: in eval what training left is used. The released code and "
        "BigGAN's, which start each from u alone, agree once u has settled; BigGAN's takes a step in eval too.",
        "u and v stay in at least float32 when the module becomes narrower.",
        "Sides that are odd lose their last row or column in pooling; the codes take N / 4 cells for granted.",
    ),
    verified="third-party",
    example={"qk_ratio": 4},
    defaults={
        "form": "code",
        "qk_ratio": "paper, by accounts of it",
        "spectral": "code",
    },
)

Form = Literal["pooled", "full", "narrow"]


@checked()
def unscaled_attention(
    queries: Float[Tensor, "B D *sizes"],
    keys: Float[Tensor, "B D *cells"],
    values: Float[Tensor, "B V *cells"],
) -> Float[Tensor, "B V *sizes"]:
    """softmax_j(q_i . k_j) v_j from the places j of one map to the places i of another, as one head."""
    q, k, v = (to_tokens(z)[:, None] for z in (queries, keys, values))
    return to_map(attention(q, k, v, scale=1.0)[:, 0], queries.shape[2:])


@CARD.module
class SAGANAttention(nn.Module):
    """The block on feature maps, in the "full" and "narrow" forms of any number of axes.

    Args:
        dim: C.
        form: whether keys and values are pooled, or how wide the values of unpooled ones are.
        qk_ratio: C over the width of queries and keys, and of the values of "narrow".
        spectral: whether weights are divided by their largest singular value.
    """

    def __init__(self, dim: int, *, form: Form = "pooled", qk_ratio: int = 8, spectral: bool = True) -> None:
        super().__init__()
        whole(self, dim=dim)
        whole(self, most=dim, qk_ratio=qk_ratio)
        choice(self, get_args(Form), form=form)
        flag(self, spectral=spectral)
        if form == "pooled":
            whole(self, 2, dim=dim)
        D = dim // qk_ratio
        V = {"pooled": dim // 2, "full": dim, "narrow": D}[form]
        self.dim, self.form, self.qk_ratio, self.spectral = dim, form, qk_ratio, spectral

        def project(inputs: int, outputs: int) -> nn.Linear:
            return SpectralLinear(inputs, outputs) if spectral else nn.Linear(inputs, outputs, bias=False)

        self.q_proj, self.k_proj, self.v_proj = project(dim, D), project(dim, D), project(dim, V)
        self.o_proj = None if form == "full" else project(V, dim)
        self.gamma = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.gamma)
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            if linear is not None and not self.spectral:
                nn.init.xavier_uniform_(linear.weight)

    @checked(C="dim")
    def forward(self, x: Float[Tensor, "B C X *sizes"]) -> Float[Tensor, "B C X *sizes"]:
        tokens, sizes = to_tokens(x), x.shape[2:]
        q, k, v = (to_map(f(tokens), sizes) for f in (self.q_proj, self.k_proj, self.v_proj))
        if self.form == "pooled":
            if len(sizes) != 2 or min(sizes) == 1:
                refuse(self, "x", "has no cells of 2 x 2", tuple(x.shape), "(B, C, Y, X) with both sides 2 or more")
            k, v = (_pooled(z) for z in (k, v))
        out = unscaled_attention(q, k, v)
        if self.o_proj is not None:
            out = to_map(self.o_proj(to_tokens(out)), sizes)
        return x + self.gamma * out

    def extra_repr(self) -> str:
        return f"{self.dim}, form={self.form!r}, qk_ratio={self.qk_ratio}, spectral={self.spectral}"


def _pooled(z: Float[Tensor, "B D Y X"]) -> Float[Tensor, "B D y x"]:
    """The maximum of each 2 x 2 cell."""
    return F.max_pool2d(z, 2) if z.numel() else z.new_empty(*z.shape[:2], z.shape[2] // 2, z.shape[3] // 2)
