"""Exphormer against loops over edges, the authors' numbers (B033), and the spectrum of its expanders."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from graph.naive_exphormer import naive_edges, naive_exphormer
from regard.graph.expander import expander, spectral_gap
from regard.graph.exphormer import Exphormer, edge_attention
from regard.laws.agreement import close
from regard.laws.subject import perturb

VECTORS = Path(__file__).parents[1] / "vectors" / "B033.npz"
EDGES = torch.tensor([[0, 1, 2, 3, 3, 4, 0, 0, 2], [1, 0, 1, 3, 0, 2, 1, 4, 4]])
EXPANDER = torch.tensor([[0, 3, 5, 4, 6, 5], [3, 0, 4, 5, 5, 6]])


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k[2:]: torch.from_numpy(file[k]) for k in file if k[0] == case}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(start: int, dim: int, heads: int, **options) -> Exphormer:
    torch.manual_seed(start)
    made = Exphormer(dim, heads, **options).double()
    perturb(made, start)
    return made


@pytest.mark.parametrize("virtual", [0, 1, 2])
@pytest.mark.parametrize("edge_dim", [None, 3])
@pytest.mark.parametrize("degree", [0, 2])
def test_equals_the_loops(virtual: int, edge_dim: int | None, degree: int) -> None:
    """Output, the virtual nodes' too, and all gradients, on a batch of two graphs of 5 and 2 nodes."""
    made = layer(1, 6, 2, virtual=virtual, edge_dim=edge_dim, degree=degree, bias=True)
    N, graph = 7, torch.tensor([0, 0, 0, 0, 0, 1, 1])
    x, start = normal(2, N, 6).requires_grad_(), normal(3, 2 * virtual, 6).requires_grad_()
    features = None if edge_dim is None else normal(4, EDGES.shape[1], edge_dim).requires_grad_()
    drawn = EXPANDER if degree else None
    got = made.mix(x, start, EDGES, drawn, edge_features=features, graph=graph, num_graphs=2)
    own = [tuple(e) for e in EDGES.T.tolist()]
    edges, kinds = naive_edges(N, virtual, graph.tolist(), own, [] if drawn is None else EXPANDER.T.tolist())
    rows = []
    for n, kind in enumerate(kinds):
        if kind == "real":
            rows.append(made.real_edge[0] if features is None else features[n])
        elif kind == "expander":
            rows.append(made.expander_edge[0])
        else:
            rows.append((made.to_virtual if kind[:2] == "to" else made.from_virtual)[int(kind[-1])])
    projections = [tuple(p.parameters()) for p in (made.q_proj, made.k_proj, made.v_proj, made.edge_proj)]
    out = naive_exphormer(torch.cat([x, start]), edges, rows, *projections, 2)
    close(got[0], out[:N])
    close(got[1], out[N:])
    wanted = [x, start, *([] if features is None else [features]), *made.parameters()]
    w = normal(5, *out.shape)
    both = [torch.autograd.grad(z, wanted, w, allow_unused=True) for z in (torch.cat(got), out)]
    for n, (g, r) in enumerate(zip(*both)):
        close(*(torch.zeros_like(wanted[n]) if z is None else z for z in (g, r)), str(n))
    # A layer on its own: the virtual nodes take their step before the nodes do.
    given = {"edge_features": features, "graph": graph, "num_graphs": 2}
    _, ahead = made.mix(x, made.start(2), EDGES, drawn, **given)
    close(made(x, EDGES, drawn, features, graph=graph, num_graphs=2), made.mix(x, ahead, EDGES, drawn, **given)[0])


@pytest.mark.parametrize("case", ["A", "B"])
@pytest.mark.parametrize("which", ["loops", "layer"])
def test_gives_the_authors_numbers(case: str, which: str) -> None:
    """Two graphs in a batch; some scores are clipped. B has no virtual nodes."""
    z = vectors(case)
    x = z["x"].requires_grad_()
    N, R = len(x), len(z.get("virt_node_emb", []))
    heads = 3 if case == "A" else 2
    bounds = [0, *(torch.arange(N)[z["batch"] == g].max() + 1 for g in (0, 1))]
    drawn = torch.cat([z[f"expander_edges_{g}"] + bounds[g] for g in (0, 1)]).T
    assert torch.equal(torch.cat([z["edge_index"], drawn], 1), z["all_edge_index"])
    if which == "loops":
        rows, edges, features = x, z["all_edge_index"], z["all_edge_attr"]
        if R:
            rows = torch.cat([x, z["virt_h"]])
            edges = torch.cat([edges, z["virt_edge_index"]], 1)
            features = torch.cat([features, z["virt_edge_attr"]])
        weights = [(z["W_" + n], z["b_" + n]) for n in "QKVE"]
        out = naive_exphormer(rows, [tuple(e) for e in edges.T.tolist()], features, *weights, heads)
        out, virtual = out[:N], out[N:]
    else:
        made = Exphormer(6, heads, edge_dim=5, virtual=R, bias=True).double()
        state = {"expander_edge": z["exp_emb"]}
        if R:
            state |= {
                "virtual_nodes": z["virt_node_emb"],
                "to_virtual": z["virt_edge_to_emb"],
                "from_virtual": z["virt_edge_from_emb"],
            }
        for n, name in zip("QKVE", ("q_proj", "k_proj", "v_proj", "edge_proj")):
            state |= {f"{name}.weight": z["W_" + n], f"{name}.bias": z["b_" + n]}
        made.load_state_dict(state)
        out, virtual = made.mix(
            x,
            made.start(2),
            z["edge_index"],
            drawn,
            edge_features=z["edge_attr"],
            graph=z["batch"],
            num_graphs=2,
        )
    close(out.detach(), z["out"])
    total = (out * z["w"]).sum()
    if R:
        close(virtual.detach(), z["out_virt"])
        total = total + (virtual * z["w_virt"]).sum()
    close(torch.autograd.grad(total, x)[0], z["grad_x"])


# What the paper says of it


@pytest.mark.parametrize("nodes", [16, 40, 100])
@pytest.mark.parametrize("degree", [2, 3, 5])
def test_expanders_are_regular_sparse_and_well_connected(nodes: int, degree: int) -> None:
    """2 d N edges, 2 d at every node, and a gap near the best possible, where a ring's falls with N squared."""
    edges = expander(nodes, degree)
    assert edges.shape == (2, 2 * degree * nodes)
    assert (edges[0].bincount() == 2 * degree).all()
    assert (edges[1].bincount() == 2 * degree).all()
    one, back = ({tuple(e) for e in pairs.T.tolist()} for pairs in (edges, edges.flip(0)))
    assert one == back
    assert spectral_gap(edges, nodes) > 2 * degree - 2 * math.sqrt(2 * degree - 1) - 0.1
    node = torch.arange(nodes)
    ring = torch.stack([node, (node + 1) % nodes])
    ring_gap = spectral_gap(torch.cat([ring, ring.flip(0)], 1), nodes)
    assert abs(ring_gap - (2 - 2 * math.cos(2 * math.pi / nodes))) < 1e-10
    assert ring_gap < 0.2


def test_expanders_are_a_function_of_the_seed() -> None:
    assert torch.equal(expander(30, 3, seed=4), expander(30, 3, seed=4))
    assert not torch.equal(expander(30, 3, seed=4), expander(30, 3, seed=5))
    assert expander(2000, 2).shape == (2, 8000)
    before = torch.get_rng_state()
    expander(30, 3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("nodes", [0, 1, 2, 10])
def test_small_graphs_are_complete(nodes: int) -> None:
    pairs = {tuple(e) for e in expander(nodes, 3).T.tolist()}
    assert pairs == {(j, i) for j in range(nodes) for i in range(nodes) if i != j}


def test_an_expander_spreads_news_in_few_layers() -> None:
    """On a path of 64 nodes a few layers with expander edges reach all; with path edges, as many nodes as layers.

    The expander has 2 d N edges for all that, and its gap is open.
    """
    nodes, steps = 64, 5
    assert expander(nodes, 3).shape == (2, 6 * nodes)
    assert spectral_gap(expander(nodes, 3), nodes) > 6 - 2 * math.sqrt(5) - 0.1
    node = torch.arange(nodes - 1)
    path = torch.cat([torch.stack([node, node + 1]), torch.stack([node + 1, node])], 1)
    x = normal(1, nodes, 6).requires_grad_()
    reached = []
    for degree in (0, 3):
        made = layer(1, 6, 2, degree=degree, virtual=0)
        z = x
        for _ in range(steps):
            z = z + made(z, path, expander(nodes, 3) if degree else None)
        grad = torch.autograd.grad(z[0].sum(), x)[0]
        reached.append(int(grad.ne(0).any(-1).sum()))
    assert reached == [steps + 1, nodes]


def test_virtual_nodes_reach_all_in_two_layers() -> None:
    made = layer(1, 6, 2, degree=0, virtual=1)
    x = normal(1, 20, 6).requires_grad_()
    none = torch.zeros(2, 0, dtype=torch.int64)
    first, virtual = made.mix(x, made.start(), none)
    assert not torch.autograd.grad(first[0].sum(), x, retain_graph=True)[0][1:].any()
    second = made.mix(first, virtual, none)[0]
    assert torch.autograd.grad(second[0].sum(), x)[0].ne(0).any(-1).all()
    assert torch.autograd.grad(made(x, none)[0].sum(), x)[0].ne(0).any(-1).all()


# Policies


def test_draws_its_own_expander_graph_by_graph() -> None:
    made, x = layer(1, 6, 2, degree=2, seed=7), normal(2, 28, 6)
    graph = torch.tensor([0] * 12 + [1] * 16)
    drawn = torch.cat([expander(12, 2, seed=7), expander(16, 2, seed=7) + 12], 1)
    out = made(x, EDGES, graph=graph, num_graphs=2)
    close(out, made(x, EDGES, drawn, graph=graph, num_graphs=2))
    close(out[:12], made(x[:12], EDGES))


def test_bad_nodes_reach_their_targets_only() -> None:
    made, x = layer(1, 6, 2, degree=0, virtual=0), normal(2, 6, 6)
    x[3] = float("nan")
    assert made(x, EDGES).isnan().any(-1).tolist() == [True, False, False, True, False, False]


def test_nodes_without_edges_give_zero() -> None:
    q = normal(1, 4, 2, 3)
    edges = torch.tensor([[0, 1], [1, 1]])
    out = edge_attention(q, q, q, normal(2, 2, 2, 3), edges)
    assert out[1].any()
    assert not out[[0, 2, 3]].any()


def test_gradcheck() -> None:
    made = layer(1, 4, 2, edge_dim=2, bias=True)
    given = (normal(2, 5, 4).requires_grad_(), EDGES, EXPANDER[:, :2], normal(3, 9, 2).requires_grad_())
    assert torch.autograd.gradcheck(made, given)


def test_bad_input() -> None:
    made, x = layer(1, 6, 2), normal(2, 7, 6)
    for change, words in (
        ({"nodes": x[:, :3]}, r"nodes has the wrong shape \(got \(7, 3\)\); expected \(N, M = 6\)"),
        ({"edge_index": EDGES + 3}, r"edge_index names unknown nodes \(got .* expected 0 to 6"),
        ({"expander_edges": EXPANDER + 3}, r"edge_index names unknown nodes \(got .* expected 0 to 6"),
        ({"edge_features": normal(1, 9, 6)}, r"edge_features don't go with the layer \(got some .* edge_dim=None"),
        ({"num_graphs": 2}, r"graph must tell which graph each node is in \(got None\); .* of 2"),
        ({"graph": torch.zeros(6, dtype=torch.int64)}, r"graph has the wrong shape \(got \(6,\)\); expected \(N = 7\)"),
        ({"graph": torch.ones(7, dtype=torch.int64)}, r"graph names unknown graphs \(got \[1\]\); expected 0 to 0"),
    ):
        with pytest.raises(ValueError, match=words):
            made(**{"nodes": x, "edge_index": EDGES, **change})
    with pytest.raises(ValueError, match=r"virtual has the wrong shape \(got \(2, 6\)\); expected 1 nodes"):
        made.mix(x, made.start(2), EDGES)
    with pytest.raises(ValueError, match=r"edge_features don't go with the layer \(got none\); .* edge_dim=3"):
        layer(1, 6, 2, edge_dim=3)(x, EDGES)
    with pytest.raises(ValueError, match=r"degree is too small \(got 0\); expected an int >= 1"):
        expander(20, 0)
    for options in ({"degree": -1}, {"virtual": -1}):
        with pytest.raises(ValueError, match=r"is too small \(got -1\); expected an int >= 0"):
            Exphormer(6, 2, **options)
    with pytest.raises(ValueError, match=r"dim is no multiple of num_heads = 2 \(got 7\)"):
        Exphormer(7, 2)
