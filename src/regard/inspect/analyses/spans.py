"""Attention between marked spans: how much each head's queries in one span give to the keys in another.

    mass[p, r] = mean over queries i in span p of sum_(j in span r) A_ij        per key: mass / |r|

Hung, Ko, Rawat, Chung, Hsu, Chen 2024, "Attention Tracker: Detecting Prompt Injection Attacks in LLMs"
(https://arxiv.org/abs/2411.00348): abstract read. There the query is the last token, the span is the instruction, and
its mean over chosen heads is the focus score: `span_attention(maps, keys=[instruction], queries=[(-1, None)])`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard._former import Card, Cost, Paper, register
from regard.inspect.analyses._maps import all_heads

Span = tuple[int, int | None]
"""From the first token to before the last, as in slices: (-1, None) is the last token."""


def span_attention(
    attention: Sequence[Float[Tensor, "B H T S"]],
    keys: Sequence[Span],
    *,
    queries: Sequence[Span] | None = None,
    per_key: bool = False,
) -> Float[Tensor, "L B H P R"]:
    """How much queries of each span give to the keys of each.

    Args:
        attention: the weights of each layer, with as many heads in all.
        keys: R spans of keys, the same in all sequences.
        queries: P spans of queries; default those of the keys.
        per_key: divide by the number of keys, so that spans of different length compare.

    Raises:
        ValueError, TypeError: maps that are not (B, H, T, S) floats, spans that are empty or out of range.
    """
    maps = all_heads("span_attention", attention)
    T, S = maps.shape[-2:]
    rows = _members("queries", keys if queries is None else queries, T, maps)
    columns = _members("keys", keys, S, maps)
    mass = torch.einsum("lbhts,pt,rs->lbhpr", maps, rows / rows.sum(1, keepdim=True), columns)
    return mass / columns.sum(1) if per_key else mass


def spans_of(mask: Bool[Tensor, "T"]) -> list[Span]:
    """The runs of marked tokens."""
    if mask.dim() != 1 or mask.dtype != torch.bool:
        raise ValueError(f"spans_of: mask is {mask.dtype} {tuple(mask.shape)}; expected bool (T,)")
    edges = torch.nn.functional.pad(mask.int(), (1, 1)).diff()
    return list(zip((edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist(), strict=True))


def _members(what: str, spans: Sequence[Span], length: int, like: Tensor) -> Float[Tensor, "P T"]:
    """1 for the tokens of each span."""
    if not spans:
        raise ValueError(f"span_attention: no spans of {what}; expected one at least")
    members = like.new_zeros(len(spans), length)
    for row, (start, stop) in zip(members, spans, strict=True):
        bounds = (start, length if stop is None else stop)
        if any(not -length <= b <= length for b in bounds) or not row[slice(start, stop)].numel():
            raise ValueError(f"span_attention: the span {(start, stop)} of {what} is empty or beyond {length} tokens")
        row[slice(start, stop)] = 1
    return members


CARD = register(
    Card(
        name="span_attention",
        family="inspect",
        gist="How much each head's queries in one marked span give to the keys in another.",
        equation="mass[p, r] = mean over queries i in span p of sum_(j in span r) A_ij",
        paper=Paper(
            "Attention Tracker: Detecting Prompt Injection Attacks in LLMs",
            "Hung, Ko, Rawat, Chung, Hsu, Chen",
            2024,
            "2411.00348",
            "abstract",
        ),
        build=span_attention,
        protocol="Analysis",
        supports=frozenset(),
        cost=Cost("B*H*T*S", ""),
        claim="Some heads' last token keeps to the instruction: a head that reads the marked span is told from all "
        "others in tests/inspect/analyses/test_spans.py.",
        verified="reconstructed",
    )
)
