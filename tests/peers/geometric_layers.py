"""What must hold for graph layers, in torch_geometric's own terms: its packages ship no tests of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch_geometric.nn as pyg
from torch import Tensor, nn

EDGES = torch.tensor([[0, 1, 2, 3, 3, 4, 0, 0, 2], [1, 0, 1, 3, 0, 2, 1, 4, 4]])  # a loop, a double edge; 5 is alone
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "gatv2": lambda **o: pyg.GATv2Conv(6, 4, heads=2, **o),
    "gatv2 mean": lambda **o: pyg.GATv2Conv(6, 4, heads=2, concat=False, share_weights=True, **o),
    "gatv2 edges": lambda **o: pyg.GATv2Conv(6, 4, heads=2, edge_dim=3, **o),
    "supergat MX": lambda **o: pyg.SuperGATConv(6, 4, heads=2, **o),
    "supergat SD": lambda **o: pyg.SuperGATConv(6, 4, heads=2, attention_type="SD", concat=False, **o),
    "points": lambda **o: pyg.PointTransformerConv(6, 6, **o),
    "points mlp": lambda **o: pyg.PointTransformerConv(6, 6, attn_nn=nn.Linear(6, 6), **o),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
self_loops = pytest.mark.parametrize("loops", [True, False])


def made(name: str, **options: Any) -> tuple[nn.Module, Tensor, tuple[Tensor, ...]]:
    """The layer, nodes, and what comes after these besides the edges."""
    torch.manual_seed(0)
    layer = LAYERS[name](**options).double().eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(6, 6, dtype=torch.float64)
    return layer, x, (torch.randn(6, 3, dtype=torch.float64),) if "points" in name else ()


def run(layer: nn.Module, x: Tensor, more: tuple[Tensor, ...], edges: Tensor = EDGES) -> Tensor:
    if getattr(layer, "edge_dim", None):
        of_edges = torch.stack([edges[0], edges[1], edges.sum(0)], 1).to(x.dtype) / 6
        return layer(x, edges, of_edges)
    return layer(x, *more, edges)


@every_layer
@self_loops
def test_equals_the_package(name: str, loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients; without regard this compares the layer with itself."""
    layer, x, more = made(name, add_self_loops=loops)
    wanted = [x.requires_grad_(), *layer.parameters()]
    found = []
    for forward in (type(layer).forward, getattr(type(layer), "theirs", type(layer).forward)):
        monkeypatch.setattr(type(layer), "forward", forward)
        out = run(layer, x, more)
        found.append([out, *torch.autograd.grad(out.sin().sum(), wanted)])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@every_layer
def test_gradients(name: str) -> None:
    layer, x, more = made(name)
    assert torch.autograd.gradcheck(lambda x: run(layer, x, more), x.requires_grad_())


@every_layer
def test_the_order_of_edges_does_not_matter(name: str) -> None:
    layer, x, more = made(name)
    torch.testing.assert_close(run(layer, x, more, EDGES.flip(1)), run(layer, x, more))


@every_layer
def test_other_names_of_nodes_give_the_same(name: str) -> None:
    if name == "gatv2 edges":
        pytest.skip("its edge features are made of the names")
    layer, x, more = made(name)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    got = run(layer, x[order], tuple(t[order] for t in more), order.argsort()[EDGES])
    torch.testing.assert_close(got, run(layer, x, more)[order])


@every_layer
def test_nodes_see_only_their_neighbours(name: str) -> None:
    layer, x, more = made(name)
    moved = run(layer, x.clone().index_fill_(0, torch.tensor(4), 9.0), more)
    changed = (moved != run(layer, x, more)).any(1).nonzero()[:, 0].tolist()
    assert changed == [2, 4]


def test_a_model_of_two_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own model, trained for a few steps."""
    losses = []
    for forward in (pyg.GATv2Conv.forward, getattr(pyg.GATv2Conv, "theirs", pyg.GATv2Conv.forward)):
        monkeypatch.setattr(pyg.GATv2Conv, "forward", forward)
        torch.manual_seed(0)
        model = pyg.GAT(6, 8, num_layers=2, out_channels=3, v2=True, heads=2).double()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        x, target = torch.randn(6, 6, dtype=torch.float64), torch.arange(6) % 3
        for _ in range(5):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x, EDGES), target)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)
    assert losses[0] < 1.2
