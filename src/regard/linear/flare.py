"""FLARE: a few learned latents gather from all tokens, and give back to them by the same scores."""

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import fits, flag, number, whole
from regard.linear._shared import hide
from regard.masks import padding
from regard.pipeline.function import attention
from regard.pipeline.head_mixer import HeadMixer

CARD = Card(
    "flare",
    equation="""z = softmax_S(s q k^T) v        the L latents q (H, L, D) gather,   s = 1
o = softmax_L(s k q^T) z        and give out by the same scores
k = MLP_k(x),   v = MLP_v(x):   a = x + gelu(W1 x);   n times a = a + gelu(Wi a);   a + W2 a""",
    papers=(
        Paper(
            "FLARE: Fast Low-rank Attention Routing Engine",
            "Puri et al.",
            2025,
            "2508.12594",
            "abstract; the authors' code",
        ),
    ),
    supports={"bidirectional", "padding", "packed", "dropout", "compile"},
    lacks={"causal": "latents gather from everywhere"},
    traits=PLAIN,
    cost=Cost("4*B*T*num_latents*M", ""),
    claim="Weights are a row-stochastic matrix of rank <= L, and with one latent all tokens get the same: "
    "tests/linear/test_flare.py::test_weights_are_stochastic_and_of_the_rank_of_the_latents, "
    "tests/linear/test_flare.py::test_one_latent_gives_all_the_same.",
    differs=(
        "The scale also counts where the authors' slow path, which returns scores, leaves it out.",
        "Latents are kept as (H, L, D); the code has them as (M, L) and reads that memory as (H, L, D).",
        "Dropout is of both maps of weights, as in their form for long sequences; that of the output, and the rotation "
        "of keys there, are left to the model around it.",
        "The blocks and the model around the mixer, and MLPs with silu or RMSNorm, are left out.",
    ),
    verified="third-party",
    example={"num_latents": 5, "key_layers": 1},
    defaults={
        "num_latents": "code",
        "scale": "code",
        "key_layers": "code",
        "value_layers": "code",
        "key_ratio": "code",
        "value_ratio": "code",
        "qk_norm": "code",
    },
)


def flare_attention(
    latents: Float[Tensor, "#B H L D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T V"],
    *,
    scale: float = 1.0,
    keep: Bool[Tensor, "B T"] | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "B H T V"]:
    """What the latents gather from the keys, given out to these by the same scores.

    Args:
        latents: (H, L, D), or a set for each sequence.
        scale: of the scores.
        keep: True at real tokens; others are not gathered from, and get 0.
        dropout: of the weights of both.

    Raises:
        ValueError: shapes that don't fit together.
    """
    latents = latents if latents.dim() == 4 else latents[None]
    fits("flare_attention", "#B H L D", {"B": len(k), "H": k.shape[1], "D": k.shape[-1]}, latents=latents)
    latents = latents.expand(len(k), -1, -1, -1)
    gathered = attention(latents, k, v, scale=scale, mask=None if keep is None else padding(keep), dropout=dropout)
    return hide(attention(k, latents, gathered, scale=scale, dropout=dropout), keep)


class ResidualMLP(nn.Module):
    """M to hidden to M, with `layers` more in between, each a residual; of -1 layers: x + W x.

    The first and the last have a residual where hidden is M.
    """

    def __init__(self, dim: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.even = layers == -1 or hidden == dim
        widths = [dim, dim] if layers == -1 else [dim, *[hidden] * (layers + 1), dim]
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    def forward(self, x: Float[Tensor, "*b M"]) -> Float[Tensor, "*b M"]:
        last = len(self.linears) - 1
        for place, linear in enumerate(self.linears):
            z = linear(x) if place == last else F.gelu(linear(x), approximate="tanh")
            x = x + z if self.even or 0 < place < last else z
        return x


@CARD.module
class FLARE(HeadMixer):
    """Bidirectional self-attention through latents, in time and memory linear in the number of tokens.

    Args:
        dim, num_heads: as of `HeadMixer`.
        dropout: of the weights of both maps, in training.
        num_latents: L, of each head.
        scale: of the scores; 1 / sqrt(D) is the authors' other choice.
        key_layers, value_layers: n, middle layers of the two MLPs; -1: one linear map, with a residual.
        key_ratio, value_ratio: their hidden width in terms of M.
        qk_norm: a LayerNorm over D of the latents, and another of keys, for all heads.

    Shapes: x (B, T, M) -> (B, T, M).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        dropout: float = 0.0,
        num_latents: int = 64,
        scale: float = 1.0,
        key_layers: int = 3,
        value_layers: int = 3,
        key_ratio: float = 1.0,
        value_ratio: float = 1.0,
        qk_norm: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, bias=True)
        number(self, least=0, most=1, dropout=dropout)
        number(self, above=0, scale=scale, key_ratio=key_ratio, value_ratio=value_ratio)
        whole(self, num_latents=num_latents)
        whole(self, -1, key_layers=key_layers, value_layers=value_layers)
        hidden = {"key_ratio": int(key_ratio * dim), "value_ratio": int(value_ratio * dim)}
        whole(self, most=2**31 - 1, **{f"int({name} M)": width for name, width in hidden.items()})
        flag(self, qk_norm=qk_norm)
        self.dropout, self.num_latents, self.scale = dropout, num_latents, scale
        del self.q_proj  # latents ask in its place
        self.latents = nn.Parameter(torch.empty(num_heads, num_latents, self.head_dim))
        self.k_proj: Any = ResidualMLP(dim, hidden["key_ratio"], key_layers)
        self.v_proj: Any = ResidualMLP(dim, hidden["value_ratio"], value_layers)
        self.q_norm, self.k_norm = (nn.LayerNorm(self.head_dim) if qk_norm else nn.Identity() for _ in "qk")
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Latents of standard deviation 0.1; matrices of 0.02, without biases."""
        nn.init.normal_(self.latents, std=0.1)
        for linear in (*self.k_proj.linears, *self.v_proj.linears, self.o_proj):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = (z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for z in (self.k_proj(x), self.v_proj(x)))
        k = self.k_norm(k)
        wide = torch.promote_types(k.dtype, v.dtype)  # autocast leaves what a residual or a norm gives in float32
        return k.to(wide), k.to(wide), v.to(wide)

    def mix(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B H T D"],
        v: Float[Tensor, "B H T D"],
        keep: Bool[Tensor, "B T"] | None,
    ) -> Float[Tensor, "B H T D"]:
        """Tokens ask by their keys."""
        dropout, latents = self.dropout if self.training else 0.0, self.q_norm(self.latents).to(k.dtype)
        return flare_attention(latents, k, v, scale=self.scale, keep=keep, dropout=dropout)
