"""Attention flow: the greatest flow from each position to each input token, weights as capacities.

The flow is found on whole numbers (capacities times 2^30, rounded), and what is returned is the capacity of the cut
that it finds, in float64. So it is exact unless two cuts are closer than the rounding; then it is too great by no more
than 2^-30 for each edge of the cut.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from regard.cards import Card, Cost, Paper
from regard.checks import refuse, whole
from regard.inspect.analyses.rollout import passed_on

CARD = Card(
    "attention_flow",
    equation="""nodes (l, i) for l = 0 (the inputs) .. L      edge (l+1, i) -> (l, j) of capacity R_l[i, j] of rollout
f_l[i, j] = max-flow from (l+1, i) to (0, j) alone        flow_l[i, j] = f_l[i, j] / sum_j' f_l[i, j']""",
    papers=(
        Paper(
            "Quantifying Attention Flow in Transformers",
            "Abnar, Zuidema",
            2020,
            "2005.00928",
            "abstract; the authors' code (attention_graph_util.py), which divides the rows by their sums too",
        ),
    ),
    protocol="Analysis",
    supports=set(),
    cost=Cost("B*T**4", ""),
    claim="Complements rollout: on a path 3 -> 1 -> 0 token 3 gets 8 times the flow of unrelated tokens: "
    "tests/inspect/analyses/test_flow.py::test_finds_a_path_that_raw_attention_does_not_show.",
    verified="third-party",
)

SCALE = 2**30
"""The flow of one source is at most its capacity, about 1: it stays below 2^31, the greatest of scipy's integers."""


@CARD.function
def attention_flow(
    attention: Sequence[Float[Tensor, "B _H T T"]],
    *,
    residual: float = 0.5,
    layers: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
) -> Float[Tensor, "L B R T"]:
    """How much of input token j can flow into position i after each layer. Rows sum to 1.

    One max-flow problem for each layer, sequence, row and input token, on a graph of L T^2 edges: ask for few rows of
    long sequences.

    Args:
        attention: the weights of each layer, the one next to the input first.
        residual: the share that goes around the attention.
        layers: after which layers; default all. Negative ones count from the last.
        rows: which positions i; default all. Negative ones count from the last.

    Raises:
        ValueError, TypeError: maps that are not (B, H, T, T) floats, negative or NaN weights, what is out of range.
        ImportError: scipy is missing.
    """
    steps = passed_on("attention_flow", attention, residual, "mean")
    B, T = steps[0].shape[:2]
    asked = _asked("layers", layers, len(steps)), _asked("rows", rows, T)
    for layer, maps in enumerate(attention):
        if bool((wrong := ~((maps >= 0) & maps.isfinite())).any()):
            got = float(maps[wrong][0])
            refuse(
                "attention_flow",
                f"attention[{layer}]",
                "has weights that are negative, NaN or infinite",
                got,
                "finite ones >= 0",
            )
    capacity = torch.stack(steps, 1).detach().double().cpu().numpy()
    found = np.stack([_flows(capacity[b], *asked) for b in range(B)], axis=1)
    flow = torch.from_numpy(found)
    return (flow / flow.sum(-1, keepdim=True)).to(steps[0])


def _asked(what: str, chosen: Sequence[int] | None, size: int) -> list[int]:
    if chosen is None:
        return list(range(size))
    if not chosen:
        refuse("attention_flow", what, "is empty", chosen, "one number at least, or None for all")
    for n, c in enumerate(chosen):
        whole("attention_flow", -size, most=size - 1, **{f"{what}[{n}]": c})
    return [c % size for c in chosen]


def _flows(capacity: np.ndarray, layers: list[int], rows: list[int]) -> np.ndarray:
    """(layers, rows, T): the greatest flows of one sequence; capacity is (L, T, T)."""
    try:
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import breadth_first_order, maximum_flow
    except ImportError as error:
        raise ImportError('attention_flow needs scipy: pip install "regard[inspect]"') from error
    T = capacity.shape[-1]
    found = np.zeros((len(layers), len(rows), T))
    for at, layer in enumerate(layers):
        below, shape = capacity[: layer + 1], ((layer + 2) * T,) * 2  # levels above the source are left out
        level, i, j = np.nonzero(below)
        whole = np.rint(below[level, i, j] * SCALE).astype(np.int32)
        graph = csr_array((whole, ((level + 1) * T + i, level * T + j)), shape=shape)
        for nth, row in enumerate(rows):
            source = (layer + 1) * T + row
            for sink in range(T):
                left = csr_array(graph - maximum_flow(graph, source, sink).flow)
                left.eliminate_zeros()
                reached = breadth_first_order(left, source, return_predecessors=False)
                inside = np.zeros(shape[0])
                inside[reached] = 1
                inside = inside.reshape(layer + 2, T)
                found[at, nth, sink] = np.einsum("li,lij,lj->", inside[1:], below, 1 - inside[:-1])
    return found
