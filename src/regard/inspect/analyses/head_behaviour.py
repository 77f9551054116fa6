"""Head behaviour: whom each head attends to, at which offset, how broadly, and which are alike.

The small uniform part keeps the logarithms finite. Means are taken in each sequence first, then over sequences.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import checked, refuse, whole
from regard.inspect.analyses._maps import all_heads, marks

CARD = Card(
    "head_behaviour",
    equation="""mass = mean over queries of sum_(j marked) A_ij        offset d: mean_i A_(i, i+d)
entropy = mean_i -sum_j a ln a, a = 0.9999 A_ij + 0.0001 / T
distance of two heads = sum over tokens of JS(a_i, a'_i), a = 0.999 A_ij + 0.001 / T""",
    papers=(
        Paper(
            "What Does BERT Look At? An Analysis of BERT's Attention",
            "Clark, Khandelwal, Levy, Manning",
            2019,
            "1906.04341",
            "abstract; the authors' code of sections 3 and 6 (General_Analysis.ipynb, head_distances.py)",
        ),
    ),
    protocol="Analysis",
    supports=set(),
    cost=Cost("B*H**2*T**2", ""),
    claim="Heads attend to delimiters, to fixed offsets or broadly: heads made so are told apart: "
    "tests/inspect/analyses/test_head_behaviour.py::test_heads_of_known_kinds_are_told_apart.",
    differs=(
        "Padding is left out by `valid`.",
        "Heads are embedded by SMACOF from classical scaling, not from random starts.",
        '"Broad" is a share of the uniform entropy, theirs 3.8 nats on 128 tokens.',
    ),
    verified="reconstructed",
)

Maps = Sequence[Float[Tensor, "B H T T"]]
Tokens = Bool[Tensor, "B T"] | None

ELEMENTS = 1 << 22
"""How many weights of pairs of heads are held at once."""


class HeadBehaviour(NamedTuple):
    """Means over queries, for each of L layers and H heads."""

    itself: Float[Tensor, "L H"]
    previous: Float[Tensor, "L H"]
    following: Float[Tensor, "L H"]
    delimiters: Float[Tensor, "L H"]
    """Weight on the tokens marked as delimiters; 0 where none are."""
    entropy: Float[Tensor, "L H"]
    uniform: Float[Tensor, ""]
    """The entropy of uniform attention, mean over sequences."""

    def names(self, *, position: float = 0.5, delimiter: float = 0.6, broad: float = 0.78) -> list[list[str]]:
        """[layer][head]: 'next', 'previous', 'broad', 'delimiter': the last that holds, as the authors colour them; ''.

        'no number' where a head has weights that are NaN.

        Args:
            position, delimiter: mean weights above which a head is named so.
            broad: share of the uniform entropy; 0.78 is their 3.8 nats on 128 tokens.
        """
        rules = {
            "next": self.following > position,
            "previous": self.previous > position,
            "broad": self.entropy > broad * self.uniform,
            "delimiter": self.delimiters > delimiter,
        }
        rules["no number"] = ~self.entropy.isfinite()
        L, H = self.entropy.shape
        return [[next((n for n in reversed(rules) if rules[n][at, h]), "") for h in range(H)] for at in range(L)]


@CARD.function
def head_behaviour(attention: Maps, *, delimiters: Tokens = None, valid: Tokens = None) -> HeadBehaviour:
    """The statistics by which heads are told apart.

    Args:
        attention: the weights of each layer, (B, H, T, T), as many heads in all.
        delimiters: which tokens are [SEP] and the like.
        valid: which tokens are no padding; default all.
    """
    maps = all_heads("head_behaviour", attention, "B H T T")
    B, T = maps.shape[1], maps.shape[-1]
    keep = marks("head_behaviour", "valid", valid, B, T, maps)
    marked = torch.zeros_like(keep)
    if delimiters is not None:
        marked = marks("head_behaviour", "delimiters", delimiters, B, T, maps)
    return HeadBehaviour(
        itself=attention_at_offset(attention, 0, valid=valid),
        previous=attention_at_offset(attention, -1, valid=valid),
        following=attention_at_offset(attention, 1, valid=valid),
        delimiters=attention_mass(attention, marked, valid=valid),
        entropy=attention_entropy(attention, valid=valid),
        uniform=keep.sum(-1).to(maps.dtype).log().mean(),
    )


def attention_mass(
    attention: Sequence[Float[Tensor, "B H T S"]],
    keys: Bool[Tensor, "B S"],
    *,
    queries: Tokens = None,
    valid: Tokens = None,
) -> Float[Tensor, "L H"]:
    """How much of their attention queries give to the marked keys.

    Args:
        keys: the marked keys.
        queries: whose attention is meant; default all. Sequences without any are left out of the mean.
        valid: which queries are no padding; default all.
    """
    maps = all_heads("attention_mass", attention)
    _, B, _, T, S = maps.shape
    keys = marks("attention_mass", "keys", keys, B, S, maps)
    rows = marks("attention_mass", "queries", queries, B, T, maps) & marks("attention_mass", "valid", valid, B, T, maps)
    if not bool(rows.any()):
        refuse("attention_mass", "queries", "marks no token", "none", "one at least")
    return _mean(maps.masked_fill(~keys[:, None, None], 0).sum(-1), rows)


def attention_at_offset(attention: Maps, offset: int, *, valid: Tokens = None) -> Float[Tensor, "L H"]:
    """How much queries attend to the token `offset` further on (-1: the one before); those without one count as 0."""
    maps = all_heads("attention_at_offset", attention, "B H T T")
    B, T = maps.shape[1], maps.shape[-1]
    whole("attention_at_offset", 1 - T, most=T - 1, offset=offset)
    keep = marks("attention_at_offset", "valid", valid, B, T, maps)
    found = maps.new_zeros(maps.shape[:-1])
    found[..., max(0, -offset) : T - max(0, offset)] = maps.diagonal(offset, dim1=-2, dim2=-1)
    return _mean(found, keep)


def attention_entropy(attention: Maps, *, queries: Tokens = None, valid: Tokens = None) -> Float[Tensor, "L H"]:
    """How broadly queries attend, in nats. The greatest is the log of the number of tokens.

    Args:
        queries: whose attention is meant, say [CLS] alone; default all.
        valid: which tokens are no padding; default all.
    """
    maps = all_heads("attention_entropy", attention, "B H T T")
    B, T = maps.shape[1], maps.shape[-1]
    keep = marks("attention_entropy", "valid", valid, B, T, maps)
    rows = marks("attention_entropy", "queries", queries, B, T, maps) & keep
    return _mean(torch.special.entr(_smoothed(maps, keep, 1e-4)).sum(-1), rows)


def head_distances(attention: Maps, *, valid: Tokens = None) -> Float[Tensor, "N N"]:
    """Jensen-Shannon divergence of every two heads, summed over all tokens, heads numbered layer by layer: N = L H."""
    maps = all_heads("head_distances", attention, "B H T T")
    L, B, H, T, _ = maps.shape
    keep = marks("head_distances", "valid", valid, B, T, maps)
    # JS(p, q) = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2; rows of padding are 0 and count nothing.
    rows = _smoothed(maps, keep, 1e-3).transpose(1, 2).reshape(L * H, B * T, T)[:, keep.flatten()]
    own = torch.special.entr(rows).sum((-1, -2))
    mixed = rows.new_zeros(L * H, L * H)
    for part in rows.split(max(1, ELEMENTS // ((L * H) ** 2 * T)), dim=1):
        mixed += torch.special.entr((part[:, None] + part) / 2).sum((-1, -2))
    distances = mixed - (own[:, None] + own) / 2
    return distances.fill_diagonal_(0).clamp_min(0)


@checked()
def embed_heads(distances: Float[Tensor, "N N"], *, dims: int = 2, steps: int = 300) -> Float[Tensor, "N K"]:
    """Points whose distances are as close to these as can be found: multidimensional scaling by SMACOF.

    Args:
        dims: K, of the space.
        steps: of majorisation, each of which lowers the squared error.
    """
    N = len(distances)
    if not bool(torch.allclose(distances, distances.mT)):
        apart = float((distances - distances.mT).abs().max())
        refuse("embed_heads", "distances", "is not symmetric", f"entries {apart:g} apart", "the same both ways")
    whole("embed_heads", most=N, dims=dims)
    target = distances.double()
    centred = target.square()
    centred = centred - centred.mean(0) - centred.mean(1, keepdim=True) + centred.mean()
    values, vectors = torch.linalg.eigh(-centred / 2)
    points = vectors[:, -dims:].flip(-1) * values[-dims:].flip(0).clamp_min(0).sqrt()
    for _ in range(steps):
        now = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist")
        pull = -torch.where(now > 0, target / now.clamp_min(torch.finfo(now.dtype).tiny), 0)
        pull = pull - torch.diag(pull.sum(1))
        points = pull @ points / N
    return points.to(distances.dtype)


def _smoothed(maps: Tensor, keep: Tensor, share: float) -> Tensor:
    """(1 - share) A + share / T among the valid keys; 0 in rows and columns of padding."""
    pairs = keep[:, None, :, None] & keep[:, None, None, :]
    count = keep.sum(-1)[:, None, None, None]
    return ((1 - share) * maps + share / count).masked_fill(~pairs, 0)


def _mean(found: Float[Tensor, "L B H T"], rows: Bool[Tensor, "B T"]) -> Float[Tensor, "L H"]:
    """Over the marked rows of each sequence, then over the sequences that have any."""
    counts = rows.sum(-1)
    sums = found.masked_fill(~rows[:, None], 0).sum(-1) / counts.clamp_min(1)[:, None]
    return sums.sum(1) / (counts > 0).sum()
