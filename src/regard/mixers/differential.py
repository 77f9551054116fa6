"""Differential attention: one softmax less a learned share of another, so that noise cancels.

Maps of a pair read the same values, two value heads side by side. Both are plain attention, whose outputs are
subtracted, so any kernel runs them and a stream keeps ordinary keys and values.
"""

import math
from typing import Any, Literal, Unpack, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import choice, divides, flag, number, refuse, whole
from regard.kernels import Problem
from regard.pipeline.head_mixer import Projections
from regard.pipeline.layer import Attention
from regard.positions.rotary import Rotary

CARD = Card(
    "differential",
    equation="""o_p = (A_p1 - lambda A_p2) [v_a | v_b],   A_h = softmax(q_h k_h^T / sqrt(D)),   p = 1 .. H / 2
lambda = exp(l_q1 . l_k1) - exp(l_q2 . l_k2) + lambda_init,   lambda_init = 0.8 - 0.6 exp(-0.3 layer_index)
y = concat_p((1 - lambda_init) rms_norm(o_p) w) W_o""",
    papers=(
        Paper(
            "Differential Transformer",
            "Ye et al.",
            2024,
            "2410.05258",
            "abstract; the authors' code (multihead_diffattn.py); transformers' DiffLlama",
        ),
    ),
    supports={"causal", "bidirectional", "cross", "padding", "packed", "mask", "gqa", "streaming", "compile"},
    traits={"shift_invariant"},
    cost=Cost("3*B*H*T*S*D", "2*S*G*D"),
    claim="What both maps of a pair attend to cancels out, so that a needle stands out among many distractors: "
    "tests/mixers/test_differential.py::test_noise_that_both_maps_see_cancels.",
    differs=(
        "num_heads counts maps, as in transformers: H / 2 pairs, where the authors' code counts these.",
        "Rotation turns features (a, a + D / 2), as in transformers; the authors' code turns neighbours, a fixed "
        "permutation.",
        "No dropout: neither says what it would drop, and transformers refuses it.",
    ),
    verified="third-party",
    exceptions={
        "L13 grouped_keys_are_repeated": "neighbouring value heads make a pair, so that of heads repeated side by side "
        "each would be paired with itself; with pairing='split' it holds",
        "L32 compiled": "the norm of the output makes the terms of lambda's gradient cancel, so that another order of "
        "the same sums moves it by some 2e-6 in float32",
    },
    tries={"layer_index": 3, "lambda_init": 0.5},
    defaults={
        "layer_index": "ours, the first layer's",
        "lambda_init": "paper, from the layer's number",
        "pairing": "code",
        "norm_weight": "code",
        "base": "code, transformers",
        "eps": "code",
        "lambda_std": "code",
        "bias": "code",
        "context_dim": "ours, as wide as dim",
    },
)

Pairing = Literal["adjacent", "split"]


def lambda_of_layer(layer_index: int) -> float:
    """Where lambda starts in layer `layer_index`, counted from 0: 0.2 in the first, towards 0.8 further up."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer_index)


def paired_values(v: Float[Tensor, "B G S D"], pairing: Pairing) -> Float[Tensor, "B G S W"]:
    """For each group the values of width 2 D that its queries read: two value heads side by side."""
    half = v.shape[1] // 2
    if pairing == "split":
        wide = torch.cat([v[:, :half], v[:, half:]], -1)
        return torch.cat([wide, wide], 1)
    return torch.cat([v[:, 0::2], v[:, 1::2]], -1).repeat_interleave(2, 1)


def difference(out: Float[Tensor, "B H T W"], lam: Float[Tensor, ""], pairing: Pairing) -> Float[Tensor, "B P T W"]:
    """The first map's output less lambda times the second's, of each pair."""
    half = out.shape[1] // 2
    first, second = (out[:, :half], out[:, half:]) if pairing == "split" else (out[:, 0::2], out[:, 1::2])
    return first - lam * second


@CARD.module
class DifferentialAttention(Attention):
    """Attention by differences of two maps, each pair's output brought to one length.

    Args:
        dim, num_heads, rest: as in `regard.Attention`; num_heads and num_kv_heads are even.
        layer_index: which layer of a model it is, counted from 0; sets `lambda_init`.
        lambda_init: where lambda starts, below 1; default 0.8 - 0.6 exp(-0.3 layer_index).
        pairing: "adjacent" pairs heads 2 p and 2 p + 1, as the authors' code; "split" p and p + H / 2, as transformers.
        norm_weight: whether the norm has a weight for each feature, shared by all pairs; transformers' has none.
        base: of rotary positions; None for no positions.
        eps: of the norm, under the root.
        lambda_std: spread of the four vectors that lambda is made of, at the start.
    """

    reads_as_kept = False

    lambda_q1: nn.Parameter
    lambda_k1: nn.Parameter
    lambda_q2: nn.Parameter
    lambda_k2: nn.Parameter

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        layer_index: int = 0,
        lambda_init: float | None = None,
        pairing: Pairing = "adjacent",
        norm_weight: bool = True,
        base: float | None = 10000.0,
        eps: float = 1e-5,
        lambda_std: float = 0.1,
        **rest: Unpack[Projections],
    ) -> None:
        whole(self, 0, layer_index=layer_index)
        choice(self, get_args(Pairing), pairing=pairing)
        flag(self, norm_weight=norm_weight)
        number(self, least=0, eps=eps, lambda_std=lambda_std)
        lambda_init = lambda_of_layer(layer_index) if lambda_init is None else lambda_init
        number(self, below=1, lambda_init=lambda_init)
        super().__init__(dim, num_heads, **rest)
        divides(self, pair=2, num_heads=num_heads)
        divides(self, pair=2, num_kv_heads=self.num_kv_heads)
        if base is not None:
            if self.head_dim % 2:
                refuse(self, "head_dim", "is odd, and rotation turns pairs", self.head_dim, "an even one, or base=None")
            self.position = Rotary(self.head_dim, base=base)
        self.lambda_init, self.pairing, self.eps, self.lambda_std = lambda_init, pairing, eps, lambda_std
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            setattr(self, name, nn.Parameter(torch.empty(self.head_dim)))
        self.norm_weight = nn.Parameter(torch.empty(2 * self.head_dim)) if norm_weight else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for vector in (self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2):
            nn.init.normal_(vector, std=self.lambda_std)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)

    def share(self) -> Float[Tensor, ""]:
        """lambda, in at least float32."""
        wide = torch.promote_types(self.lambda_q1.dtype, torch.float32)
        first, second = (
            (q.to(wide) * k.to(wide)).sum().exp()
            for q, k in ((self.lambda_q1, self.lambda_k1), (self.lambda_q2, self.lambda_k2))
        )
        return first - second + self.lambda_init

    def _problem(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **more: Any) -> Problem:
        return super()._problem(q, k, paired_values(v, self.pairing), *rest, **more)

    def _finish(self, out: Float[Tensor, "B H T W"], x: Tensor) -> Tensor:
        wide = out.to(torch.promote_types(out.dtype, torch.float32))
        mixed = difference(wide, self.share(), self.pairing)
        mixed = mixed * torch.rsqrt(mixed.square().mean(-1, keepdim=True) + self.eps)
        if self.norm_weight is not None:
            mixed = mixed * self.norm_weight
        return super()._finish(((1 - self.lambda_init) * mixed).to(out.dtype), x)
