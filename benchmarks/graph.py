"""Graph attention (GATv2) against torch_geometric's layer with the same weights.

python -m benchmarks.graph
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from benchmarks.harness import Benchmark, Run, able, agree, command, compared, forward_backward, race
from regard.graph.gatv2 import GATv2


def package(ours: GATv2) -> nn.Module:
    """Its layer with our weights."""
    from torch_geometric.nn import GATv2Conv

    assert ours.target_proj is not None
    theirs = GATv2Conv(ours.dim, ours.head_dim, ours.num_heads)
    theirs.lin_l.load_state_dict(ours.source_proj.state_dict())
    theirs.lin_r.load_state_dict(ours.target_proj.state_dict())
    with torch.no_grad():
        theirs.att.copy_(ours.a[None])
        theirs.bias.copy_(ours.bias)
    return theirs


def measure(
    *, repeats: int, sizes: Sequence[tuple[int, int]] = ((2_000, 20_000), (20_000, 200_000)), dim: int = 64
) -> Benchmark:
    torch.manual_seed(0)
    shape = {"(N, E)": [list(size) for size in sizes], "H": 4, "M": dim, "dtype": "fp32"}
    result = Benchmark("graph", "GATv2 against torch_geometric", shape=shape)
    ours = GATv2(dim, 4)
    for nodes, edges in sizes:
        x, edge_index = torch.randn(nodes, dim), torch.randint(nodes, (2, edges))
        z = x.clone().requires_grad_()
        with torch.no_grad():
            contenders: dict[str, Run] = {"regard": partial(ours, x, edge_index)}
            others, why = able({"package": lambda x=x, e=edge_index: partial(package(ours), x, e)})
            for run in others.values():
                agree(run(), contenders["regard"](), within=1e-4)
            times = race(contenders | others, repeats=repeats, seconds=6)
        what = f"N = {nodes}, E = {edges}: times faster than torch_geometric"
        result.add(compared(what, times, "regard", "package", why=why, better="higher"))
        training: dict[str, Run] = {"regard": forward_backward(partial(ours, z, edge_index), z)}
        peer = {"package": lambda z=z, e=edge_index: forward_backward(partial(package(ours), z, e), z)}
        others, why = able(peer)
        for run in others.values():
            agree(run()[0], training["regard"]()[0])
        times = race(training | others, repeats=repeats, seconds=6)
        what += ", forward and backward"
        result.add(compared(what, times, "regard", "package", why=why, better="higher"))
    return result


if __name__ == "__main__":
    command(measure, __doc__)
