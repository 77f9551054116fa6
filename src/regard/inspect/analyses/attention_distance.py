"""Attention distance: how far each head looks, on an image's patches or along a sequence.

Tokens that have no place, such as [CLS], are left out first, and rows divided by what is left.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import number, refuse, whole
from regard.inspect.analyses._maps import each_layer

CARD = Card(
    "attention_distance",
    equation="""distance = mean_i sum_j A_ij |p_i - p_j|        aligned[d] = 1/T sum_i A_(i, j) with p_j - p_i = d
p: the places of patches on the grid, or of tokens in the sequence""",
    papers=(
        Paper(
            "Teaching Matters: Investigating the Role of Supervision in Vision Transformers",
            "Walmer, Suri, Gupta, Shrivastava",
            2022,
            "2212.03862",
            "abstract; the authors' code (analysis/attention_metrics.py), whose distance is that of Raghu et al. 2021",
        ),
    ),
    protocol="Analysis",
    supports=set(),
    cost=Cost("2*B*H*T**2", ""),
    claim="Heads are local or global, and it can be measured on heads of known reach: "
    "tests/inspect/analyses/test_attention_distance.py::test_heads_of_known_reach.",
    differs=(
        "Distances are in patches, times the size of a patch, where the authors' are on the unit square, patch = "
        "1 / (side - 1).",
        "A grid need not be square.",
        "Aligned maps are means over images, where the authors' code sums over a batch's images.",
    ),
    verified="reconstructed",
)

Grid = tuple[int, int] | None
"""Height and width in patches; None for a sequence."""


def placed(
    name: str, attention: Sequence[Float[Tensor, "B _H T T"]], grid: Grid, extra_tokens: int
) -> tuple[list[Float[Tensor, "B _H P P"]], Int[Tensor, "P 2"]]:
    """Maps among tokens that have a place, rows divided by their sums, and the places (y, x)."""
    maps = each_layer(name, attention, "B _H T T")
    whole(name, 0, extra_tokens=extra_tokens)
    left = maps[0].shape[-1] - extra_tokens
    Y, X = (1, left) if grid is None else grid
    if min(Y, X) < 1 or left != Y * X:
        wrong = f"does not fit extra_tokens = {extra_tokens} and grid = {grid}"
        refuse(name, "attention", wrong, f"{left + extra_tokens} tokens", "extra_tokens + height * width tokens")
    kept = [one[:, :, extra_tokens:, extra_tokens:] for one in maps]
    sums = [one.sum(-1, keepdim=True) for one in kept]
    at = torch.arange(left, device=maps[0].device)
    return [a / s.masked_fill(s == 0, 1) for a, s in zip(kept, sums, strict=True)], torch.stack([at // X, at % X], 1)


@CARD.function
def attention_distance(
    attention: Sequence[Float[Tensor, "B _H T T"]], *, grid: Grid = None, extra_tokens: int = 0, patch: float = 1.0
) -> tuple[Float[Tensor, "B _H"], ...]:
    """Mean distance of what each head attends to, for each layer. Queries that see no placed token count as 0.

    Args:
        grid: height and width of the image in patches; None for a sequence, whose tokens are 1 apart.
        extra_tokens: how many tokens before the patches have no place.
        patch: the size of a patch, in pixels if the distances are to be.

    Raises:
        ValueError, TypeError: maps that are not (B, H, T, T) floats, a grid that does not fit.
    """
    number("attention_distance", above=0, patch=patch)
    maps, places = placed("attention_distance", attention, grid, extra_tokens)
    far = patch * torch.cdist(places.to(maps[0]), places.to(maps[0]), compute_mode="donot_use_mm_for_euclid_dist")
    return tuple((one * far).sum(-1).mean(-1) for one in maps)


def aligned_maps(
    attention: Sequence[Float[Tensor, "B _H T T"]], *, grid: Grid = None, extra_tokens: int = 0
) -> tuple[Float[Tensor, "_H U V"], ...]:
    """Each head's mean attention by displacement, the query in the centre (Y - 1, X - 1) of (2 Y - 1, 2 X - 1).

    Sums to 1 where every query sees a placed token. A displacement that few queries have, near the border, has little.

    Args:
        grid, extra_tokens: as in `attention_distance`; a sequence gives one row (1, 2 T - 1).
    """
    maps, places = placed("aligned_maps", attention, grid, extra_tokens)
    return tuple(by_displacement(one.mean(0), places) / len(places) for one in maps)


def displaced(places: Int[Tensor, "P 2"]) -> Float[Tensor, "U V"]:
    """How many queries have a token at each displacement."""
    P = len(places)
    return by_displacement(torch.ones(1, P, P, device=places.device, dtype=torch.float64), places)[0]


def by_displacement(maps: Float[Tensor, "H P P"], places: Int[Tensor, "P 2"]) -> Float[Tensor, "H U V"]:
    """Sums of all pairs (query, key) that are the same step apart."""
    Y, X = (places.amax(0) + 1).tolist()
    step = places - places[:, None] + torch.tensor([Y - 1, X - 1], device=places.device)
    index = (step[..., 0] * (2 * X - 1) + step[..., 1]).flatten()
    sums = maps.new_zeros(len(maps), (2 * Y - 1) * (2 * X - 1))
    return sums.index_add(1, index, maps.flatten(1)).unflatten(1, (2 * Y - 1, 2 * X - 1))
