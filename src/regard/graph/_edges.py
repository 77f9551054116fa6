"""What every graph mechanism does with edges: check them, add loops, softmax and sum over a node's incoming ones.

`edge_index[0]` holds the sources j, `edge_index[1]` the targets i (torch_geometric's convention). A pair that appears
twice counts twice. All is linear in the number of edges; no N x N matrix is ever made.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.checks import fits, refuse
from regard.tracing import readable


def check_edges(who: object, edge_index: Int[Tensor, "2 E"], sources: int, targets: int) -> None:
    """Raises unless edge_index is an integer tensor (2, E) that names nodes which exist."""
    fits(who, "2 E", edge_index=edge_index)
    if edge_index.dtype not in (torch.int32, torch.int64):
        refuse(
            who, "edge_index", "has the wrong dtype", edge_index.dtype, "torch.int32 or torch.int64", error=TypeError
        )
    # Reading values would break a compiled graph in two; a wrong index then fails in the gather instead.
    if not edge_index.shape[1] or not readable(edge_index):
        return
    (low_source, low_target), (high_source, high_target) = (z.tolist() for z in edge_index.aminmax(dim=1))
    if low_source < 0 or high_source >= sources or low_target < 0 or high_target >= targets:
        got = f"sources {low_source} to {high_source} and targets {low_target} to {high_target}"
        refuse(who, "edge_index", "names unknown nodes", got, f"0 to {sources - 1} and 0 to {targets - 1}")


def check_features(who: object, features: Float[Tensor, "E W"] | None, width: int | None) -> None:
    """Raises unless there are edge features of that width where the layer was built for some, and only there."""
    if (features is None) != (width is None):
        got = "none" if features is None else f"some of shape {tuple(features.shape)}"
        refuse(who, "edge_features", "don't go with the layer", got, f"what edge_dim={width} takes")
    if features is not None and width is not None:
        fits(who, "E W", {"W": width}, edge_features=features)


def check_graph(who: object, graph: Int[Tensor, " N"] | None, num_graphs: int) -> None:
    """Raises unless graph tells which of the graphs nodes are in; None will do for one graph."""
    if graph is None:
        if num_graphs != 1:
            refuse(who, "graph", "must tell which graph each node is in", None, f"a number for each, of {num_graphs}")
        return
    if readable(graph) and bool(((graph < 0) | (graph >= num_graphs)).any()):
        refuse(who, "graph", "names unknown graphs", graph.unique().tolist(), f"0 to {num_graphs - 1}")


def with_loops(edge_index: Int[Tensor, "2 E"], num_nodes: int) -> tuple[Int[Tensor, "2 E+N"], Bool[Tensor, " E+N"]]:
    """The edges, one loop per node at the end, and which edges count: loops that were there before do not.

    They stay in the list, unused, so that shapes depend on no values and the layer compiles to one graph.
    """
    node = torch.arange(num_nodes, device=edge_index.device, dtype=edge_index.dtype)
    edges = torch.cat([edge_index, node.expand(2, -1)], 1)
    keep = torch.cat([edge_index[0] != edge_index[1], torch.ones_like(node, dtype=torch.bool)])
    return edges, keep


def edge_sum(values: Float[Tensor, " E *W"], target: Int[Tensor, " E"], num_nodes: int) -> Float[Tensor, " N *W"]:
    """The sum over the edges into each node; 0 for a node without any."""
    return values.new_zeros(num_nodes, *values.shape[1:]).index_add(0, target, values)


def edge_mean(
    values: Float[Tensor, "E W"], target: Int[Tensor, " E"], num_nodes: int, keep: Bool[Tensor, " E"]
) -> Float[Tensor, "N W"]:
    """The mean over the edges into each node that count; 0 for a node without any."""
    count = edge_sum(keep.to(values.dtype), target, num_nodes).clamp_min(1)
    return edge_sum(values.masked_fill(~keep[:, None], 0), target, num_nodes) / count[:, None]


def edge_softmax(
    scores: Float[Tensor, " E *W"],
    target: Int[Tensor, " E"],
    num_nodes: int,
    keep: Bool[Tensor, " E"] | None = None,
) -> Float[Tensor, " E *W"]:
    """Weights that sum to 1 over the edges into each node, in at least fp32; 0 for an edge that doesn't count."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if keep is not None:
        scores = scores.masked_fill(~keep.reshape(-1, *(1,) * (scores.ndim - 1)), -torch.inf)
    index = target.long().reshape(-1, *(1,) * (scores.ndim - 1)).expand_as(scores)
    # The largest score only keeps exp in range: the weights do not depend on it, so neither do their gradients.
    largest = scores.new_full((num_nodes, *scores.shape[1:]), -torch.inf)
    largest = largest.scatter_reduce(0, index, scores.detach(), "amax")
    largest = largest.masked_fill(largest == -torch.inf, 0)
    p = (scores - largest[target]).exp()
    total = edge_sum(p, target, num_nodes)
    return p / total.masked_fill(total == 0, 1)[target]
