"""What the heads of a trace do on average, as plain data: a table with one row for each head.

Every number is a mean over the query rows that see anything and belong to a token that some query may see, which
leaves padding out; NaN where one of these rows is no number. Distances and neighbours count positions bottom-right: the
last query stands at the last key.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.inspect.layers import LayerTrace


@dataclass(frozen=True)
class HeadStatistics:
    """One head of one layer. What has no meaning for a layer, such as distance across two texts, is None."""

    layer: int
    """Place in the trace."""
    name: str
    index: int
    kind: str
    side: str
    head: int
    """The model's number of the head."""
    entropy: float
    """In nats."""
    maximum: float
    """The largest weight of a row."""
    first: float
    """Weight on the first token that may be seen."""
    separators: float | None
    """Weight on marks such as [SEP] behind the first token; None where tokens are not known."""
    distance: float | None
    """Mean of |i - j| under the weights."""
    itself: float | None
    previous: float | None
    following: float | None


def head_statistics(
    weights: Float[Tensor, "B H T S"],
    *,
    seen: Bool[Tensor, "B S"],
    marks: Bool[Tensor, "B S"] | None = None,
    aligned: bool = True,
) -> dict[str, Float[Tensor, " H"] | None]:
    """The numbers of `HeadStatistics` for every head.

    Args:
        seen: keys that stand for a token; with `aligned`, the rows of the others don't count.
        marks: keys whose weight is summed as `separators`.
        aligned: queries are the last T of the keys' own tokens.
    """
    T, S = weights.shape[2:]
    j = torch.arange(S, device=weights.device)
    i = torch.arange(S - T, S, device=weights.device)
    rows = (weights != 0).any(-1)  # (B, H, T); NaN is not 0
    if aligned:
        rows = rows & (seen[:, S - T :] if T <= S else seen.any(1, keepdim=True))[:, None]
    count = rows.sum((0, 2)).clamp(min=1)

    def mean(values: Float[Tensor, "B H T"]) -> Float[Tensor, " H"]:
        return values.masked_fill(~rows, 0.0).sum((0, 2)) / count

    first = seen.long().argmax(1)
    off = (i[:, None] - j).to(weights)
    marked = None if marks is None else marks & seen & (j != first[:, None])
    at_first = weights.gather(3, first[:, None, None, None].expand(-1, *weights.shape[1:3], 1))[..., 0]
    found: dict[str, Tensor | None] = {
        "entropy": mean(torch.special.entr(weights).sum(-1)),
        "maximum": mean(weights.amax(-1)),
        "first": mean(at_first),
        "separators": None if marked is None else mean((weights * marked[:, None, None]).sum(-1)),
    }
    for name, at in (("itself", 0), ("previous", 1), ("following", -1)):
        found[name] = mean((weights * (off == at)).sum(-1)) if aligned else None
    found["distance"] = mean((weights * off.abs()).sum(-1)) if aligned else None
    return found


def layer_statistics(
    place: int, layer: LayerTrace, marks: Sequence[Sequence[bool]] | None = None
) -> list[HeadStatistics]:
    """One row for each stored head. `marks`: which of the keys' tokens are separators."""
    B, H, _, S = layer.shape
    seen = torch.ones(B, S, dtype=torch.bool, device=layer.q.device)
    if layer.mask is not None:
        seen = layer.mask.any(2).any(1).expand(B, S)
    known = None if marks is None else torch.tensor(marks, dtype=torch.bool, device=seen.device).view(B, S)
    table = []
    for h in range(H):  # one head's matrix at a time
        weights = layer.weights(heads=h)
        found = head_statistics(weights, seen=seen, marks=known, aligned=layer.kind == "self")
        numbers = {name: None if value is None else float(value[0]) for name, value in found.items()}
        head = layer.heads[h] if layer.heads else h
        table.append(HeadStatistics(place, layer.name, layer.index, layer.kind, layer.side, head, **numbers))  # type: ignore[arg-type]
    return table
