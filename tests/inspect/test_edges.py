"""The weights of a graph layer's edges: they make its output, stand in the order given, and are torch_geometric's."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import regard
from regard.graph._edges import edge_sum
from regard.graph.exphormer import Exphormer
from regard.graph.gatv2 import GATv2
from regard.graph.point_transformer import PointTransformer
from regard.graph.supergat import SuperGAT
from regard.kinds import EdgeWeigher, EdgeWeights
from regard.laws.subject import perturb

N, M, H = 7, 6, 2
EDGES = torch.tensor([[0, 1, 2, 3, 3, 4, 0, 0, 2], [1, 0, 1, 3, 0, 2, 1, 4, 4]])
"""A loop (at 3), a double edge (0 to 1), nodes 5 and 6 without any."""
GRAPHS = {"graph": torch.tensor([0, 0, 0, 0, 0, 1, 1]), "num_graphs": 2}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


NODES, POS, FEATURES = normal(1, N, M), normal(2, N, 3), normal(3, EDGES.shape[1], 3)

CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "gatv2": (lambda: GATv2(M, H), {}),
    "gatv2, no loops": (lambda: GATv2(M, H, self_loops=False, share_weights=True), {}),
    "gatv2, mean, features": (lambda: GATv2(M, H, merge="mean", edge_dim=3), {"edge_features": FEATURES}),
    "gatv2, dropout": (lambda: GATv2(M, H, dropout=0.5), {}),
    **{
        f"supergat, {form}, loops={loops}": (lambda f=form, s=loops: SuperGAT(M, H, form=f, self_loops=s), {})
        for form in ("MX", "SD", "GO", "DP")
        for loops in (True, False)
    },
    **{
        f"point, share={share}, loops={loops}": (
            lambda n=share, s=loops: PointTransformer(M, share=n, self_loops=s),
            {"pos": POS},
        )
        for share in (1, 3)
        for loops in (True, False)
    },
    **{
        f"exphormer, degree={degree}, virtual={virtual}": (
            lambda d=degree, r=virtual: Exphormer(M, H, degree=d, virtual=r, bias=True),
            GRAPHS,
        )
        for degree in (0, 2)
        for virtual in (0, 1, 2)
    },
    "exphormer, features": (lambda: Exphormer(M, H, edge_dim=3), {"edge_features": FEATURES}),
}


def case(name: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    build, more = CASES[name]
    layer = build().double()
    perturb(layer, 1)
    return layer, more


def output(layer: Any, found: EdgeWeights, nodes: Tensor, more: dict[str, Any]) -> Tensor:
    """What the layer puts out, from the weights and its values alone."""
    (j, i), weights, _ = found
    if isinstance(layer, PointTransformer):
        return edge_sum(weights * (layer.v_proj(nodes)[j] + layer.theta(more["pos"][i] - more["pos"][j])), i, N)
    heads = (H, M // H)
    if isinstance(layer, Exphormer):
        v, hubs = layer.v_proj(nodes).unflatten(-1, heads), i >= N
        if layer.virtual:
            read = edge_sum(weights[hubs, :, None] * v[j[hubs]], i[hubs] - N, int(i.max()) + 1 - N).flatten(1)
            v = torch.cat([v, layer.v_proj(read).unflatten(-1, heads)])
        return edge_sum(weights[~hubs, :, None] * v[j[~hubs]], i[~hubs], N).flatten(1)
    value = (layer.proj if isinstance(layer, SuperGAT) else layer.source_proj)(nodes).unflatten(-1, heads)
    summed = edge_sum(weights[..., None] * value[j], i, N)
    return (summed.mean(1) if layer.merge == "mean" else summed.flatten(1)) + layer.bias


@pytest.mark.parametrize("name", CASES)
def test_weights_make_the_output(name: str) -> None:
    layer, more = case(name)
    found = regard.edge_weights(layer, NODES, EDGES, **more)
    assert found.given == EDGES.shape[1]
    assert torch.equal(found.edge_index[:, : found.given], EDGES)
    assert found.weights.shape == (found.edge_index.shape[1], M if isinstance(layer, PointTransformer) else H)
    with torch.no_grad():
        got, want = output(layer, found, NODES, more), layer.eval()(NODES, EDGES, **more)
    assert (got - want).abs().max() < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_weights_into_a_node_sum_to_one(name: str) -> None:
    """Exphormer's a little less: 1e-6 is added to its sums, none of whose terms is below exp(-5)."""
    layer, more = case(name)
    found = regard.edge_weights(layer, NODES, EDGES, **more)
    total = edge_sum(found.weights, found.edge_index[1], N + 4)
    into = found.edge_index[1].unique()
    allowed = 1e-6 / torch.tensor(-5.0).exp() if isinstance(layer, Exphormer) else 1e-12
    assert (total[into] - 1).abs().max() < allowed
    assert (found.weights >= 0).all()
    assert set(EDGES[1].tolist()) <= set(into.tolist())


@pytest.mark.parametrize("name", CASES)
def test_the_order_is_that_of_the_edges_given(name: str) -> None:
    layer, more = case(name)
    found = regard.edge_weights(layer, NODES, EDGES, **more)
    order = torch.randperm(found.given, generator=torch.Generator().manual_seed(4))
    shuffled = dict(more) | ({"edge_features": FEATURES[order]} if "edge_features" in more else {})
    again = regard.edge_weights(layer, NODES, EDGES[:, order], **shuffled)
    given = found.given
    assert torch.equal(again.edge_index[:, :given], EDGES[:, order])
    assert (again.weights[:given] - found.weights[:given][order]).abs().max() < 1e-12
    assert torch.equal(again.edge_index[:, given:], found.edge_index[:, given:])
    assert (again.weights[given:] - found.weights[given:]).abs().sum() < 1e-12


def test_of_two_edges_between_the_same_nodes_each_has_its_own() -> None:
    layer, more = case("gatv2, mean, features")
    weights = regard.edge_weights(layer, NODES, EDGES, **more).weights
    assert (weights[0] - weights[6]).abs().min() > 1e-3, "their features differ"
    alike = {"edge_features": FEATURES.index_copy(0, torch.tensor([6]), FEATURES[:1])}
    weights = regard.edge_weights(layer, NODES, EDGES, **alike).weights
    assert torch.equal(weights[0], weights[6])


@pytest.mark.parametrize("name", ["gatv2", "supergat, MX, loops=True", "point, share=1, loops=True"])
def test_loops_that_a_layer_adds_follow(name: str) -> None:
    layer, more = case(name)
    found = regard.edge_weights(layer, NODES, EDGES, **more)
    assert torch.equal(found.edge_index[:, found.given :], torch.arange(N).expand(2, -1))
    assert not found.weights[3].any(), "the loop that was given is replaced"
    assert (found.weights[[n for n in range(9) if n != 3]] > 0).all()
    assert (found.weights[-2:] == 1).all(), "nodes without an edge have their loop alone"


def test_edges_of_the_expander_and_of_virtual_nodes_follow() -> None:
    layer, _ = case("exphormer, degree=2, virtual=2")
    drawn = torch.tensor([[0, 3, 5], [3, 0, 6]])
    found = regard.edge_weights(layer, NODES, EDGES, expander_edges=drawn, **GRAPHS)
    hubs = torch.tensor([7, 7, 7, 7, 7, 8, 8, 9, 9, 9, 9, 9, 10, 10])
    node = torch.arange(N).repeat(2)
    want = [EDGES, drawn, torch.stack([hubs, node]), torch.stack([node, hubs])]
    assert torch.equal(found.edge_index, torch.cat(want, 1))


def test_virtual_nodes_handed_in_are_those_of_mix() -> None:
    layer, _ = case("exphormer, degree=0, virtual=1")
    virtual = normal(5, 2, M)
    (j, i), weights, _ = regard.edge_weights(layer, NODES, EDGES, virtual=virtual, **GRAPHS)
    v = layer.v_proj(torch.cat([NODES, virtual])).unflatten(-1, (H, M // H))
    out = edge_sum(weights[..., None] * v[j], i, N + 2).flatten(1)
    assert (out - torch.cat(layer.mix(NODES, virtual, EDGES, **GRAPHS))).abs().max() < 1e-12


def test_gatv2_by_the_formula() -> None:
    """One edge and one head at a time: exp(a . LeakyReLU(W_dst h_i + W_src h_j)) over its sum at the node."""
    layer, _ = case("gatv2, no loops")
    found = regard.edge_weights(layer, NODES, EDGES)
    z, a = layer.source_proj(NODES).detach(), layer.a.detach()
    for h in range(H):
        part = slice(3 * h, 3 * h + 3)
        p = []
        for j, i in EDGES.T.tolist():
            both = z[i, part] + z[j, part]
            p.append(float((a[h] * torch.where(both >= 0, both, 0.2 * both)).sum().exp()))
        for e, target in enumerate(EDGES[1].tolist()):
            into = sum(p[f] for f, other in enumerate(EDGES[1].tolist()) if other == target)
            assert abs(float(found.weights[e, h]) - p[e] / into) < 1e-12


@pytest.mark.parametrize("options", [{}, {"self_loops": False}, {"edge_dim": 3}])
def test_equals_what_torch_geometric_returns(options: dict[str, Any]) -> None:
    geometric = pytest.importorskip("torch_geometric")
    torch.manual_seed(0)
    layer = GATv2(M, H, **options).double()
    perturb(layer, 1)
    theirs = geometric.nn.GATv2Conv(M, M // H, H, edge_dim=layer.edge_dim, add_self_loops=layer.self_loops).double()
    theirs.lin_l.load_state_dict(layer.source_proj.state_dict())
    theirs.lin_r.load_state_dict(layer.target_proj.state_dict())
    if layer.edge_dim:
        theirs.lin_edge.load_state_dict(layer.edge_proj.state_dict())
    with torch.no_grad():
        theirs.att.copy_(layer.a[None])
        features = FEATURES if layer.edge_dim else None
        _, (edges, want) = theirs(NODES, EDGES, features, return_attention_weights=True)
    found = regard.edge_weights(layer, NODES, EDGES, **({"edge_features": features} if layer.edge_dim else {}))
    kept = torch.ones(found.edge_index.shape[1], dtype=torch.bool)
    kept[3] = not layer.self_loops  # the library takes a replaced loop out of its list
    assert torch.equal(found.edge_index[:, kept], edges)
    assert (found.weights[kept] - want).abs().max() < 1e-12


# --- Policies


def test_the_layer_is_left_as_it_was() -> None:
    layer, _ = case("gatv2, dropout")
    before = torch.get_rng_state()
    first = regard.edge_weights(layer.train(), NODES, EDGES).weights
    assert layer.training
    assert torch.equal(torch.get_rng_state(), before)
    assert not first.requires_grad
    assert torch.equal(first, regard.edge_weights(layer.eval(), NODES, EDGES).weights)


@pytest.mark.parametrize(
    "name", ["gatv2", "supergat, MX, loops=True", "point, share=1, loops=True", "exphormer, features"]
)
def test_the_layers_own_method_takes_gradients(name: str) -> None:
    layer, more = case(name)
    nodes = NODES.clone().requires_grad_()
    (grad,) = torch.autograd.grad(layer.edge_weights(nodes, EDGES, **more).weights.square().sum(), nodes)
    assert grad.abs().max() > 0


def test_every_graph_mechanism_tells() -> None:
    names = [name for name in regard.mechanisms() if regard.card(name).protocol == "GraphMixer"]
    assert len(names) >= 4
    for name in names:
        assert isinstance(regard.create(name, dim=M, num_heads=H), EdgeWeigher), name


def test_no_edges() -> None:
    none = EDGES[:, :0]
    found = regard.edge_weights(case("gatv2")[0], NODES, none)
    assert (found.given, found.weights.tolist()) == (0, [[1.0] * H] * N)
    assert regard.edge_weights(case("gatv2, no loops")[0], NODES, none).weights.shape == (0, H)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_give_weights_in_float32(dtype: torch.dtype) -> None:
    for name, (build, more) in CASES.items():
        cast = {key: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in more.items()}
        assert regard.edge_weights(build().to(dtype), NODES.to(dtype), EDGES, **cast).weights.dtype == torch.float32, (
            name
        )


class Doubled(GATv2):
    """Another forward: its weights are not GATv2's."""

    def forward(self, nodes: Tensor, edge_index: Tensor, edge_features: Tensor | None = None) -> Tensor:
        return super().forward(nodes, edge_index.flip(0), edge_features)


class Own(nn.Module):
    """A layer of somebody else: every edge weighs 1."""

    def forward(self, nodes: Tensor, edge_index: Tensor) -> Tensor:
        return edge_sum(nodes[edge_index[0]], edge_index[1], len(nodes))

    def edge_weights(self, nodes: Tensor, edge_index: Tensor) -> EdgeWeights:
        return EdgeWeights(edge_index, nodes.new_ones(edge_index.shape[1], 1), edge_index.shape[1])


def test_a_layer_of_ones_own() -> None:
    assert regard.edge_weights(Own(), NODES, EDGES).weights.tolist() == [[1.0]] * 9


@pytest.mark.parametrize("layer", [nn.Linear(M, M), regard.create("softmax", dim=M, num_heads=H), Doubled(M, H), len])
def test_other_layers_are_refused(layer: Any) -> None:
    words = rf"edge_weights: layer tells no weights of edges \(got {type(layer).__name__}\); expected a graph mechanism"
    with pytest.raises(TypeError, match=words):
        regard.edge_weights(layer, NODES, EDGES)


def test_bad_arguments() -> None:
    gat, point = case("gatv2")[0], case("point, share=1, loops=True")[0]
    with pytest.raises(
        TypeError, match=r"edge_weights: more doesn't suit GATv2: .*'pos' \(got \['pos'\]\); expected edge_"
    ):
        regard.edge_weights(gat, NODES, EDGES, pos=POS)
    with pytest.raises(TypeError, match=r"more doesn't suit PointTransformer: .*'pos' \(got \[\]\); expected pos"):
        regard.edge_weights(point, NODES, EDGES)
    with pytest.raises(ValueError, match=r"GATv2: nodes has the wrong shape \(got \(7, 3\)\); expected \(N, M = 6\)"):
        regard.edge_weights(gat, NODES[:, :3], EDGES)
    with pytest.raises(ValueError, match=r"GATv2: edge_index names unknown nodes"):
        regard.edge_weights(gat, NODES, EDGES + 3)
    with pytest.raises(ValueError, match=r"GATv2: edge_features don't go with the layer"):
        regard.edge_weights(gat, NODES, EDGES, edge_features=FEATURES)
