"""GATv2 against loops over edges, torch_geometric, its numbers (A176), and the task that the first GAT cannot do."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from graph.naive_gatv2 import naive_gatv2, with_loops
from regard.graph._edges import edge_softmax, edge_sum
from regard.graph.gatv2 import GATv2, gatv2
from regard.laws.agreement import close
from regard.laws.subject import perturb

VECTORS = Path(__file__).parents[1] / "vectors" / "A176.npz"
EDGES = torch.tensor([[0, 1, 2, 3, 3, 4, 0, 0, 2], [1, 0, 1, 3, 0, 2, 1, 4, 4]])  # a loop, a double edge


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k[2:]: torch.from_numpy(file[k]) for k in file if k[0] == case}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(seed: int, dim: int, heads: int, **options) -> GATv2:
    torch.manual_seed(seed)
    made = GATv2(dim, heads, **options).double().eval()
    perturb(made, seed)
    return made


@pytest.mark.parametrize("merge", ["concat", "mean"])
@pytest.mark.parametrize("self_loops", [True, False])
@pytest.mark.parametrize("edge_dim", [None, 3])
@pytest.mark.parametrize("share", [True, False])
def test_equals_the_loops(merge: str, self_loops: bool, edge_dim: int | None, share: bool) -> None:
    """Output and gradients; node 5 has no edge at all."""
    made = layer(1, 5, 2, head_dim=3, merge=merge, self_loops=self_loops, edge_dim=edge_dim, share_weights=share)
    x = normal(2, 6, 5).requires_grad_()
    features = None if edge_dim is None else normal(3, EDGES.shape[1], edge_dim).requires_grad_()
    edges, used = [tuple(e) for e in EDGES.T.tolist()], features
    if self_loops:
        edges, used = with_loops(edges, 6, features)
    source, target = made.source_proj, made.target_proj or made.source_proj
    edge_weight = None if edge_dim is None else made.edge_proj.weight
    want = naive_gatv2(
        x,
        x,
        edges,
        source.weight,
        source.bias,
        target.weight,
        target.bias,
        made.a,
        made.bias,
        W_edge=edge_weight,
        features=used,
        mean=merge == "mean",
    )
    wanted = [x, *([] if features is None else [features]), *made.parameters()]
    w = normal(4, *want.shape)
    results = []
    for out in (made(x, EDGES, features), want):
        results.append([out.detach(), *torch.autograd.grad(out, wanted, w)])
    for n, (got, right) in enumerate(zip(*results)):
        close(got, right, str(n))


def test_gives_the_librarys_numbers_on_one_node_set() -> None:
    z = vectors("A")
    made = GATv2(5, 3, head_dim=4).double()
    made.load_state_dict(
        {
            "source_proj.weight": z["W_src"],
            "source_proj.bias": z["b_src"],
            "target_proj.weight": z["W_dst"],
            "target_proj.bias": z["b_dst"],
            "a": z["a"],
            "bias": z["bias"],
        }
    )
    x = z["x_src"].requires_grad_()
    out = made(x, z["edge_index_in"])
    close(out.detach(), z["out"])
    close(torch.autograd.grad(out, x, z["w"])[0], z["grad_x_src"])
    edges = [tuple(e) for e in z["edge_index_used"].T.tolist()]
    close(naive_gatv2(x, x, edges, *(z[n] for n in ("W_src", "b_src", "W_dst", "b_dst", "a", "bias"))), z["out"])


def test_gives_the_librarys_numbers_on_two_node_sets() -> None:
    z = vectors("B")
    x_src, x_dst = z["x_src"].requires_grad_(), z["x_dst"].requires_grad_()
    H, D = z["a"].shape
    out = gatv2(
        (x_src @ z["W_src"].T + z["b_src"]).view(-1, H, D),
        (x_dst @ z["W_dst"].T + z["b_dst"]).view(-1, H, D),
        z["a"],
        z["edge_index_used"],
        edge=(z["edge_attr"] @ z["W_edge"].T).view(-1, H, D),
        negative_slope=0.1,
    )
    out = out.mean(1) + z["bias"]
    close(out.detach(), z["out"])
    close(out[[1, 4]].detach(), z["bias"].expand(2, D))  # no edge leads there
    for got, name in zip(torch.autograd.grad(out, (x_src, x_dst), z["w"]), ("grad_x_src", "grad_x_dst")):
        close(got, z[name], name)


@pytest.mark.parametrize(
    "options", [{}, {"merge": "mean"}, {"share_weights": True}, {"edge_dim": 2}, {"self_loops": False}]
)
def test_equals_torch_geometric(options: dict) -> None:
    geometric = pytest.importorskip("torch_geometric")
    made = layer(3, 24, 6, **options)
    theirs = geometric.nn.GATv2Conv(
        24,
        4,
        6,
        concat=made.merge == "concat",
        share_weights=made.target_proj is None,
        edge_dim=made.edge_dim,
        add_self_loops=made.self_loops,
    ).double()
    theirs.load_state_dict(regard.layer_state(made, like=theirs))
    x = normal(4, 9, 24)
    edges = torch.randint(9, (2, 30), generator=torch.Generator().manual_seed(5))
    features = normal(6, 30, 2) if made.edge_dim else None
    close(made(x, edges, features), theirs(x, edges, features))


# What the paper says of it


def gat_scores(source: Tensor, target: Tensor, a: Tensor, edges: Tensor) -> Tensor:
    """The first GAT: LeakyReLU(a . [W x_i ; W x_j])."""
    j, i = edges
    return F.leaky_relu((source[j] * a[0]).sum(-1) + (target[i] * a[1]).sum(-1), 0.2)


def test_gat_ranks_alike_for_every_node_and_gatv2_does_not() -> None:
    edges = torch.cartesian_prod(torch.arange(8), torch.arange(6)).T
    changes = 0
    for seed in range(5):
        source, target, a = normal(seed, 8, 1, 16), normal(seed + 50, 6, 1, 16), normal(seed + 99, 2, 1, 16)
        order = gat_scores(source, target, a, edges).view(8, 6).argsort(0)
        assert (order == order[:, :1]).all()
        values = torch.eye(8).double()[:, None]  # one-hot values give back the weights
        weights = edge_softmax((F.leaky_relu(source[edges[0]] + target[edges[1]], 0.2) * a[0]).sum(-1), edges[1], 6)
        seen = edge_sum(weights[..., None] * values[edges[0]], edges[1], 6)[:, 0]
        changes += len(seen.argmax(-1).unique()) > 1
    assert changes >= 3


@torch.no_grad()
def test_favours_a_neighbour_between_others() -> None:
    """Queries and keys lie on a line, and each query finds the key at its own place, by a score of -|x_i - x_j|.

    No dot product of places does: linear in the key's place, it is greatest at an end of the line, whatever the
    projections. GAT's score ranks the keys alike for all queries.
    """
    n = 6
    place, value = torch.linspace(-1, 1, n).double(), normal(1, n)
    x = torch.stack([place.repeat(2), -place.repeat(2), torch.cat([0 * value, value])], 1)  # queries, keys
    j, i = torch.cartesian_prod(torch.arange(n, 2 * n), torch.arange(n)).T
    made = GATv2(3, 1, self_loops=False).double()
    made.source_proj.weight.copy_(torch.eye(3))
    made.target_proj.weight.copy_(-torch.eye(3))
    made.a.copy_(torch.tensor([[-200.0, -200.0, 0.0]]))
    close(made(x, torch.stack([j, i]))[:n, 2], value)
    assert set((normal(2, 50, 2) @ x[n:, :2].T).argmax(1).tolist()) == {0, n - 1}


def test_solves_the_dictionary_lookup_that_gat_cannot() -> None:
    """Eight queries ask eight keys for their values, which are permuted: a hundred orders are to be learnt."""
    k, width = 8, 32
    generator = torch.Generator().manual_seed(100)
    orders = torch.stack([torch.randperm(k, generator=generator) for _ in range(100)])
    keys = torch.arange(k).expand(len(orders), k)
    key = torch.cat([keys, keys], 1)
    value = torch.cat([torch.full_like(orders, k), orders], 1)
    j, i = torch.cartesian_prod(torch.arange(k, 2 * k), torch.arange(k)).T
    graph = 2 * k * torch.arange(len(orders))[:, None]
    edges = torch.stack([(graph + j).flatten(), (graph + i).flatten()])

    def accuracy(dynamic: bool, steps: int) -> float:
        torch.manual_seed(0)
        embed = nn.ModuleList([nn.Embedding(k, width), nn.Embedding(k + 1, width)])
        mixer = GATv2(width, 1, share_weights=True, self_loops=False)
        readout = nn.Linear(width, k, bias=False)
        a = nn.Parameter(torch.cat([mixer.a.detach(), torch.randn(1, width) / width**0.5])[:, None])
        optimizer = torch.optim.Adam([*embed.parameters(), *mixer.parameters(), *readout.parameters(), a], 0.01)
        best = 0.0
        for _ in range(steps):
            x = F.relu(embed[0](key) + embed[1](value)).flatten(0, 1)
            if dynamic:
                out = mixer(x, edges)
            else:
                z = mixer.source_proj(x)[:, None]
                weights = edge_softmax(gat_scores(z, z, a, edges), edges[1], len(x))
                out = edge_sum(weights[..., None] * z[edges[0]], edges[1], len(x))[:, 0]
            logits = readout(out).view(len(orders), 2 * k, k)[:, :k]
            best = max(best, float((logits.argmax(-1) == orders).float().mean()))
            if best == 1:
                break
            optimizer.zero_grad()
            F.cross_entropy(logits.flatten(0, 1), orders.flatten()).backward()
            optimizer.step()
        return best

    assert accuracy(dynamic=True, steps=150) == 1
    assert accuracy(dynamic=False, steps=150) < 0.5  # a random guess: 0.125


# Policies


def test_bad_nodes_reach_their_targets_only() -> None:
    made = layer(1, 6, 2)
    x = normal(2, 6, 6)
    x[3] = float("nan")  # points at 0 and, by its loop, at itself
    assert made(x, EDGES).isnan().any(-1).tolist() == [True, False, False, True, False, False]


def test_nodes_may_be_renumbered() -> None:
    made, x = layer(1, 6, 2), normal(2, 6, 6)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    place = order.argsort()
    close(made(x[order], place[EDGES]), made(x, EDGES)[order])


def test_dropout_is_of_weights_and_in_training_only() -> None:
    made, x = layer(1, 6, 2, dropout=0.5), normal(2, 6, 6)
    assert torch.equal(made(x, EDGES), layer(1, 6, 2)(x, EDGES))
    made.train()
    mean = torch.stack([made(x, EDGES) for _ in range(1000)]).mean(0)
    assert (mean - made.eval()(x, EDGES)).abs().max() < 0.2


def test_empty_graphs() -> None:
    made = layer(1, 6, 2, self_loops=False)
    none = torch.zeros(2, 0, dtype=torch.int64)
    close(made(normal(1, 3, 6), none), made.bias.expand(3, 6))
    assert made(normal(1, 0, 6), none).shape == (0, 6)
    assert layer(1, 6, 2)(normal(1, 0, 6), none).shape == (0, 6)


def test_gradcheck() -> None:
    made = layer(1, 4, 2, edge_dim=2)
    given = (normal(2, 5, 4).requires_grad_(), EDGES, normal(3, 9, 2).requires_grad_())
    assert torch.autograd.gradcheck(made, given)


def test_bad_input() -> None:
    made = layer(1, 6, 2)
    for given, words in (
        ((normal(1, 5, 4), EDGES), r"nodes has the wrong shape \(got \(5, 4\)\); expected \(N, M = 6\)"),
        ((normal(1, 3, 6), EDGES), r"edge_index names unknown nodes \(got .* expected 0 to 2"),
        (
            (normal(1, 6, 6), EDGES, normal(1, 9, 2)),
            r"edge_features don't go with the layer .*\(9, 2\)\); .* edge_dim=None",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            made(*given)
    with pytest.raises(ValueError, match=r"edge_features don't go with the layer \(got none\); .* edge_dim=2"):
        layer(1, 6, 2, edge_dim=2)(normal(1, 6, 6), EDGES)
    for shape, words in (((9, 3), r"expected \(E, W = 2\)"), ((8, 2), r"expected \(E = 9, W\)")):
        with pytest.raises(ValueError, match=f"edge_features has the wrong shape .* {words}"):
            layer(1, 6, 2, edge_dim=2)(normal(1, 6, 6), EDGES, normal(1, *shape))
    for options, words in (
        ({"merge": "sum"}, r"merge is unknown \(got 'sum'\); expected one of 'concat', 'mean'"),
        ({"dropout": 2.0}, r"dropout is out of range \(got 2.0\)"),
        ({"edge_dim": 0}, r"edge_dim is too small \(got 0\)"),
    ):
        with pytest.raises(ValueError, match=words):
            GATv2(6, 2, **options)
    with pytest.raises(ValueError, match=r"dim is no multiple of num_heads = 2 \(got 7\)"):
        GATv2(7, 2)
    for words, options in (
        ("causal", {"causal": True}),
        ("gqa", {"num_kv_heads": 2}),
        ("head_dim", {"head_dim": 8}),
        (r"'gatv2' has no such option \(got 'merge'\)", {"merge": "mean"}),
    ):
        with pytest.raises(ValueError, match=words):
            regard.create("gatv2", dim=24, num_heads=6, **options)
