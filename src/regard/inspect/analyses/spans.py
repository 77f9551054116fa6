"""Span attention: how much each head's queries in one marked span give to the keys in another.

In the paper the query is the last token, the span is the instruction, and the mean over chosen heads is the focus
score: `span_attention(maps, keys=[instruction], queries=[(-1, None)])`.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import checked, refuse
from regard.inspect.analyses._maps import all_heads

CARD = Card(
    "span_attention",
    equation="mass[p, r] = mean over queries i in span p of sum_(j in span r) A_ij        per key: mass / |r|",
    papers=(
        Paper(
            "Attention Tracker: Detecting Prompt Injection Attacks in LLMs",
            "Hung, Ko, Rawat, Chung, Hsu, Chen",
            2024,
            "2411.00348",
            "abstract",
        ),
    ),
    protocol="Analysis",
    supports=set(),
    cost=Cost("B*H*T*S", ""),
    claim="Some heads' last token keeps to the instruction: a head that reads the marked span is told from all "
    "others: tests/inspect/analyses/test_spans.py::test_tells_who_reads_the_instruction.",
    verified="reconstructed",
)

Span = tuple[int, int | None]
"""From the first token to before the last, as in slices: (-1, None) is the last token."""


@CARD.function
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


@checked()
def spans_of(mask: Bool[Tensor, " T"]) -> list[Span]:
    """The runs of marked tokens."""
    edges = torch.nn.functional.pad(mask.int(), (1, 1)).diff()
    return list(zip((edges == 1).nonzero().flatten().tolist(), (edges == -1).nonzero().flatten().tolist(), strict=True))


def _members(what: str, spans: Sequence[Span], length: int, like: Tensor) -> Float[Tensor, "P T"]:
    """1 for the tokens of each span."""
    if not spans:
        refuse("span_attention", what, "is empty", spans, "one span at least")
    members = like.new_zeros(len(spans), length)
    for row, (start, stop) in zip(members, spans, strict=True):
        bounds = (start, length if stop is None else stop)
        if any(not -length <= b <= length for b in bounds) or not row[slice(start, stop)].numel():
            wanted = f"a token at least, of {length}"
            refuse("span_attention", what, "has a span that is empty or out of range", (start, stop), wanted)
        row[slice(start, stop)] = 1
    return members
