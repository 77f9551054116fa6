"""The best tree of scores between tokens, whose root is token 0 (Chu, Liu and Edmonds' algorithm, by networkx)."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.checks import checked, flag, refuse

WHO = "maximum_spanning_arborescence"


@checked()
def maximum_spanning_arborescence(
    scores: Float[Tensor, "B T T"], keep: Bool[Tensor, "B T"] | None = None, *, single_root: bool = True
) -> Int[Tensor, "B T"]:
    """The head of each token in the tree with the highest sum of scores[dependent, head].

    Arcs of -inf are never chosen. The root and hidden tokens get 0; `scores` is left as it is.

    Args:
        keep: True = a real token; the root must be one where any is.
        single_root: exactly one token hangs from the root.

    Raises:
        ValueError: NaN or +inf between real tokens; no tree without arcs of -inf.
    """
    flag(WHO, single_root=single_root)
    heads = torch.zeros(scores.shape[:2], dtype=torch.long)
    table = scores.detach().to("cpu", torch.float64)
    for b in range(len(scores)):
        real = range(scores.shape[1]) if keep is None else keep[b].nonzero()[:, 0].tolist()
        if len(real) < 2:
            continue
        if real[0] != 0:
            refuse(WHO, "keep", f"hides the root of row {b}", False, "token 0 among the real ones")
        among = table[b][real][:, real]
        if bool((among.isnan() | (among == torch.inf))[1:].any()):
            refuse(WHO, "scores", f"holds what can't be compared in row {b}", "NaN or inf", "finite numbers or -inf")
        for i, j in enumerate(_tree(among, single_root)):
            heads[b, real[i]] = real[j]
    return heads.to(scores.device)


def is_tree(heads: list[int], single_root: bool = True) -> bool:
    """Whether every token leads to token 0 by its heads; heads[0] is not looked at."""
    if single_root and heads[1:].count(0) != 1:
        return False
    for at in range(1, len(heads)):
        for _ in heads:
            at = heads[at] if at else 0
        if at:
            return False
    return True


def _tree(s: Tensor, single_root: bool) -> list[int]:
    """Of one sentence; what each token likes best, if that is a tree already."""
    n = len(s)
    s = s.masked_fill(torch.eye(n, dtype=torch.bool), -torch.inf)
    heads = [0, *s[1:].argmax(-1).tolist()]
    if is_tree(heads, single_root) and bool(s[range(1, n), heads[1:]].isfinite().all()):
        return heads
    heads = _edmonds(s)
    if single_root and heads[1:].count(0) > 1:
        # All trees hang from the root at least once. Where that costs more than all else can gain, once is best.
        finite = s[1:][s[1:].isfinite()]
        s[:, 0] -= n * (finite.max() - finite.min()) + 1
        heads = _edmonds(s)
        if heads[1:].count(0) > 1:
            refuse(WHO, "scores", "allows no tree with a single root", "-inf", "more finite scores")
    return heads


def _edmonds(s: Tensor) -> list[int]:
    try:
        import networkx
    except ImportError as error:
        raise ImportError(f"{WHO} needs networkx: pip install networkx") from error
    graph: Any = networkx.DiGraph()
    graph.add_nodes_from(range(len(s)))
    at = s[1:].isfinite().nonzero()
    graph.add_weighted_edges_from((j, i + 1, float(s[i + 1, j])) for i, j in at.tolist())
    try:
        tree = networkx.maximum_spanning_arborescence(graph)
    except networkx.NetworkXException as error:
        raise ValueError(f"{WHO}: scores allow no tree (got -inf); expected more finite scores") from error
    heads = [0] * len(s)
    for head, dependent in tree.edges:
        heads[dependent] = head
    return heads
