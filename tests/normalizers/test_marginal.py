"""Marginals of edges against enumeration, by somebody who saw the equations only (B039)."""

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import regard
from normalizers import naive_marginal as naive
from regard import masks
from regard.laws.agreement import close
from regard.laws.subject import of, tokens
from regard.normalizers._structures import chain_log_partition, chain_marginals
from regard.normalizers.marginal import (
    AtMostOne,
    Chain,
    ExactlyK,
    Independent,
    Marginal,
    Name,
    OneEdge,
    Structure,
    brute_force,
    edge_marginals,
    expected_value,
    geometric_log_prior,
    log_partition,
    sample_edges,
    slot_means,
    tree_marginals,
)

TRANSITION = torch.tensor([[0.3, -0.7], [0.2, 1.1]], dtype=torch.float64)
INITIAL = torch.tensor([-0.4, 0.5], dtype=torch.float64)
KINDS: dict[str, tuple[Structure, tuple[Any, ...]]] = {
    "one": (OneEdge(), ("one_edge",)),
    "at most one": (AtMostOne(), ("at_most_one",)),
    "independent": (Independent(), ("independent",)),
    "exactly one": (ExactlyK(1), ("exactly_k", 1)),
    "exactly two": (ExactlyK(2), ("exactly_k", 2)),
    "exactly four": (ExactlyK(4), ("exactly_k", 4)),
    "chain": (Chain(TRANSITION), ("chain", TRANSITION)),
    "chain from": (Chain(TRANSITION, INITIAL), ("chain", TRANSITION, INITIAL)),
}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def compare(got: Tensor, want: Tensor, given: tuple[Tensor, ...]) -> None:
    """Values and gradients."""
    close(got.detach(), want.detach())
    direction = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(9))
    ours, theirs = (torch.autograd.grad((z * direction).sum(), given) for z in (got, want))
    for g, w in zip(ours, theirs):
        close(g, w)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("S", [4, 5, 7])
@pytest.mark.parametrize("size", [1.0, 8.0])
def test_marginals_by_enumeration(kind: str, S: int, size: float) -> None:
    ours, theirs = KINDS[kind]
    theta = (size * normal(S, 2, 3, S)).detach().requires_grad_()
    compare(edge_marginals(theta, ours), naive.edge_marginals(theta, theirs), (theta,))
    compare(log_partition(theta, ours), naive.log_partition(theta, theirs), (theta,))
    compare(brute_force(theta, ours), naive.edge_marginals(theta, theirs), (theta,))


@pytest.mark.parametrize("kind", KINDS)
def test_marginals_are_the_slopes_of_log_z(kind: str) -> None:
    theta = normal(1, 3, 6)
    (slope,) = torch.autograd.grad(log_partition(theta, KINDS[kind][0]).sum(), theta)
    close(slope, edge_marginals(theta, KINDS[kind][0]).detach())
    assert torch.autograd.gradgradcheck(lambda z: log_partition(z, KINDS[kind][0]), theta)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "chain" not in kind])
def test_hidden_edges(kind: str) -> None:
    """Also rows with fewer edges than there must be, and none; -inf hides, too."""
    ours, theirs = KINDS[kind]
    theta = normal(2, 2, 4, 5)
    keep = torch.rand(2, 4, 5, generator=torch.Generator().manual_seed(3)) < 0.6
    keep[0, 0], keep[1, 1], keep[1, 2] = False, torch.arange(5) == 2, True
    want = naive.edge_marginals(theta, theirs, keep)
    compare(edge_marginals(theta, ours, keep), want, (theta,))
    close(edge_marginals(theta.masked_fill(~keep, -math.inf), ours).detach(), want.detach())
    close(log_partition(theta, ours, keep).detach(), naive.log_partition(theta, theirs, keep).detach())
    (slope,) = torch.autograd.grad(log_partition(theta, ours, keep).clamp(min=-1e9).sum(), theta)
    close(slope, want.detach())


@pytest.mark.parametrize("kind", ["chain", "chain from"])
def test_hidden_keys_are_not_in_the_chain(kind: str) -> None:
    """The neighbours of what is hidden meet."""
    ours, theirs = KINDS[kind]
    theta = normal(2, 4, 6)
    keep = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 1]]).bool()
    got = edge_marginals(theta, ours, keep)
    for t in range(4):
        assert not got[t, ~keep[t]].any()
        if keep[t].any():
            row = theta[t, keep[t]]
            close(got[t, keep[t]].detach(), naive.row_marginals(row, theirs).detach())
            close(log_partition(theta, ours, keep)[t].detach(), naive.row_log_partition(row, theirs).detach())
    assert torch.autograd.grad(got.square().sum(), theta)[0].isfinite().all()


@pytest.mark.parametrize("C", [1, 2, 3])
def test_states_of_a_chain(C: int) -> None:
    theta, transition, initial = normal(1, 5, C), normal(2, C, C), normal(3, C)
    want, log_z = naive.chain_categorical(theta, transition, initial)
    got, ours = (f(theta, transition, initial) for f in (chain_marginals, chain_log_partition))
    if C > 1:
        given = (theta, transition, initial)
        compare(got, want, given)
    close(got.detach(), want.detach())
    close(ours.detach(), log_z.detach())


@pytest.mark.parametrize("hidden", [False, True])
def test_trees_by_enumeration(hidden: bool) -> None:
    theta, root = normal(1, 4, 4), normal(2, 4)
    keep = torch.rand(4, 4, generator=torch.Generator().manual_seed(3)) < 0.6 if hidden else None
    if keep is not None:
        keep[2] = False
    want = naive.tree_marginals(theta, root, keep)
    got = tree_marginals(theta, root, keep)
    for g, w in zip(got, want):
        close(g.detach(), w.detach())
    close(got[2].detach(), naive.tree_log_partition_matrix(theta, root, keep).detach())
    direction = normal(4, 4, 4).detach()
    ours, theirs = (torch.autograd.grad((z[0] * direction).sum(), (theta, root)) for z in (got, want))
    for g, w in zip(ours, theirs):
        close(g, w)
    close(tree_marginals(theta[None])[0][0].detach(), naive.tree_marginals(theta)[0].detach())
    close((got[0].sum(-1) + got[1]).detach(), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_expectations_of_values(kind: str) -> None:
    """Of sums, and of what is none: the expectation of a value isn't the value of the expectation."""
    ours, theirs = KINDS[kind]
    theta, v = normal(1, 2, 3, 5), normal(2, 2, 5, 4)
    log_prior = normal(3, 1, 3, 5)
    want = naive.expected_value(theta, theirs, v, None, log_prior)
    compare(expected_value(theta, ours, v, log_prior=log_prior), want, (theta, v, log_prior))

    def value(sets: Tensor) -> Tensor:
        return (sets @ v[0].detach()).tanh()

    row = theta[0, 0]
    want = naive.row_expected_value(row, theirs, lambda phi: value(torch.tensor([phi], dtype=torch.float64))[0])
    got = brute_force(row, ours, value)
    compare(got, want, (row,))
    assert (got - value(edge_marginals(row, ours)[None])[0]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["one", "at most one", "independent", "exactly two", "chain"])
def test_the_most_likely_set_is_the_limit(kind: str) -> None:
    """Hard attention: scores, and a chain's potentials, times a great number."""
    ours, theirs = KINDS[kind]
    if kind == "chain":
        ours = Chain(1e4 * TRANSITION)
    theta = normal(5, 6, 5).detach()
    want = torch.tensor([naive.row_mode(row, theirs) for row in theta], dtype=torch.float64)
    close(edge_marginals(1e4 * theta, ours), want)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_as_likely_as_they_are(kind: str) -> None:
    """Every set by itself, within five deviations."""
    ours, theirs = KINDS[kind]
    row, n = normal(6, 4).detach(), 8000
    drawn = sample_edges(row.expand(n, 4), ours, generator=torch.Generator().manual_seed(7))
    found = naive.configurations(row, theirs)
    log_z = naive.row_log_partition(row, theirs)
    counted = 0.0
    for phi, w in found:
        p, share = (w - log_z).exp(), (drawn == torch.tensor(phi)).all(-1).double().mean()
        assert (share - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-9
        counted += share.item()
    assert abs(counted - 1) < 1e-9


def test_samples_leave_hidden_edges_out() -> None:
    keep = torch.tensor([True, False, True, True])
    for structure, _ in KINDS.values():
        drawn = sample_edges(3 * torch.ones(50, 4), structure, keep.expand(50, 4))
        assert not drawn[:, 1].any()
    assert not sample_edges(torch.ones(2, 4), ExactlyK(4), keep.expand(2, 4)).any()


def test_priors_are_biases() -> None:
    r = torch.tensor(0.3, dtype=torch.float64)
    prior = geometric_log_prior(4, r, 6)
    close(prior.nan_to_num(neginf=-9.0), naive.geometric_log_prior(4, r, 6).nan_to_num(neginf=-9.0))
    theta = normal(1, 1, 1, 4, 6).detach()
    got = edge_marginals(theta, OneEdge(), log_prior=prior)
    own = naive.geometric_log_prior(4, r, 6, normalised=True).exp()
    weight = theta.exp() * own
    close(got, weight / weight.sum(-1, keepdim=True))
    assert geometric_log_prior(3, 0.5, dtype=torch.float64)[2, 0].item() == pytest.approx(2 * math.log(0.5))


def test_exactly_k_is_no_softmax_of_the_greatest() -> None:
    theta = normal(1, 4, 7).detach()
    m = edge_marginals(theta, ExactlyK(3))
    close(m.sum(-1), torch.full((4,), 3.0, dtype=torch.float64))
    assert (m > 0).all()
    assert (m < 1).all()


def test_slots_share_keys() -> None:
    theta, v = normal(1, 3, 5), normal(2, 5, 2)
    compare(slot_means(theta, v), naive.slot_update(theta, v), (theta, v))


NAMED = {"at_most_one": "at most one", "one": "one", "independent": "independent", "exactly_k": "exactly two"}


@pytest.mark.parametrize("structure", get_args(Name))
@pytest.mark.parametrize("causal", [False, True])
def test_a_layer_gives_the_expectation_over_all_sets(structure: Name, causal: bool) -> None:
    """The claim: through the layer, with prior odds, grouped keys, and, but for the chain, a causal mask."""
    part = Marginal(structure=structure, log_odds=0.4).double()
    q, k, v = normal(1, 2, 4, 5, 3), normal(2, 2, 2, 5, 3), normal(3, 2, 2, 5, 4)
    got = regard.attention(q, k, v, mask=masks.causal() if causal else None, normalizer=part)
    k2, v2 = (z.repeat_interleave(2, 1) for z in (k, v))
    theta = q @ k2.mT / math.sqrt(3) + 0.4
    keep = torch.ones(5, 5).tril().bool().expand(2, 4, 5, 5) if causal else None
    if structure != "chain":
        theirs = KINDS[NAMED[structure]][1]
        want = naive.expected_value(theta, theirs, v2, keep)
        if structure == "exactly_k" and causal:  # the first query sees one key, which counts in full
            want = torch.cat([v2[:, :, :1], want[:, :, 1:]], 2)
        compare(got, want, (q, k, v))
        return
    learned = part.transition
    assert learned is not None
    rows = []
    for t in range(5):
        last = t + 1 if causal else 5
        rows.append(naive.expected_value(theta[:, :, t : t + 1, :last], ("chain", learned), v2[:, :, :last]))
    compare(got, torch.cat(rows, 2), (q, k, v, learned))


@pytest.mark.parametrize("structure", get_args(Name))
@torch.no_grad()
def test_every_structure_streams_and_takes_padding(structure: Name) -> None:
    layer, x = of("marginal").build(structure=structure, causal=True), tokens(2, 7)
    want, state, outs = layer(x), layer.init_state(2, 7, dtype=torch.float64), []
    for t in range(7):
        out, state = layer.step(x[:, t : t + 1], state)
        outs.append(out)
    close(torch.cat(outs, 1), want)
    keep = torch.tensor([[True] * 4 + [False] * 3, [False, True, False] + [True] * 4])
    got = layer(x, mask=masks.padding(keep))
    for b in range(2):
        close(got[b, keep[b]], layer(x[b : b + 1, keep[b]])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_long_rows_and_great_scores_in_single_precision(kind: str) -> None:
    theta = (20 * normal(1, 2, 3000).detach()).requires_grad_()
    low = theta.detach().float().requires_grad_()
    want, got = (edge_marginals(z, KINDS[kind][0]) for z in (theta, low))
    assert (got - want).abs().max() < 1e-4
    assert got.max() <= 1 + 1e-5
    assert torch.autograd.grad(got.square().sum(), low)[0].isfinite().all()


def test_starting_values() -> None:
    assert torch.equal(Marginal(structure="chain", stay=0.7).transition.detach(), 0.7 * torch.eye(2))  # type: ignore[union-attr]
    assert not list(Marginal().parameters())
    plain = regard.create("marginal", dim=24, num_heads=6, structure="one")
    assert isinstance(plain.normalizer.known(), OneEdge)


def test_nothing_gives_nothing() -> None:
    for structure, _ in KINDS.values():
        assert edge_marginals(torch.zeros(2, 0), structure).shape == (2, 0)
        assert edge_marginals(torch.zeros(0, 3), structure).shape == (0, 3)


def test_refusals() -> None:
    for option, value in (("structure", "tree"), ("count", 0), ("stay", math.inf), ("log_odds", math.nan)):
        with pytest.raises(ValueError, match=option):
            Marginal(**{option: value})
    with pytest.raises(ValueError, match="k is too small"):
        ExactlyK(0)
    with pytest.raises(ValueError, match="transition has the wrong shape"):
        Chain(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="has another number of edges"):
        brute_force(torch.zeros(11), OneEdge())
    with pytest.raises(ValueError, match="has no edges"):
        log_partition(torch.zeros(2, 0), OneEdge())
    with pytest.raises(ValueError, match="rate is out of range"):
        geometric_log_prior(3, 1.0)
