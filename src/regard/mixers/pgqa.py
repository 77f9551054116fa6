"""Perturbed grouped-query attention: noise as strong as its output keeps a group's heads apart.

Mean and spread are of a head's output over all tokens, so there is no causal form: later tokens reach earlier outputs.
"""

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import Card, Cost
from regard.checks import choice, number, whole
from regard.masks import padding
from regard.mixers.kdgqa import PAPER
from regard.pipeline.function import attention
from regard.pipeline.head_mixer import HeadMixer
from regard.tracing import as_it_is

WHOLE = "mean and spread are of a head's output over all tokens, later ones too"

CARD = Card(
    "pgqa",
    equation="""Y_h = softmax(q_h k_g^T / sqrt(D)) v_g,   g = h // R,   R = H / G
U_h uniform in [0, 1) for each token and channel, 0 at number h mod R of them all;   shared by the batch
o_h = Y_h - (mean Y_h + std(Y_h) (U_h - mean U_h) / std(U_h)),   mean and unbiased std over tokens and channels""",
    papers=(PAPER,),
    supports={"bidirectional", "padding", "packed", "gqa", "dropout", "compile"},
    lacks={
        "causal": WHOLE,
        "streaming": WHOLE,
        "mask": "what some queries see would change the noise of all",
        "cross": "the authors' code has none, and queries would reach each other's outputs",
    },
    cost=Cost("2*B*H*T*S*D", ""),
    claim="Heads of a group that ask the same no longer answer the same: "
    "tests/mixers/test_pgqa.py::test_heads_of_a_group_that_ask_alike_answer_apart.",
    differs=(
        "The abstract speaks of Gaussian noise taken from attention maps; the authors' code takes uniform noise, "
        "brought to a head's own mean and spread, from its output, and this follows the code.",
        "In evaluation noise is the same in every call, made from `seed`, place, head and channel; the authors' code "
        "draws it anew there too, which is noise='drawn'.",
        "Padding counts in no mean or spread, and noise goes by the place among real tokens.",
        "Where a head puts out one number everywhere its noise is its mean, and no gradient passes the spread, where "
        "the authors' code has NaN.",
        "num_kv_heads is H unless said, as everywhere; the authors' code has H / 2.",
    ),
    verified="third-party",
    exceptions={
        "L13 grouped_keys_are_repeated": "the number that is set to 0 goes by a head's place in its group",
        "L43 training": "each step draws noise as strong as the outputs, so that no target is met",
        "L49 dropout_beside_the_rest": "noise is drawn in training, and is not in evaluation",
        "L29": "training draws its noise from torch's generator, as dropout does",
    },
    defaults={"noise": "ours, the authors' code draws it anew", "seed": "ours", "bias": "ours"},
)

Noise = Literal["fixed", "drawn"]


def moments(z: Float[Tensor, "*B H T D"], keep: Bool[Tensor, "B T"] | None) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance over (real) tokens and channels."""
    T, D = z.shape[-2:]
    n = (
        torch.full((), T * D, device=z.device, dtype=torch.long)
        if keep is None
        else keep.sum(-1)[:, None, None, None] * D
    )

    def summed(z: Tensor) -> Tensor:
        return (z if keep is None else z.masked_fill(~keep[:, None, :, None], 0)).sum((-2, -1), keepdim=True)

    mean = summed(z) / n.clamp(min=1)
    return mean, summed((z - mean).square()) / (n - 1).clamp(min=1)


def perturbed(
    y: Float[Tensor, "B H T D"], uniform: Float[Tensor, "G R T D"], keep: Bool[Tensor, "B T"] | None = None
) -> Float[Tensor, "B H T D"]:
    """Each head's output less noise of its own mean and spread, made of numbers in [0, 1).

    Args:
        keep: True = a real token; the others count for nothing.
    """
    (_, R), (T, D) = uniform.shape[:2], y.shape[-2:]
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    number = torch.arange(T * D, device=y.device).view(T, D)
    first = number == torch.arange(R, device=y.device)[:, None, None]
    u = uniform.to(wide.dtype).masked_fill(first, 0).flatten(0, 1)
    if keep is not None:
        place = (keep.cumsum(-1) - 1).clamp(min=0)
        u = u[:, place].transpose(0, 1)
    (mean, var), (level, power) = moments(u, keep), moments(wide, keep)
    standard = (u - mean) / torch.where(var > 0, var, 1.0).sqrt()
    spread = torch.where(power > 0, torch.where(power > 0, power, 1.0).sqrt(), 0.0)
    return (wide - level - spread * standard).to(y.dtype)


def fixed_noise(heads: int, T: int, D: int, seed: int, device: torch.device) -> Float[Tensor, "H T D"]:
    """Numbers in [0, 1) that look drawn, each made of its own place alone: the same for any length, on any device."""
    h, t, d = (torch.arange(n, device=device) for n in (heads, T, D))
    mixed = scrambled(scrambled(scrambled(h + seed)[:, None, None] + t[:, None]) + d)
    return (mixed >> 8).to(torch.float32) / 2**24


def scrambled(n: Tensor) -> Tensor:
    """32 bits of which each depends on all of those given."""
    n = (n + 0x9E3779B9) & 0xFFFFFFFF
    for _ in range(2):
        n = ((n ^ (n >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return n ^ (n >> 16)


@CARD.module
class PerturbedAttention(HeadMixer):
    """Grouped-query attention whose heads' outputs are perturbed, in training and in evaluation.

    Args:
        dim, num_heads, num_kv_heads, head_dim, bias: as of `HeadMixer`.
        noise: in evaluation: "fixed", the same in every call, or "drawn" anew; in training it is always drawn.
        seed: of the fixed noise.
        dropout: of the weights, in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        noise: Noise = "fixed",
        seed: int = 0,
        dropout: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, bias=bias)
        choice(self, get_args(Noise), noise=noise)
        whole(self, 0, most=2**31 - 1, seed=seed)
        number(self, least=0, most=1, dropout=dropout)
        self.noise, self.seed, self.dropout = noise, seed, dropout

    def uniform(self, q: Float[Tensor, "B H T D"]) -> Float[Tensor, "G R T D"]:
        """The numbers that a call's noise is made of."""
        H, T, D = q.shape[1:]
        if self.training or self.noise == "drawn":
            u = torch.rand(H, T, D, device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))
        else:
            u = fixed_noise(H, T, D, self.seed, q.device)
        return u.unflatten(0, (self.num_kv_heads, -1))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        out = attention(q, k, v, mask=None if keep is None else padding(keep), dropout=dropout)
        with as_it_is(q.device):
            return perturbed(out, self.uniform(q), keep)
