"""Sparse random graphs that are well connected: the edges that Exphormer adds to a graph's own.

d random permutations pi_1 .. pi_d of the nodes give the edges u -> pi_t(u) and back: every node has 2 d of them
gap = second smallest eigenvalue of degree - adjacency; at best about 2 d - 2 sqrt(2 d - 1)
"""

import functools
import math

import torch
from jaxtyping import Int
from torch import Tensor

from regard.checks import whole


def spectral_gap(edge_index: Int[Tensor, "2 E"], num_nodes: int) -> float:
    """The second smallest eigenvalue of degree - adjacency; 0 where the graph falls apart."""
    adjacency = torch.zeros(num_nodes, num_nodes, dtype=torch.float64)
    one = adjacency.new_ones(edge_index.shape[1])
    adjacency = adjacency.index_put((edge_index[0].cpu(), edge_index[1].cpu()), one, accumulate=True)
    laplacian = adjacency.sum(1).diag() - adjacency
    return float(torch.linalg.eigvalsh((laplacian + laplacian.mT) / 2)[1]) if num_nodes > 1 else 0.0


def expander(num_nodes: int, degree: int = 5, *, seed: int = 0, tries: int = 100) -> Int[Tensor, "2 2*degree*N"]:
    """`degree` random permutations of the nodes as edges, both ways: every node has 2 * degree edges in and out.

    Drawn again until the spectral gap is within 0.1 of the best possible for that degree (the best of `tries` draws, if
    none is), for graphs small enough to check; larger ones have such a gap almost surely. Up to 10 nodes: all pairs.
    """
    whole("expander", 0, num_nodes=num_nodes)
    whole("expander", degree=degree, tries=tries)
    node = torch.arange(num_nodes)
    if num_nodes <= 10:
        pairs = torch.cartesian_prod(node, node).mT if num_nodes else node.new_zeros(2, 0)
        return pairs[:, pairs[0] != pairs[1]]
    generator = torch.Generator().manual_seed(seed)
    wanted = max(0.0, 2 * degree - 2 * math.sqrt(2 * degree - 1) - 0.1)
    best, widest = node, -1.0
    for _ in range(tries):
        there = torch.stack([torch.randperm(num_nodes, generator=generator) for _ in range(degree)]).flatten()
        edges = torch.stack([torch.cat([node.repeat(degree), there]), torch.cat([there, node.repeat(degree)])])
        if num_nodes > 1024:
            return edges
        gap = spectral_gap(edges, num_nodes)
        if gap > widest:
            best, widest = edges, gap
        if gap >= wanted:
            break
    return best


@functools.lru_cache(maxsize=64)
def _drawn(num_nodes: int, degree: int, seed: int) -> Int[Tensor, "2 F"]:
    """`expander`, kept for graphs that come again: its spectrum takes longer than the attention."""
    return expander(num_nodes, degree, seed=seed)


def expander_of_graphs(
    num_nodes: int, graph: Int[Tensor, " N"] | None, num_graphs: int, *, degree: int, seed: int
) -> Int[Tensor, "2 F"]:
    """An expander for each graph of a batch, or for all nodes where `graph` is None."""
    if graph is None:
        return _drawn(num_nodes, degree, seed)
    members = [(graph == g).nonzero()[:, 0].cpu() for g in range(num_graphs)]
    return torch.cat([own[_drawn(len(own), degree, seed)] for own in members], 1)


def virtual_edges(
    edge_index: Int[Tensor, "2 E"], num_nodes: int, graph: Int[Tensor, " N"] | None, num_graphs: int, *, virtual: int
) -> Int[Tensor, "2 virtual*N"]:
    """Every node and each virtual node of its graph, of which r * num_graphs + g is the r-th of graph g."""
    node = torch.arange(num_nodes, device=edge_index.device, dtype=edge_index.dtype)
    own = torch.zeros_like(node) if graph is None else graph.to(edge_index)
    first = num_graphs * torch.arange(virtual, device=node.device, dtype=node.dtype)
    return torch.stack([node.repeat(virtual), (first[:, None] + own).flatten()])
