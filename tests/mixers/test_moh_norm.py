"""Mixture-of-head attention by the norms of queries, against loops (heads/naive_moh.py)."""

import math

import pytest
import torch
from torch import Tensor

import regard
from heads import naive_moh
from regard import masks
from regard.laws.agreement import close
from regard.mixers.moh_norm import MixtureOfHeadsByNorm, norm_scores


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(dim: int, heads: int, seed: int = 0, **options) -> MixtureOfHeadsByNorm:
    layer = MixtureOfHeadsByNorm(dim, heads, **options).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.5 * normal(100 * seed + n, *p.shape))
    return layer.eval()


def naive(layer: MixtureOfHeadsByNorm, x: Tensor, **given) -> tuple[Tensor, Tensor, list]:
    own = dict(layer.named_parameters())
    weights = [own[f"{n}_proj.weight"] for n in "qkvo"]
    biases = {f"b{n}": own.get(f"{n}_proj.bias") for n in "qkvo"}
    heads = {"num_heads": layer.num_heads, "num_kv_heads": layer.num_kv_heads}
    counts = {"num_shared": layer.shared_heads, "top_k": layer.active}
    return naive_moh.moh_llm(x, *weights, **biases, **heads, **counts, straight_through=layer.training, **given)


def turned(row: Tensor, place: int, base: float = 100.0) -> Tensor:
    half = len(row) // 2
    out = list(row)
    for a in range(half):
        angle = place * base ** (-2 * a / len(row))
        out[a] = row[a] * math.cos(angle) - row[a + half] * math.sin(angle)
        out[a + half] = row[a] * math.sin(angle) + row[a + half] * math.cos(angle)
    return torch.stack(out)


CASES = [(6, 3, 2, 2, 100.0, False), (4, 2, 1, 4, None, True), (4, 0, 2, 1, 100.0, True), (3, 1, 2, 3, None, False)]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("heads", "shared", "active", "groups", "base", "bias"), CASES)
def test_is_the_definition(heads, shared, active, groups, base, bias, training) -> None:
    options = {"shared_heads": shared, "active": active, "num_kv_heads": groups if heads % groups == 0 else heads}
    layer = filled(10, heads, head_dim=4, bias=bias, base=base, causal=True, **options).train(training)
    x = normal(1, 2, 4, 10).requires_grad_()
    allowed = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.7
    want, gates, _ = naive(layer, x, allowed=allowed.tril(), rotate=turned if base else None)
    got = layer(x, mask=allowed[:, None])
    close(layer.gates(x), gates, "gates")
    close(got, want, "out")
    g, of = normal(9, *got.shape), [x, *layer.parameters()]
    for mine, theirs in zip(*(torch.autograd.grad((o * g).sum(), of) for o in (got, want)), strict=True):
        close(mine, theirs, "gradient")


def test_reads_another_sequence() -> None:
    layer = filled(10, 4, head_dim=4, base=None)
    x, context = normal(1, 2, 3, 10), normal(2, 2, 5, 10)
    close(layer(x, context), naive(layer, x, context=context)[0])


def test_the_loss_is_the_papers() -> None:
    layer, x = filled(10, 6, head_dim=4, active=2).train(), normal(1, 2, 5, 10)
    keep = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0]], dtype=torch.bool)
    for kept in (None, keep):
        real = x.flatten(0, 1) if kept is None else x[kept]
        odds, often = torch.zeros(3, dtype=x.dtype), torch.zeros(3, dtype=x.dtype)
        for token in real:
            r = torch.stack([row.square().sum().sqrt() for row in (layer.q_proj.weight @ token).reshape(6, 4)[3:]])
            p = torch.exp(r / r.std()) / torch.exp(r / r.std()).sum()
            odds = odds + p / len(real)
            often[r.topk(2).indices] += 1 / len(real)
        want = (odds * often).sum()
        got = layer.balance_loss(x, mask=None if kept is None else masks.padding(kept))
        close(got, want)
        close(*(torch.autograd.grad(loss, layer.q_proj.weight)[0] for loss in (got, want)), "gradient")
    spoilt = x.masked_fill(~keep[..., None], math.nan)
    close(layer.balance_loss(spoilt, mask=masks.padding(keep)), got)
    assert filled(10, 4, head_dim=4, shared_heads=4, active=0).balance_loss(x) == 0


def test_a_trained_layer_loses_only_the_heads_with_short_queries() -> None:
    """With heads side by side in the output, each token's three shortest queries of the last six give 0, and all other
    features are those of the layer that was taken over."""
    plain = regard.create("rotary", dim=32, num_heads=8, causal=True, base=500000.0).double()
    with torch.no_grad():
        plain.o_proj.weight.copy_(torch.eye(32))
    layer = regard.create("moh_norm", dim=32, num_heads=8, causal=True, shared_heads=2, active=3).double().eval()
    layer.load_state_dict(plain.state_dict())
    x = normal(1, 2, 9, 32)
    got, want = (module(x).unflatten(-1, (8, 4)) for module in (layer, plain))
    norms = plain.q_proj(x).unflatten(-1, (8, 4)).norm(dim=-1)
    norms[..., :2] = math.inf
    short = norms < norms.sort(-1).values[..., 3:4]
    assert torch.equal(got.eq(0).all(-1), short)
    assert short.sum(-1).eq(3).all()
    assert len({tuple(row.tolist()) for row in short.flatten(0, 1)}) > 1
    close(got[~short], want[~short])


def test_all_heads_active_is_the_layer_itself() -> None:
    plain = regard.create("rotary", dim=24, num_heads=6, causal=True, base=500000.0).double()
    layer = regard.create("moh_norm", dim=24, num_heads=6, causal=True, active=3).double()
    layer.load_state_dict(plain.state_dict())
    x = normal(1, 2, 9, 24)
    for training in (True, False):
        assert (layer.train(training)(x) - plain(x)).abs().max() < 1e-12


def test_equal_norms_are_divided_by_one() -> None:
    q = torch.ones(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    close(norm_scores(q), torch.full((1, 2, 3), 2.0, dtype=torch.float64))
    assert torch.autograd.grad(norm_scores(q).sum(), q)[0].isfinite().all()
    zero = torch.zeros(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(norm_scores(zero).sum(), zero)[0].isfinite().all()


def test_defaults_are_the_papers_llama() -> None:
    layer = MixtureOfHeadsByNorm(64, 32)
    assert (layer.shared_heads, layer.active, layer.auxiliary_weight, layer.position.base) == (16, 8, 0.01, 500000.0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="active is too large"):
        MixtureOfHeadsByNorm(8, 4, shared_heads=2, active=3)
    with pytest.raises(ValueError, match="active leaves no head"):
        MixtureOfHeadsByNorm(8, 4, shared_heads=0, active=0)
    with pytest.raises(ValueError, match="head_dim is odd"):
        MixtureOfHeadsByNorm(12, 4)
