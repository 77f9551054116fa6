"""Transition-aware distillation: item embeddings learn which items follow which, as counted in all sequences.

The paper, and what was read of it, stand on the card of `regard.mixers.window_query`.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.checks import checked, number, refuse, whole


def transition_counts(
    sequences: Iterable[Sequence[int] | Int[Tensor, " T"]], num_items: int, span: int = 1
) -> Float[Tensor, "N N"]:
    """How often item j comes within `span` steps after item i, in float64; numbers that are no items are left out."""
    whole("transition_counts", num_items=num_items, span=span)
    counts = torch.zeros(num_items, num_items, dtype=torch.float64)
    for sequence in sequences:
        row = torch.as_tensor(sequence).long()
        row = row[(row >= 0) & (row < num_items)]
        for step in range(1, min(span, len(row) - 1) + 1):
            pairs = (row[:-step], row[step:])
            counts.index_put_(pairs, torch.ones(len(row) - step, dtype=torch.float64), accumulate=True)
    return counts


def transition_labels(transitions: Float[Tensor, "N N"], temperature: float = 0.1) -> Float[Tensor, "N N"]:
    """softmax of each row's counts, as shares of its largest; even where nothing follows."""
    number("transition_labels", above=0, temperature=temperature)
    top = transitions.amax(-1, keepdim=True)
    return (transitions / torch.where(top > 0, top, 1.0) / temperature).softmax(-1)


@checked()
def transition_distillation(
    embedding: Float[Tensor, "N M"],
    items: Int[Tensor, "..."],
    transitions: Float[Tensor, "N N"],
    temperature: float = 0.1,
    *,
    asking: Float[Tensor, "N M"] | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of softmax(sqrt(M) E_i . E_j / temperature) against the labels, a mean over the batch's items.

    Args:
        items: the batch's, of any shape; numbers that are no items, such as padding, are left out.
        transitions: `transition_counts`; no gradient reaches them.
        asking: E_i after dropout, where it has one.
    """
    N, M = embedding.shape
    number("transition_distillation", above=0, temperature=temperature)
    if not bool((transitions >= 0).all()):
        refuse("transition_distillation", "transitions", "has negative counts", float(transitions.min()), "counts >= 0")
    items = items[(items >= 0) & (items < N)].long()
    labels = transition_labels(transitions.detach().to(embedding.dtype), temperature)[items]
    scores = (embedding if asking is None else asking)[items] @ embedding.mT * (M**0.5 / temperature)
    return -(labels * scores.log_softmax(-1)).sum() / max(1, len(items))
