"""SuperGAT against loops over edges, torch_geometric, and what its edge loss teaches."""

import pytest
import torch
from torch import Tensor

import regard
from graph.naive_gatv2 import with_loops
from graph.naive_supergat import naive_edge_loss, naive_supergat
from regard.graph import supergat as module
from regard.graph.non_edges import sample_non_edges
from regard.graph.supergat import SuperGAT, edge_scores
from regard.laws.agreement import close
from regard.laws.subject import perturb

EDGES = torch.tensor([[0, 1, 2, 3, 3, 4, 0, 0, 2], [1, 0, 1, 3, 0, 2, 1, 4, 4]])
NON_EDGES = torch.tensor([[0, 5, 5, 1], [3, 1, 2, 5]])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(seed: int, dim: int, heads: int, **options) -> SuperGAT:
    torch.manual_seed(seed)
    made = SuperGAT(dim, heads, **options).double().eval()
    perturb(made, seed)
    return made


@pytest.mark.parametrize("form", ["MX", "SD", "GO", "DP"])
@pytest.mark.parametrize("merge", ["concat", "mean"])
@pytest.mark.parametrize("self_loops", [True, False])
def test_equals_the_loops(form: str, merge: str, self_loops: bool) -> None:
    """Output, loss and all gradients; node 5 has no edge at all."""
    made = layer(1, 5, 2, form=form, head_dim=3, merge=merge, self_loops=self_loops)
    x = normal(2, 6, 5).requires_grad_()
    edges = [tuple(e) for e in EDGES.T.tolist()]
    if self_loops:
        edges, _ = with_loops(edges, 6)
    a_src, a_dst = (None, None) if made.a is None else made.a
    if made.a is None:
        a_src = a_dst = torch.zeros(2, 3).double()
    want = naive_supergat(x, edges, made.proj.weight, made.bias, form, a_dst, a_src, 2, merge == "mean")
    loss = naive_edge_loss(x, edges, NON_EDGES.T.tolist(), made.proj.weight, form, a_dst, a_src, 2)
    wanted = [x, *made.parameters()]
    for got, right in ((made(x, EDGES), want), (made.edge_loss(x, EDGES, NON_EDGES), loss)):
        close(got.detach(), right.detach())
        w = normal(4, *right.shape)
        both = [torch.autograd.grad(z, wanted, w, allow_unused=True) for z in (got, right)]
        for n, (g, r) in enumerate(zip(*both)):
            close(
                torch.zeros_like(wanted[n]) if g is None else g, torch.zeros_like(wanted[n]) if r is None else r, str(n)
            )


@pytest.mark.parametrize("form", ["MX", "SD"])
@pytest.mark.parametrize("merge", ["concat", "mean"])
def test_equals_torch_geometric(form: str, merge: str) -> None:
    geometric = pytest.importorskip("torch_geometric")
    made = layer(3, 24, 6, form=form, merge=merge)
    theirs = geometric.nn.SuperGATConv(24, 4, 6, concat=merge == "concat", attention_type=form).double().train()
    theirs.load_state_dict(regard.layer_state(made, like=theirs))
    x = normal(4, 9, 24)
    edges = torch.randint(9, (2, 30), generator=torch.Generator().manual_seed(5))
    non_edges = torch.randint(9, (2, 12), generator=torch.Generator().manual_seed(6))
    close(made(x, edges), theirs(x, edges, non_edges))
    close(made.edge_loss(x, edges, non_edges), theirs.get_attention_loss())


@pytest.mark.parametrize(("nodes", "count"), [(30, 40), (30, 10**6), (5, 3), (1, 4)])
def test_non_edges_are_none(nodes: int, count: int) -> None:
    edges = torch.randint(nodes, (2, 60), generator=torch.Generator().manual_seed(1))
    found = sample_non_edges(edges, nodes, count, generator=torch.Generator().manual_seed(2))
    again = sample_non_edges(edges, nodes, count, generator=torch.Generator().manual_seed(2))
    assert torch.equal(found, again)
    pairs = {tuple(p) for p in found.T.tolist()}
    taken = {(n, n) for n in range(nodes)} | {p for j, i in edges.T.tolist() for p in ((j, i), (i, j))}
    assert len(pairs) == found.shape[1] == min(count, nodes * nodes - len(taken))
    assert not pairs & taken


def test_non_edges_are_drawn_evenly() -> None:
    edges = torch.tensor([[0, 1], [1, 2]])
    counts = torch.zeros(6, 6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(600):
        j, i = sample_non_edges(edges, 6, 5, generator=generator)
        counts[j, i] += 1
    free = counts[counts > 0]
    assert len(free) == 26  # 36 pairs less 6 loops and 2 edges both ways
    expected = 600 * 5 / 26
    assert (free - expected).abs().max() < 5 * expected**0.5


@pytest.mark.parametrize("form", ["MX", "SD"])
def test_edge_loss_teaches_to_tell_edges(form: str) -> None:
    """Two communities: after training on the edge loss alone, scores of held-out links exceed those of non-links."""
    generator = torch.Generator().manual_seed(0)
    N = 60
    community = torch.arange(N) % 2
    x = torch.randn(N, 16, generator=generator) + 1.5 * torch.randn(2, 16, generator=generator)[community]
    pairs = torch.cartesian_prod(torch.arange(N), torch.arange(N)).T
    same = (community[pairs[0]] == community[pairs[1]]) & (pairs[0] != pairs[1])
    linked = pairs[:, same & (torch.rand(N * N, generator=generator) < 0.3)]
    order = torch.randperm(linked.shape[1], generator=generator)
    train, held = linked[:, order[:-80]], linked[:, order[-80:]]
    torch.manual_seed(0)
    made = SuperGAT(16, 2, form=form)

    def auc() -> float:
        z = made.proj(x).unflatten(-1, (2, 8))
        apart = pairs[:, ~same & (pairs[0] != pairs[1])]
        link, none = (edge_scores(z[e[0]], z[e[1]], made.a, form)[1].mean(-1) for e in (held, apart))
        return float((link[:, None] > none).float().mean())

    before = auc()
    optimizer = torch.optim.Adam(made.parameters(), 0.01)
    losses = []
    for _ in range(80):
        non_edges = sample_non_edges(train, N, train.shape[1] // 2, generator=generator)
        loss = made.edge_loss(x, train, non_edges)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    assert auc() > max(0.9, before)


# The loss that training adds


@pytest.mark.parametrize("self_loops", [True, False])
def test_auxiliary_loss_is_the_edge_loss_of_a_draw(self_loops: bool) -> None:
    """As many non-edges as the code draws, by the global seed; unweighted; the gradients are those of the loss."""
    made, x = layer(1, 6, 2, self_loops=self_loops, auxiliary_weight=7.0), normal(2, 6, 6).requires_grad_()
    torch.manual_seed(3)
    loss = made.auxiliary_loss(x, EDGES)
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    edges = with_loops([tuple(e) for e in EDGES.T.tolist()], 6)[0] if self_loops else EDGES.T.tolist()
    torch.randperm(len(edges), generator=generator)  # the order of the edges
    non_edges = sample_non_edges(EDGES, 6, len(edges) // 2, generator=generator)
    assert non_edges.shape[1] == (7 if self_loops else 4)
    want = made.edge_loss(x, EDGES, non_edges)
    close(loss, want)
    wanted = [x, made.proj.weight]
    for got, right in zip(torch.autograd.grad(loss, wanted), torch.autograd.grad(want, wanted)):
        close(got, right)


def test_auxiliary_loss_draws_anew_and_by_its_ratios(monkeypatch) -> None:
    seen = []

    def spy(z, a, edges, non_edges, *, form):
        seen.append((edges, non_edges))
        return z.sum()

    monkeypatch.setattr(module, "edge_loss", spy)
    x, pairs = normal(2, 30, 6), torch.randint(30, (2, 80), generator=torch.Generator().manual_seed(1))
    made = layer(1, 6, 2, edge_sample_ratio=0.5, neg_sample_ratio=2.0, self_loops=False)
    torch.manual_seed(0)
    for _ in range(2):
        made.auxiliary_loss(x, pairs)
    torch.manual_seed(0)
    made.auxiliary_loss(x, pairs)
    (edges, non_edges), other, again = seen
    assert (edges.shape[1], non_edges.shape[1]) == (40, 80)
    drawn, none, there = ({tuple(p) for p in z.T.tolist()} for z in (edges, non_edges, pairs))
    assert drawn <= there
    assert not none & (there | {(i, j) for j, i in there})
    assert all(torch.equal(a, b) for a, b in zip(again, (edges, non_edges)))
    assert not any(torch.equal(a, b) for a, b in zip(other, (edges, non_edges)))


def test_auxiliary_loss_through_create() -> None:
    card = regard.card("supergat")
    made = regard.create("supergat", dim=6, num_heads=2, auxiliary_weight=0.1, neg_sample_ratio=1.0).double()
    assert made.auxiliary_weight == 0.1
    assert regard.create("supergat", dim=6, num_heads=2).auxiliary_weight == card.options["auxiliary_weight"] == 4.0
    loss = getattr(made, card.auxiliary)(normal(2, 6, 6), EDGES)
    assert loss.shape == ()
    assert loss > 0
    alone = SuperGAT(6, 2, self_loops=False).auxiliary_loss(normal(2, 3, 6).float(), EDGES[:, :0])
    assert alone == 0
    with pytest.raises(ValueError, match=r"'supergat' has no such option \(got 'merge'\)"):
        regard.create("supergat", dim=6, num_heads=2, merge="mean")


def test_bad_nodes_reach_their_targets_only() -> None:
    x = normal(2, 6, 6)
    x[3] = float("nan")
    for form in ("MX", "SD"):
        out = layer(1, 6, 2, form=form)(x, EDGES)
        assert out.isnan().any(-1).tolist() == [True, False, False, True, False, False]


def test_large_scores_stay_finite() -> None:
    made, x = layer(1, 6, 2), (1e4 * normal(2, 6, 6)).requires_grad_()
    loss = made(x, EDGES).sum() + made.edge_loss(x, EDGES, NON_EDGES)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("form", ["MX", "SD"])
def test_gradcheck(form: str) -> None:
    made = layer(1, 4, 2, form=form)
    x = normal(2, 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(made, (x, EDGES))
    assert torch.autograd.gradcheck(made.edge_loss, (x, EDGES, NON_EDGES[:, :1]))


def test_bad_input() -> None:
    made = layer(1, 6, 2)
    with pytest.raises(ValueError, match=r"nodes has the wrong shape \(got \(6, 5\)\); expected \(N, M = 6\)"):
        made(normal(1, 6, 5), EDGES)
    with pytest.raises(ValueError, match=r"edge_index names unknown nodes \(got .* expected 0 to 5"):
        made.edge_loss(normal(1, 6, 6), EDGES, torch.tensor([[0], [9]]))
    for options, words in (
        ({"form": "XX"}, r"form is unknown \(got 'XX'\); expected one of 'MX', 'SD', 'GO', 'DP'"),
        ({"merge": "sum"}, r"merge is unknown \(got 'sum'\); expected one of 'concat', 'mean'"),
        ({"dropout": -1.0}, r"dropout is out of range \(got -1.0\)"),
        ({"auxiliary_weight": -1.0}, r"auxiliary_weight is out of range \(got -1.0\)"),
        ({"edge_sample_ratio": 0.0}, r"edge_sample_ratio is out of range \(got 0.0\); expected .* > 0 and <= 1"),
        ({"neg_sample_ratio": -0.5}, r"neg_sample_ratio is out of range \(got -0.5\)"),
    ):
        with pytest.raises(ValueError, match=words):
            SuperGAT(6, 2, **options)
    with pytest.raises(ValueError, match=r"dim is no multiple of num_heads = 2 \(got 7\)"):
        SuperGAT(7, 2)
