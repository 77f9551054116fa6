"""Pairs of nodes that no edge joins: what a loss sets against a graph's edges."""

import torch
from jaxtyping import Int
from torch import Tensor


def sample_non_edges(
    edge_index: Int[Tensor, "2 E"], num_nodes: int, count: int, *, generator: torch.Generator
) -> Int[Tensor, "2 F"]:
    """`count` different ordered pairs of different nodes that no edge joins in either direction; fewer if there are not
    so many."""
    j, i = edge_index.to(generator.device, torch.int64)
    loops = torch.arange(num_nodes, device=generator.device) * (num_nodes + 1)
    taken = torch.cat([j * num_nodes + i, i * num_nodes + j, loops]).unique()
    free = num_nodes * num_nodes - len(taken)
    if 2 * count >= free:  # few are left: list them
        found = torch.ones(num_nodes * num_nodes, dtype=torch.bool, device=generator.device)
        found = found.index_fill(0, taken, False).nonzero()[:, 0]
    else:
        found = taken[:0]
        while len(found) < count:
            draw = torch.randint(num_nodes * num_nodes, (2 * count,), generator=generator, device=generator.device)
            found = torch.cat([found, draw[~torch.isin(draw, taken)]]).unique()
    order = torch.randperm(len(found), generator=generator, device=generator.device)
    found = found[order[:count]].to(edge_index.device)
    return torch.stack([found // num_nodes, found % num_nodes])
