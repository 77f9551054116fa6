"""Rotary scalings: how a rotary model trained at length L is stretched to s L, by changing its frequencies.

    Linear      w_a / s, as if every position were divided by s           Chen et al. 2023 (arXiv 2306.15595)
    NTK         base' = base s^(D/(D-2)): the first w is kept, the last divided by s
                                                                          Peng et al. 2023 (arXiv 2309.00071)
    DynamicNTK  the same with s n/L - (s-1) for s, n the length at hand, n > L      (likewise)
    YaRN        in yarn.py                                                          (likewise)
    Llama3      interpolates long waves, keeps short ones, a ramp between           Llama 3.1's code
    LongRoPE    w_a / e_a with searched e, another set of them beyond L   Ding et al. 2024 (arXiv 2402.13753)

The formulas are those of the methods' released code, which "A Controlled Study on Long Context Extension and
Generalization in LLMs" (Lu et al. 2024, arXiv 2409.12181) compares. DynamicNTK and LongRoPE depend on the
length of the whole input, so they are not causal to the letter: a prefix run alone gets other angles, and
keys that were turned and cached at a shorter length no longer match. They have no card.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from regard._former import Card, Paper, register
from regard.positions._shared import check_above, check_int
from regard.positions.rotary import COST, TRAITS, Rotary
from regard.shapes import HeadShape


@dataclass(frozen=True)
class Linear:
    """Position interpolation: every position is divided by `factor`."""

    factor: float

    follows_length: ClassVar[bool] = False
    """Whether frequencies depend on the length at hand."""

    def __post_init__(self) -> None:
        check_above(type(self).__name__, "factor", self.factor, 1.0, inclusive=True)

    def check(self, head_dim: int) -> None:
        """Serves every width."""

    def frequencies(self, w: Tensor, base: float, length: Tensor) -> Tensor:
        return w / self.factor

    def multiplier(self) -> float:
        return 1.0


@dataclass(frozen=True)
class NTK(Linear):
    """A larger base: fast pairs keep their frequency, the slowest is divided by `factor`."""

    def check(self, head_dim: int) -> None:
        if head_dim < 4:
            raise ValueError(f"{type(self).__name__}: head_dim is too small (got {head_dim}); expected at least 4")

    def frequencies(self, w: Tensor, base: float, length: Tensor) -> Tensor:
        return w * _spread(w, self.factor)


@dataclass(frozen=True)
class DynamicNTK(NTK):
    """NTK whose factor grows with the input, from 1 at `original_max` on."""

    original_max: int

    follows_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("DynamicNTK", "original_max", self.original_max)

    def frequencies(self, w: Tensor, base: float, length: Tensor) -> Tensor:
        stretch = length.clamp(min=self.original_max).to(w.dtype) / self.original_max
        return w * _spread(w, self.factor * stretch - (self.factor - 1))


@dataclass(frozen=True)
class Llama3(Linear):
    """Keeps waves shorter than L / high_freq_factor, interpolates those longer than L / low_freq_factor."""

    original_max: int
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("Llama3", "original_max", self.original_max)
        check_above("Llama3", "low_freq_factor", self.low_freq_factor, 0.0)
        check_above("Llama3", "high_freq_factor", self.high_freq_factor, self.low_freq_factor)

    def frequencies(self, w: Tensor, base: float, length: Tensor) -> Tensor:
        turns = self.original_max * w / (2 * math.pi)
        keep = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return torch.lerp(w / self.factor, w, keep)


@dataclass(frozen=True)
class LongRoPE(Linear):
    """Every pair has a divisor of its own: `short_factor` up to `original_max`, `long_factor` beyond."""

    original_max: int
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]

    follows_length: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("LongRoPE", "original_max", self.original_max, least=2)
        for name in ("short_factor", "long_factor"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            for e in getattr(self, name):
                check_above("LongRoPE", name, e, 0.0)

    def check(self, head_dim: int) -> None:
        for name in ("short_factor", "long_factor"):
            if len(getattr(self, name)) != head_dim // 2:
                raise ValueError(
                    f"LongRoPE: {name} has the wrong length (got {len(getattr(self, name))}); "
                    f"expected head_dim / 2 = {head_dim // 2} numbers"
                )

    def frequencies(self, w: Tensor, base: float, length: Tensor) -> Tensor:
        short, long = w.new_tensor(self.short_factor), w.new_tensor(self.long_factor)
        return w / torch.where(length > self.original_max, long, short)

    def multiplier(self) -> float:
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max))


def _spread(w: Tensor, growth: float | Tensor) -> Tensor:
    """growth^(-2a/(D-2)): what the base `base * growth^(D/(D-2))` multiplies each frequency by."""
    pairs = torch.arange(w.numel(), device=w.device, dtype=w.dtype)
    return growth ** (-pairs / (w.numel() - 1))


def _linear(shape: HeadShape, *, factor: float = 4.0, base: float = 10000.0) -> dict[str, object]:
    return {"position": Rotary(shape.head_dim, base=base, scaling=Linear(factor))}


def _ntk(shape: HeadShape, *, factor: float = 4.0, base: float = 10000.0) -> dict[str, object]:
    return {"position": Rotary(shape.head_dim, base=base, scaling=NTK(factor))}


YARN_PAPER = "YaRN: Efficient Context Window Extension of Large Language Models"
YARN_AUTHORS = "Peng, Quesnelle, Fan, Shippole"

LINEAR = register(
    Card(
        name="rotary_linear",
        family="positions",
        gist="Position interpolation: rotary with every position divided by a factor.",
        equation="rotary with w[a] / factor",
        paper=Paper(
            "Extending Context Window of Large Language Models via Positional Interpolation",
            "Chen, Wong, Chen, Tian",
            2023,
            "2306.15595",
        ),
        slots=_linear,
        traits=TRAITS,
        cost=COST,
        claim="Scores at distance d equal plain rotary scores at d / factor: tests/positions.",
        verified="third-party",
        example={"factor": 2.0},
    )
)

NTK_AWARE = register(
    Card(
        name="rotary_ntk",
        family="positions",
        gist="NTK-aware rotary: a larger base, so that only slow pairs are interpolated.",
        equation="rotary with base' = base factor^(D/(D-2))",
        paper=Paper(YARN_PAPER, YARN_AUTHORS, 2023, "2309.00071", "section 3.1"),
        slots=_ntk,
        traits=TRAITS,
        cost=COST,
        claim="The first frequency is kept and the last divided by the factor: tests/positions.",
        verified="third-party",
        example={"factor": 2.0},
    )
)
