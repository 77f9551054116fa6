"""Attention weights of graph layers: which weight belongs to which edge."""

import inspect
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.checks import refuse
from regard.inspect.effective import undisturbed
from regard.kinds import EdgeWeights

WHO = "edge_weights"


def edge_weights(
    layer: nn.Module, nodes: Float[Tensor, "N M"], edge_index: Int[Tensor, "2 E"], **more: Any
) -> EdgeWeights:
    """The weight of every edge, `weights[:given]` in the order of `edge_index`; the layer's own training mode doesn't
    count.

    They are those by which the layer sums its values, (F, H), or (F, C) where each channel has its own: over the edges
    into a node they sum to 1, up to what a mechanism adds to its divisor. An edge that is there twice has a weight for
    each. Edges that the layer adds follow the given ones, such as a loop at each node; a given loop that such a one
    replaces has weight 0. The layer's own method `edge_weights` says which they are; its weights take gradients.

    Args:
        layer: a graph mechanism, as `regard.create` makes them, or any module with the method of `kinds.EdgeWeigher`.
        more: what else the layer takes, by its name there: edge features, positions, which graph a node is in.

    Raises:
        TypeError: a layer of another kind, or arguments that it doesn't take or lacks.
        ValueError: whatever the layer's forward refuses.
    """
    if not _tells(layer):
        wanted = "a graph mechanism of regard, or a module with a method edge_weights beside its forward"
        refuse(WHO, "layer", "tells no weights of edges", type(layer).__name__, wanted, error=TypeError)
    tell: Any = layer.edge_weights
    try:
        inspect.signature(tell).bind(nodes, edge_index, **more)
    except TypeError as error:
        names = ", ".join(list(inspect.signature(tell).parameters)[2:]) or "nothing"
        refuse(WHO, "more", f"doesn't suit {type(layer).__name__}: {error}", sorted(more), names, error=TypeError)
    with torch.no_grad(), undisturbed(layer):
        found: EdgeWeights = tell(nodes, edge_index, **more)
        return found


def _tells(layer: object) -> bool:
    """Whether the layer has weights to tell, and its forward is the one that they are those of."""
    for kind in type(layer).__mro__:  # a class with a forward of its own that takes over older weights tells of another
        if "edge_weights" in vars(kind) or "forward" in vars(kind):
            return "edge_weights" in vars(kind) and isinstance(layer, nn.Module)
    return False
