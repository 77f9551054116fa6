"""Dynamic grouped-query attention against loops (naive_kdgqa.py) and the authors' numbers (A051.npz)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from mixers import naive_kdgqa as naive
from regard import masks
from regard.laws.agreement import close
from regard.mixers.dgqa import DynamicKeyDrivenAttention
from regard.mixers.kdgqa import allocate

VECTORS = Path(__file__).parents[1] / "vectors" / "A051.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(dim: int, heads: int, groups: int, **options) -> DynamicKeyDrivenAttention:
    layer = DynamicKeyDrivenAttention(dim, heads, num_kv_heads=groups, **options).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.5 * normal(n, *p.shape))
        for g, rows in enumerate(layer.k_proj.weight.unflatten(0, (groups, -1))):
            rows.mul_(1 + 0.8 * g)
    return layer


def given(layer: DynamicKeyDrivenAttention) -> tuple[list[Tensor], dict]:
    own = dict(layer.named_parameters())
    sizes = {"num_heads": layer.num_heads, "num_kv_heads": layer.num_kv_heads, "mode": layer.kind}
    return [own[f"{n}_proj.weight"] for n in "qkvo"], {**sizes, **{f"b{n}": own.get(f"{n}_proj.bias") for n in "qkvo"}}


@pytest.mark.parametrize("kind", ["diff", "ema"])
def test_gives_the_authors_numbers(kind: str) -> None:
    """Five steps of training, groups set anew in every second."""
    with np.load(VECTORS) as file:
        head = f"dg_{kind}_"
        n = {k.removeprefix(head): torch.from_numpy(file[k]) for k in file if k.startswith(head)}
    layer = regard.create("dgqa", dim=16, num_heads=8, num_kv_heads=4, causal=False, kind=kind, window=2, bias=True)
    weights = {f"{name}_proj.weight": n[f"W{name}"] for name in "qkvo"}
    layer.double().load_state_dict(weights | {f"{name}_proj.bias": n[f"b{name}"] for name in "qkvo"}, strict=False)
    layer.train()
    for step, x in enumerate(n["x"]):
        close(layer(x), n["out"][step], "out")
        assert torch.equal(layer.groups, n["allocation"][step])
        close(layer.cache, n["cache_after"][step], "memory")
    assert layer.steps == 5


def usual_picks(norms: list[Tensor], cache: list[Tensor], kind: str, heads: int = 6) -> list[int]:
    """What would be drawn if heads were taken from those that have most, and given to those that have least."""
    z = [float(abs(c - n) if kind == "diff" else 0.9 * n + 0.1 * c) for n, c in zip(norms, cache, strict=True)]
    counts, picks = [round(heads * one / sum(z)) for one in z], []
    while sum(counts) != heads:
        over = sum(counts) > heads
        picks.append(counts.index(max(counts) if over else min(counts)))
        counts[picks[-1]] += -1 if over else 1
    return picks


@pytest.mark.parametrize(("kind", "window", "bias"), [("diff", 1, True), ("diff", 3, False), ("ema", 2, True)])
def test_training_and_evaluation_are_the_definition(kind: str, window: int, bias: bool) -> None:
    layer = filled(10, 6, 3, head_dim=3, kind=kind, window=window, bias=bias)
    weights, rest = given(layer)
    cache, split = [torch.zeros((), dtype=torch.float64)] * 3, [2, 2, 2]
    for step in range(5):
        x = ((1 + step) * normal(step, 2, 4, 10)).requires_grad_()
        keep = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0]], dtype=torch.bool) if step % 2 else None
        allowed, mask = (None, None) if keep is None else (keep[:, None].expand(-1, 4, -1), masks.padding(keep))
        with torch.random.fork_rng():
            torch.manual_seed(step)
            order = torch.rand(2, 3, dtype=torch.float64)
            torch.manual_seed(step)
            got = layer(x, mask=mask)
        picks = [int(i) for turn in order for i in turn.argsort(descending=True)[:1]]
        more = {"cache": cache, "step": step, "window": window, "allowed": allowed, "keep": keep, "picks": picks}
        want, split, cache = naive.dgqa(x, *weights, split=split, **more, **rest)
        close(got, want, "out")
        assert layer.groups.tolist() == split
        close(layer.cache, torch.stack(cache), "memory")
        g, of = normal(99, *got.shape), [x, *layer.parameters()]
        for mine, theirs in zip(*(torch.autograd.grad((o * g).sum(), of) for o in (got, want)), strict=True):
            close(mine, theirs, "gradient")
    layer.eval()
    for step in range(2):  # the authors' evaluation, which remembers
        x = normal(20 + step, 2, 4, 10)
        norms = naive.key_norms(naive.keys(x, weights[1], rest["bk"], 3))
        more = {"cache": cache, "training": False, "picks": usual_picks(norms, cache, kind)}
        want, split, cache = naive.dgqa(x, *weights, split=split, **more, **rest)
        close(layer(x), want, "out in evaluation")
        close(layer(x), want, "once more")
        layer.remember(x)
        close(layer.cache, torch.stack(cache), "memory")


@pytest.mark.parametrize("seed", range(40))
def test_random_repair_takes_from_those_that_have(seed: int) -> None:
    """The first repair of a kind, by the definition's picks; a pick that has none to give is passed over."""
    draw = torch.Generator().manual_seed(seed)
    G = 2 + seed % 5
    H, shares = 2 * G, torch.rand(G, generator=draw, dtype=torch.float64).pow(4)
    order = torch.rand(G // 2 + 1, G, generator=draw, dtype=torch.float64)
    left = (shares / shares.sum() * H).round()
    picks = []
    for turn in order:
        off = left.sum() - H
        able = [i for i in turn.argsort(descending=True).tolist() if off <= 0 or left[i] > 0]
        picks.append(able[0])
        left[able[0]] -= off.sign()
    want = naive.dgqa_allocation(list(shares), [torch.zeros(())] * G, H, "diff", picks)
    assert allocate(shares, H, order).tolist() == want
    assert sum(want) == H


def test_query_heads_follow_the_keys_that_change() -> None:
    """Training writes the memory; then one key head's keys grow, and query heads that read it become more, until the
    memory has caught up."""
    layer = filled(16, 8, 4).train()
    x, read = normal(1, 2, 6, 16), []
    with torch.no_grad():
        layer.o_proj.weight.copy_(torch.eye(16))
        layer.v_proj.weight[2:].zero_()
        layer.remember(x)
        layer.cache.mul_(0.9)
        for grown in (1, 20):
            layer.k_proj.weight[:2] *= grown
            read.append(int(layer(x).unflatten(-1, (8, 2)).ne(0).any(-1).any(1).any(0).sum()))
    assert read[0] <= 1
    assert read[1] >= 3


def test_nothing_to_tell_heads_apart_shares_them_evenly() -> None:
    layer, x = filled(10, 6, 3, head_dim=3).eval(), normal(1, 2, 4, 10)
    layer.remember(x)
    assert layer.allocation(layer.split(x, x)[1]).tolist() == [2, 2, 2]


def test_groups_as_trained_are_moved_by_no_input() -> None:
    layer = filled(10, 6, 3, head_dim=3, kind="ema", evaluation="trained")
    for n in range(3):
        layer.train()(normal(n, 2, 4, 10))
    trained, x = layer.groups.tolist(), normal(7, 2, 4, 10)
    weights, rest = given(layer.eval())
    rest.pop("mode")
    for scale in (1, 100):
        close(layer(scale * x), naive.gqa(scale * x, *weights, allocation=trained, **rest))
    assert layer.groups.tolist() == trained != [2, 2, 2]


def test_steps_start_again_where_an_epoch_does() -> None:
    layer = filled(10, 6, 3, head_dim=3, window=100).train()
    layer(normal(1, 2, 4, 10))
    before = layer.cache.clone()
    layer(normal(2, 2, 4, 10))
    assert torch.equal(layer.cache, before)
    layer.restart()
    layer(normal(2, 2, 4, 10))
    assert not torch.equal(layer.cache, before)


def test_beta_weighs_the_batch_at_hand() -> None:
    layer, x = filled(10, 6, 3, head_dim=3, kind="ema", beta=0.0).eval(), normal(1, 2, 4, 10)
    layer.cache.copy_(torch.tensor([4.0, 1.0, 1.0]))
    assert layer.allocation(layer.split(x, x)[1]).tolist() == [4, 1, 1]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="kind is unknown"):
        DynamicKeyDrivenAttention(8, 4, kind="sum")
    with pytest.raises(ValueError, match="evaluation is unknown"):
        DynamicKeyDrivenAttention(8, 4, evaluation="frozen")
    with pytest.raises(ValueError, match="window is too small"):
        DynamicKeyDrivenAttention(8, 4, window=0)
    with pytest.raises(ValueError, match="beta is out of range"):
        DynamicKeyDrivenAttention(8, 4, beta=1.5)
