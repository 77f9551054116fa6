"""YaRN: a rotary scaling that keeps fast pairs, interpolates slow ones, and sharpens the scores."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from regard.cards import Card
from regard.checks import number, whole
from regard.positions.rotary import Rotary
from regard.positions.rotary_scaling import NTK_AWARE, STUDY, Linear

CARD = Card(
    "rotary_yarn",
    equation="""rotary with w'_a = (1 - r_a) w_a + r_a w_a / s,   r_a = clip((a - low) / (high - low), 0, 1)
pair(n) = D ln(L / (2 pi n)) / (2 ln base): the pair that makes n turns within the trained length L
low = floor(pair(beta_fast)), high = ceil(pair(beta_slow));   queries and keys times m = 0.1 ln s + 1,   s = factor""",
    papers=(
        replace(
            NTK_AWARE.paper,
            read="eqs. 17-22, in a close summary of sections 3.2 and 3.4; the authors' code; transformers",
        ),
        STUDY,
    ),
    traits=NTK_AWARE.traits,
    cost=NTK_AWARE.cost,
    claim="Equals plain rotary on pairs before the ramp and interpolation after it: "
    "tests/positions/test_rotary.py::test_yarn_keeps_fast_pairs_and_interpolates_slow_ones.",
    differs=(
        "The paper's ramp is linear in the turns that a pair makes within L (eq. 18). Here it is linear in the pair's "
        "index, with rounded ends, as in the authors' code; truncate=False doesn't round.",
    ),
    verified="third-party",
    example={"factor": 2.0, "original_max": 8, "beta_fast": 2.0, "beta_slow": 0.5},
    tries={"beta_fast": {"beta_fast": 8.0, "base": 10.0, "original_max": 64}},
    defaults={
        "factor": "ours",
        "original_max": "code",
        "beta_fast": "code",
        "beta_slow": "code",
        "attention_factor": "code, transformers",
        "mscale": "code, transformers",
        "mscale_all_dim": "code, transformers",
        "truncate": "code",
        "base": "paper, RoFormer",
        "interleaved": "code",
        "partial_rotary_factor": "code",
    },
)


@dataclass(frozen=True)
class YaRN(Linear):
    """Fast pairs keep their frequency, slow ones are interpolated, scores are sharpened."""

    original_max: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """m; None = 0.1 ln(factor) + 1, or the quotient of the two mscales."""
    mscale: float | None = None
    """With `mscale_all_dim`: m = (0.1 mscale ln s + 1) / (0.1 mscale_all_dim ln s + 1)."""
    mscale_all_dim: float | None = None
    truncate: bool = True
    """Round the ramp's ends outwards to whole pairs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, original_max=self.original_max)
        number(self, above=0, beta_slow=self.beta_slow)
        number(self, above=self.beta_slow, beta_fast=self.beta_fast)
        if self.attention_factor is not None:
            number(self, above=0, attention_factor=self.attention_factor)

    def frequencies(self, w: Tensor, base: float, length: Tensor) -> Tensor:
        width = 2 * w.numel()

        def pair_turning(times: float) -> float:
            return width * math.log(self.original_max / (2 * math.pi * times)) / (2 * math.log(base))

        low, high = pair_turning(self.beta_fast), pair_turning(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        if low == high:
            high += 0.001
        pairs = torch.arange(w.numel(), device=w.device, dtype=w.dtype)
        ramp = ((pairs - low) / (high - low)).clamp(0, 1)
        return torch.lerp(w, w / self.factor, ramp)

    def multiplier(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        log = 0.1 * math.log(self.factor)
        if self.mscale and self.mscale_all_dim:
            return (self.mscale * log + 1) / (self.mscale_all_dim * log + 1)
        return log + 1


@CARD.fills("position")
def rotary_yarn(
    head_dim: int,
    *,
    factor: float = 4.0,
    original_max: int = 2048,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
    base: float = 10000.0,
    interleaved: bool = False,
    partial_rotary_factor: float = 1.0,
) -> Rotary:
    """A rotary part with the scaling `YaRN`.

    Args:
        factor: s; the default is this library's.
        original_max: L; likewise.
        beta_fast, beta_slow: turns within L above which a pair is kept, and below which it is interpolated.
        attention_factor: m, in place of the formula.
        mscale, mscale_all_dim: c and d, together in place of the formula: m = (0.1 c ln s + 1) / (0.1 d ln s + 1).
        truncate: round the ramp's ends outwards to whole pairs.
        base, interleaved, partial_rotary_factor: as of `Rotary`.
    """
    scaling = YaRN(factor, original_max, beta_fast, beta_slow, attention_factor, mscale, mscale_all_dim, truncate)
    return Rotary(
        head_dim,
        base=base,
        interleaved=interleaved,
        scaling=scaling,
        partial_rotary_factor=partial_rotary_factor,
    )
