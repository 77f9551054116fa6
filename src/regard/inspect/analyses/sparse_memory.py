"""Attention as Kanerva's sparse distributed memory: which memory a head's temperature stands for.

n is the width of queries and keys, d the Hamming radius in which a neuron answers; beta is fitted by least squares on
all v where I is not 0.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import checked, divides, refuse, whole

CARD = Card(
    "sparse_memory",
    equation="""neurons within d bits of both the query and a pattern that is v bits away, of 2^n addresses:
    I(v) = sum_a sum_c C(n-v, a) C(v, c)      a from n-d-v//2 to n-v, c from max(0, n-d-a) to v-(n-d-a)
read: patterns weighed by I(v) / sum I        cos = 1 - 2 v / n        log I ~ beta cos + const: a softmax
continuous: caps of unit vectors in place of circles of bits""",
    papers=(
        Paper(
            "Attention Approximates Sparse Distributed Memory",
            "Bricken, Pehlevan",
            2021,
            "2111.05498",
            "abstract; the authors' code (SDM_Circ_Inter_Funcs.py)",
        ),
    ),
    protocol="Analysis",
    supports=set(),
    cost=Cost("B*H*T*S*D", ""),
    claim="A softmax approximates the memory's read: within the radius its log has a correlation above 0.99 with the "
    "cosine: tests/inspect/analyses/test_sparse_memory.py::test_a_softmax_approximates_the_memory.",
    differs=(
        "The slope is the plain least-squares one, without the code's factor (n + 1) / n.",
        "Caps are integrated by Gauss-Legendre and given as shares of the sphere.",
    ),
    verified="reconstructed",
)


def circle_intersection(n: int, radius: int) -> Float[Tensor, " V"]:
    """log I(v) for v = 0 .. n, in float64; -inf where no address is near both."""
    whole("circle_intersection", n=n)
    whole("circle_intersection", 0, most=n, radius=radius)
    number = torch.arange(n + 1)
    factorial = torch.lgamma(number + torch.ones((), dtype=torch.float64))
    v, c = number[:, None], number
    choose = torch.where(c <= v, factorial[v] - factorial[c] - factorial[(v - c).clamp_min(0)], -torch.inf)
    at_least = choose.flip(1).logcumsumexp(1).flip(1)  # [m, t]: log of how many sets of m bits have t members or more
    # Of the v bits that differ, c agree with the query and v - c with the pattern; of the others, `a` must with both.
    a = (n - radius - torch.minimum(c, v - c)).clamp(0, n)
    return (choose + at_least[n - v, a]).logsumexp(1)


def cap_intersection(n: int, radius: int, cosine: Float[Tensor, "*c"], *, points: int = 200) -> Float[Tensor, "*c"]:
    """The continuous one: log of the share of the unit sphere in n dimensions that is in both caps.

    Args:
        radius: the Hamming radius whose cosine, 1 - 2 radius / n, bounds a cap; below n / 2.
        cosine: of the caps' centres.
        points: of the integration.
    """
    whole("cap_intersection", 3, n=n)
    whole("cap_intersection", most=(n - 1) // 2, radius=radius)
    try:
        from scipy.special import betainc, roots_legendre
    except ImportError as error:
        raise ImportError('cap_intersection needs scipy: pip install "regard[inspect]"') from error
    cap = math.acos(1 - 2 * radius / n)
    half = cosine.double().clamp(-1, 1).acos() / 2
    nodes, weights = (torch.from_numpy(x) for x in roots_legendre(points))
    # Where both caps reach: angles from half of that between the centres to the cap's own.
    width = (cap - half).clamp_min(0)[..., None] / 2
    angle = half[..., None] + width * (nodes + 1)
    inside = 1 - (half[..., None].tan() / angle.tan()) ** 2
    part = torch.from_numpy(betainc((n - 2) / 2, 0.5, inside.clamp(0, 1).numpy()))
    integral = (width * weights * angle.sin() ** (n - 2) * part).sum(-1)
    # Two halves of area pi^((n-1)/2) / Gamma((n-1)/2) times the integral, over 2 pi^(n/2) / Gamma(n/2) of the sphere.
    return integral.log() + math.lgamma(n / 2) - math.lgamma((n - 1) / 2) - math.log(math.pi) / 2


@checked()
def sparse_memory_weights(hamming: Int[Tensor, "*b P"], n: int, radius: int) -> Float[Tensor, "*b P"]:
    """Kanerva's read: the weights of patterns at these distances from the query. NaN where none shares a neuron."""
    table = circle_intersection(n, radius).to(hamming.device)
    if bool((wrong := (hamming < 0) | (hamming > n)).any()):
        refuse("sparse_memory_weights", "hamming", "is out of range", int(hamming[wrong][0]), f"numbers from 0 to {n}")
    return table[hamming].softmax(-1)


def fitted_beta(n: int, radius: int) -> float:
    """The inverse temperature of the softmax over cosines that comes closest to the memory of that radius."""
    table = circle_intersection(n, radius)
    cosine = 1 - 2 * torch.arange(n + 1, dtype=torch.float64) / n
    full = table.isfinite()
    if int(full.sum()) < 2:
        return math.inf
    return float(_slope(cosine[full], table[full]))


class SparseMemoryFit(NamedTuple):
    """For each of H heads."""

    beta: Float[Tensor, " H"]
    """The slope of its logits over the cosines of queries and keys."""
    explained: Float[Tensor, " H"]
    """The share of the logits' variance that cosines explain: near 1 where norms hardly matter."""
    radius: Int[Tensor, " H"]
    """The Hamming radius of the memory whose beta is nearest; a greater radius reads more broadly."""
    radius_beta: Float[Tensor, " H"]
    """That memory's beta."""


@CARD.function
@checked()
def sparse_memory_fit(
    q: Float[Tensor, "B H T D"], k: Float[Tensor, "B G S D"], *, scale: float | None = None
) -> SparseMemoryFit:
    """Which memory each head stands for: temperatures from its queries and keys, and the radius that fits.

    Args:
        q, k: as the attention got them; query head h reads key head h // (H / G).
        scale: of the logits; default 1 / sqrt(D).
    """
    divides("sparse_memory_fit", num_kv_heads=k.shape[1], num_heads=q.shape[1])
    D = q.shape[-1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1).to(dtype)
    q = q.to(dtype)
    cosine = torch.nn.functional.normalize(q, dim=-1) @ torch.nn.functional.normalize(k, dim=-1).mT
    logits = (D**-0.5 if scale is None else scale) * (q @ k.mT)
    x, y = (t.transpose(0, 1).flatten(1) for t in (cosine, logits))
    beta = _slope(x, y)
    deviation = y - y.mean(-1, keepdim=True)
    error = deviation - beta[:, None] * (x - x.mean(-1, keepdim=True))
    explained = 1 - error.square().sum(-1) / deviation.square().sum(-1)
    betas = torch.tensor([fitted_beta(D, radius) for radius in range(1, D)], dtype=dtype, device=q.device)
    nearest = (betas - beta[:, None]).abs().argmin(-1)
    return SparseMemoryFit(beta, explained, nearest + 1, betas[nearest])


def _slope(x: Float[Tensor, "*b N"], y: Float[Tensor, "*b N"]) -> Float[Tensor, "*b"]:
    x = x - x.mean(-1, keepdim=True)
    return (x * (y - y.mean(-1, keepdim=True))).sum(-1) / x.square().sum(-1)
