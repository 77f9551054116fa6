"""KIVI: keys in few bits channel by channel, values token by token, the newest of both as they are."""

import copy
from typing import Literal, TypeVar

import torch

from regard.cache.evict import LIMITS, TRIES, Asked, Evicting, Scores
from regard.cache.quantised import Form, Quantised
from regard.cards import Card, Cost, Paper
from regard.checks import choice, refuse, whole

CARD = Card(
    "kivi",
    equation="""z = min X;   s = (max X - min X) / (2^b - 1);   Q = round((X - z) / s);   X' = s Q + z
keys: X = g tokens of one channel, of R tokens at once;   values: X = g channels of one token
as they are: keys of the newest n mod R tokens, values of the newest R""",
    papers=(
        Paper(
            "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
            "Liu, Yuan, Jin, Zhong, Xu, Braverman, Chen, Hu",
            2024,
            "2402.02750",
            "abstract; the authors' code",
        ),
    ),
    protocol="CachePolicy",
    supports={"causal", "padding", "streaming"},
    cost=Cost("B*G*S*D", "S*G*(2*D + 1)"),
    claim="Memory falls by the bits, and a channel of large keys costs the others nothing: "
    "tests/cache/test_kivi.py::test_a_loud_channel_is_quantised_alone.",
    differs=(
        "The formulas are those of the authors' code: the paper's text was not read.",
        "Keys and values have one number of bits; the authors' code has one for each.",
        "Products are taken with numbers that are dequantised first; the authors fuse both.",
        "Where another policy drops keys, those left are grouped and quantised again.",
    ),
    verified="reconstructed",
    example={"bits": 2, "group": 4, "residual": 16},
    tries={
        "bits": {"residual": 4},
        "group": {"residual": 4},
        "residual": {"residual": 4},
        "budget": 5,
        **TRIES,
    },
    defaults={"bits": "code", "group": "code", "residual": "code", **LIMITS, "budget": "ours, all"},
)

P = TypeVar("P", bound=Evicting)


@CARD.module
class KIVI(Evicting):
    """Keeps all keys, in few bits.

    Args:
        bits: 2, 4 or 8, of each number.
        group: g, how many numbers share a scale. Where values have fewer channels, or a rest, these do.
        residual: R, how many of the newest tokens at most are left as they are; a multiple of the group.
        budget: how many keys are kept, the newest; default all.
        every: as of `regard.cache.Evicting`.
    """

    def __init__(
        self,
        *,
        bits: Literal[2, 4, 8] = 2,
        group: int = 32,
        residual: int = 128,
        budget: int | float = 1.0,
        every: int | None = None,
    ) -> None:
        super().__init__(budget=budget, every=every)
        choice(self, (2, 4, 8), bits=bits)
        whole(self, group=group, residual=residual)
        if residual % group:
            refuse(self, "residual", "is no multiple of the group", residual, f"a multiple of {group}")
        self.form = Form(bits, group, residual)
        self.makes = Quantised.of(self.form)

    def judge(self, asked: Asked) -> tuple[Scores, None]:
        return asked.positions.to(torch.promote_types(asked.k.dtype, torch.float32)), None

    def under(self, policy: P) -> P:
        """The same policy, with what it keeps stored in few bits."""
        other = copy.copy(policy)
        other.makes = self.makes
        return other
