"""What kernels cost: predicted work as data, and the measured rates that make it time."""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from regard.kernels.problem import Problem
from regard.kernels.size import counted, sized
from regard.masks import Mask
from regard.masks.algebra import Joined, Not
from regard.masks.grids import Neighborhood

RATES = Path(__file__).with_name("rates.json")
"""Rates by the maker of the processor; `python -m benchmarks.plan --fit` writes those of this one."""
OTHERS = "GenuineIntel"
"""Whose rates stand for makers without a line of their own."""

MASKED = 12.0
"""Bytes for each pair of a head that torch's fused kernel moves where it has a mask or a bias to add."""


@dataclass(frozen=True)
class Cost:
    """What one forward pass takes, as its kernel predicts it from shapes and mask."""

    flops: float
    """Operations of the matrix products, two for each multiply-add, those on pairs computed in vain included."""
    bytes: float
    """Moved by passes over scores, and by forming masks, biases and copies by index."""
    calls: float
    """Torch operations launched."""
    words: str
    """What makes it so."""
    streamed: float = 0.0
    """Bytes of inputs and output, each time that they are read or written as they lie."""
    products: str = "fused"
    """What does the products, a key of `Rates.work`: torch's fused kernel, or one product after another."""

    def __str__(self) -> str:
        return f"{counted(self.flops)}, {sized(self.bytes + self.streamed)}"


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second. Only ratios count where kernels are compared.

    Measured on a CPU and used on every device: a GPU's kernels stand in another order only where calls or copies
    decide.
    """

    peak: float
    """FLOP/s of a large matrix product."""
    bytes: float
    """Bytes/s of passes between the products."""
    streamed: float
    """Bytes/s of inputs read as they lie."""
    call: float
    """Seconds a call."""
    work: dict[str, float]
    """Share of the peak that is reached by what does the products: `fused`, `unfused`, or a kernel's own code; and in
    bf16, `native bf16`, where that was found to be another."""

    def seconds(self, cost: Cost, dtype: torch.dtype = torch.float32) -> float:
        """Predicted time of a forward pass."""
        work = cost.flops / (self.peak * self.work.get(kind(cost, dtype), self.work[cost.products]))
        return work + cost.bytes / self.bytes + cost.streamed / self.streamed + cost.calls * self.call


def kind(cost: Cost, dtype: torch.dtype) -> str:
    """What does the products, in this dtype: a key of `Rates.work`."""
    return f"{cost.products} bf16" if dtype is torch.bfloat16 else cost.products


@cache
def rates() -> Rates:
    """The rates that come with the package for processors of this maker."""
    known = json.loads(RATES.read_text(encoding="utf-8"))
    return Rates(**known.get(maker(), known[OTHERS]))


def maker() -> str:
    """Of this processor, as Linux tells it; "" where nothing does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")


def products(p: Problem, pairs: float) -> float:
    """FLOPs of q k^T and of weights times v over so many pairs a head."""
    return 2.0 * p.q.shape[0] * p.q.shape[1] * pairs * (p.q.shape[3] + p.v.shape[3])


def io(p: Problem) -> float:
    """Bytes of q, k, v and the output."""
    B, H, G, T, S = p.shape
    return float(p.q.element_size() * B * (H * T + G * S) * (p.q.shape[3] + p.v.shape[3]))


def checked(p: Problem) -> float:
    """The same, with the inputs read once more to see that they are finite."""
    return 2 * io(p)


def maps(p: Problem) -> int:
    """How many (T, S) maps mask and bias have between them, at most."""
    biased = p.position_bias is not None or p.bias is not None
    return p.q.shape[0] * p.q.shape[1] if biased else 1 if p.mask is None else p.mask.batch * p.mask.heads


def reached(p: Problem, rows: int, keys: int = 1) -> float:
    """Pairs a head where chunks of query rows take the keys (in chunks, too) that the mask's bounds let them reach.

    Eight chunks, if there are more, stand for all.
    """
    T, S = p.q.shape[2], p.k.shape[2]
    if p.mask is None or p.mask.span == (math.inf, math.inf) or T == 0:
        return float(T * S)
    back, ahead = p.mask.span
    chunks, total = -(-T // rows), 0.0
    places, half = min(8, chunks), T / chunks / 2
    for n in range(places):
        middle = S - T + (n + 0.5) / places * T
        first, last = middle - half - p.halo - back, middle + half + ahead
        total += max(0.0, min(S, last + keys / 2) - max(0.0, first - keys / 2 + 0.5))
    return T * total / places


def asked(mask: Mask) -> float:
    """Bytes moved for each pair by asking the mask about it."""
    if isinstance(mask, Joined):
        return sum(map(asked, mask.parts))
    if isinstance(mask, Not):
        return asked(mask.part)
    return 60.0 * len(mask.axes) if isinstance(mask, Neighborhood) else 25.0


def formed(p: Problem) -> float:
    """Bytes moved for each pair of a head to form its part of mask and bias, for one that serves all heads as well."""
    heads = p.q.shape[0] * p.q.shape[1]
    each = 0.0
    if p.position_bias is not None:
        each += 24.0
    if p.bias is not None:
        each += 8.0 * p.bias.shape[0] * p.bias.shape[1] / heads
    if p.mask is not None:
        each += asked(p.mask) * p.mask.batch * p.mask.heads / heads + MASKED
    return each


def passed(p: Problem) -> float:
    """Bytes moved for each pair by passes over the scores, in fp32, where these are formed outside a fused kernel."""
    passes = 5.0 if p.normalizer is None else 25.0
    passes += 8.0 * (len(p.mixes) + (p.score is not None)) + 3.0 * (p.dropout > 0)
    passes += 2.0 * (p.mask is not None) + 2.0 * (p.position_values is not None)
    return 4.0 * passes + formed(p)
