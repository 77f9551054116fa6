"""Rotary scalings: how a rotary model trained at length L is stretched to s L, by other frequencies.

The formulas are those of released code. DynamicNTK and LongRoPE depend on the length of the whole input, so they are
not causal to the letter: a prefix run alone gets other angles, and keys that were turned and cached at a shorter length
no longer match. They have no card.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regard.cards import Card, Paper
from regard.checks import number, refuse, whole
from regard.positions.rotary import CARD as ROTARY
from regard.positions.rotary import Rotary

STUDY = Paper(
    "A Controlled Study on Long Context Extension and Generalization in LLMs",
    "Lu et al.",
    2024,
    "2409.12181",
    "abstract; official code: it compares this scaling with others, by the same formula",
)
"""What compares the scalings that have cards."""

LINEAR = Card(
    "rotary_linear",
    equation="rotary with w_a / factor, as if every position were divided by it",
    papers=(
        Paper(
            "Extending Context Window of Large Language Models via Positional Interpolation",
            "Chen, Wong, Chen, Tian",
            2023,
            "2306.15595",
            "not its own text, but the formula in transformers and in the code of later methods",
        ),
        STUDY,
    ),
    gist="Position interpolation: rotary with every position divided by a factor.",
    traits=ROTARY.traits,
    cost=ROTARY.cost,
    claim="Scores at distance d equal plain rotary scores at d / factor: "
    "tests/positions/test_rotary.py::test_linear_is_interpolation.",
    verified="third-party",
    example={"factor": 2.0},
    defaults={"factor": "ours", "base": "paper, RoFormer", "interleaved": "code", "partial_rotary_factor": "code"},
)

NTK_AWARE = Card(
    "rotary_ntk",
    equation="rotary with base' = base factor^(D/(D-2)): the first w_a is kept, the last divided by factor",
    papers=(
        Paper(
            "YaRN: Efficient Context Window Extension of Large Language Models",
            "Peng, Quesnelle, Fan, Shippole",
            2023,
            "2309.00071",
            "eqs. 14-16, in a close summary of section 3.1; the authors' code; transformers",
        ),
        STUDY,
    ),
    gist="NTK-aware rotary: a larger base, so that only slow pairs are interpolated.",
    traits=ROTARY.traits,
    cost=ROTARY.cost,
    claim="The first frequency is kept and the last divided by the factor: "
    "tests/positions/test_rotary.py::test_ntk_keeps_the_first_frequency_and_slows_the_last.",
    verified="third-party",
    example={"factor": 2.0},
    defaults={"factor": "ours", "base": "paper, RoFormer", "interleaved": "code", "partial_rotary_factor": "code"},
)


@dataclass(frozen=True)
class Linear:
    """Position interpolation: every position is divided by `factor`."""

    factor: float

    follows_length: ClassVar[bool] = False
    """Whether frequencies depend on the length at hand."""

    def __post_init__(self) -> None:
        number(self, least=1, factor=self.factor)

    def check(self, head_dim: int) -> None:
        """Serves every width."""

    def frequencies(self, w: Tensor, base: float, length: Tensor) -> Tensor:
        return w / self.factor

    def multiplier(self) -> float:
        return 1.0


@dataclass(frozen=True)
class Proportional(Linear):
    """Gemma 4's code: only the first `int(kept * D / 2)` pairs turn, as fast as in a head that turns wholly; the slow
    ones stand still. Not a part of the channels, which would have the whole range of frequencies."""

    kept: float

    def __post_init__(self) -> None:
        super().__post_init__()
        number(self, above=0, most=1, kept=self.kept)

    def frequencies(self, w: Tensor, base: float, length: Tensor) -> Tensor:
        pairs = torch.arange(w.numel(), device=w.device)
        return torch.where(pairs < int(self.kept * 2 * w.numel() // 2), w / self.factor, 0.0)


@dataclass(frozen=True)
class NTK(Linear):
    """A larger base: fast pairs keep their frequency, the slowest is divided by `factor`."""

    def check(self, head_dim: int) -> None:
        whole(self, 4, head_dim=head_dim)

    def frequencies(self, w: Tensor, base: float, length: Tensor) -> Tensor:
        return w * _spread(w, self.factor)


@dataclass(frozen=True)
class DynamicNTK(NTK):
    """NTK with the factor s n/L - (s-1), which grows with the length n from 1 at `original_max` on; same paper."""

    original_max: int

    follows_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, original_max=self.original_max)

    def frequencies(self, w: Tensor, base: float, length: Tensor) -> Tensor:
        stretch = length.clamp(min=self.original_max).to(w.dtype) / self.original_max
        return w * _spread(w, self.factor * stretch - (self.factor - 1))


@dataclass(frozen=True)
class Llama3(Linear):
    """Llama 3.1's code: keeps waves shorter than L / high_freq_factor, interpolates those longer than L /
    low_freq_factor, with a ramp between."""

    original_max: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, original_max=self.original_max)
        number(self, above=0, low_freq_factor=self.low_freq_factor)
        number(self, above=self.low_freq_factor, high_freq_factor=self.high_freq_factor)

    def frequencies(self, w: Tensor, base: float, length: Tensor) -> Tensor:
        turns = self.original_max * w / (2 * math.pi)
        keep = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return torch.lerp(w / self.factor, w, keep)


@dataclass(frozen=True)
class LongRoPE(Linear):
    """Every pair has a searched divisor of its own: `short_factor` up to `original_max`, `long_factor` beyond.

    Ding et al. 2024 (arXiv 2402.13753).
    """

    original_max: int
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]

    follows_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        whole(self, 2, original_max=self.original_max)
        for name in ("short_factor", "long_factor"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            for e in getattr(self, name):
                number(self, above=0, **{name: e})

    def check(self, head_dim: int) -> None:
        for name in ("short_factor", "long_factor"):
            if (n := len(getattr(self, name))) != head_dim // 2:
                refuse(self, name, "has the wrong length", n, f"head_dim / 2 = {head_dim // 2} numbers")

    def frequencies(self, w: Tensor, base: float, length: Tensor) -> Tensor:
        short, long = w.new_tensor(self.short_factor), w.new_tensor(self.long_factor)
        return w / torch.where(length > self.original_max, long, short)

    def multiplier(self) -> float:
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max))


def _spread(w: Tensor, growth: float | Tensor) -> Tensor:
    """growth^(-2a/(D-2)): what the base `base * growth^(D/(D-2))` multiplies each frequency by."""
    pairs = torch.arange(w.numel(), device=w.device, dtype=w.dtype)
    return growth ** (-pairs / (w.numel() - 1))


@LINEAR.fills("position")
def rotary_linear(
    head_dim: int,
    *,
    factor: float = 4.0,
    base: float = 10000.0,
    interleaved: bool = False,
    partial_rotary_factor: float = 1.0,
) -> Rotary:
    """A rotary part with the scaling `Linear`.

    Args:
        factor: what positions are divided by; the default is this library's.
        base, interleaved, partial_rotary_factor: as of `Rotary`.
    """
    return Rotary(
        head_dim,
        base=base,
        interleaved=interleaved,
        scaling=Linear(factor),
        partial_rotary_factor=partial_rotary_factor,
    )


@NTK_AWARE.fills("position")
def rotary_ntk(
    head_dim: int,
    *,
    factor: float = 4.0,
    base: float = 10000.0,
    interleaved: bool = False,
    partial_rotary_factor: float = 1.0,
) -> Rotary:
    """A rotary part with the scaling `NTK`.

    Args:
        factor: what the last w_a is divided by; the default is this library's.
        base, interleaved, partial_rotary_factor: as of `Rotary`.
    """
    return Rotary(
        head_dim,
        base=base,
        interleaved=interleaved,
        scaling=NTK(factor),
        partial_rotary_factor=partial_rotary_factor,
    )
