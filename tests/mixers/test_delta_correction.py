"""Delta correction against loops, whose author has read neither code nor test, and the authors' numbers (B080)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from mixers import naive_delta_correction as naive
from regard import masks
from regard.laws.agreement import close
from regard.masks.rows import every_row, sees_any
from regard.mixers.delta_correction import DeltaCorrection
from regard.mixers.sparse_correction import delta_attention
from regard.routing.moba import MoBA

VECTORS = Path(__file__).parents[1] / "vectors" / "B080.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pattern(window: int = 4, sinks: int = 1) -> masks.Mask:
    return masks.causal() & (masks.window(window) | masks.prefix(sinks))


def heads(T: int, groups: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return normal(1, 2, 4, T, 3), normal(2, 2, groups, T, 3), normal(3, 2, groups, T, 5)


@pytest.mark.parametrize("mode", ["delta", "recompute"])
@pytest.mark.parametrize(("T", "stride", "tail"), [(13, 4, 0), (13, 3, 2), (12, 4, 5), (5, 4, 1), (3, 1, 0)])
def test_is_the_definition(T: int, stride: int, tail: int, mode: str) -> None:
    q, k, v = (z.requires_grad_() for z in heads(T))
    got = delta_attention(q, k, v, pattern(), stride=stride, tail=tail, mode=mode)
    cut = naive.cut_rows(T, stride, tail) if tail else 0
    want = naive.delta_attention(q, k, v, naive.window_sink(q, k, v, 4, 1), stride, tail=cut, mode=mode)
    close(got, want, "out")
    for mine, theirs in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (got, want)), strict=True):
        close(mine, theirs, "gradient")


@pytest.mark.parametrize(("case", "mode"), [("c1", "delta"), ("c2", "delta"), ("c3", "recompute")])
def test_gives_the_authors_numbers(case: str, mode: str) -> None:
    with np.load(VECTORS) as file:
        z = {name[3:]: torch.from_numpy(file[name]) for name in file if name.startswith(f"{case}_")}
    q, k, v = z["q"], z["k"], z["v"]
    sparse = pattern(int(z["window"]), int(z["sink"]))
    assert (delta_attention(q, k, v, sparse, mode="sparse") - z["sparse"]).abs().max() < 1e-10
    for method in (sparse, z["sparse"]):
        options = {"stride": int(z["gamma"]), "tail": int(z["tail"]), "mode": mode}
        assert (delta_attention(q, k, v, method, **options) - z["out"]).abs().max() < 1e-10


def test_corrected_outputs_are_nearer_to_full_attention() -> None:
    """Queries that lie near each other miss much the same; there is no tail."""
    torch.manual_seed(0)
    T, options = 256, {"stride": 8, "window": 16, "sinks": 4, "tail": 0, "causal": True}
    walk = normal(7, 1, T, 16).cumsum(1)
    x = (walk - walk.mean(1, keepdim=True)) / walk.std()
    made = {m: DeltaCorrection(16, 2, mode=m, **options).double() for m in ("delta", "recompute", "sparse")}
    for layer in made.values():
        layer.load_state_dict(made["delta"].state_dict())
    want = made["delta"].dense()(x)
    error = {m: float((layer(x) - want).detach().norm()) for m, layer in made.items()}
    assert error["delta"] < 0.7 * error["recompute"]
    assert error["recompute"] < error["sparse"]


def test_is_exact_where_nothing_is_missing() -> None:
    q, k, v = heads(21)
    want = regard.attention(q, k, v, mask=masks.causal())
    close(delta_attention(q, k, v, pattern(), stride=1, tail=0), want, "every query is dense")
    close(delta_attention(q, k, v, masks.causal(), stride=4, tail=0), want, "the sparse method misses nothing")
    got = delta_attention(q, k, v, pattern(), stride=4, tail=0)
    close(got[:, :, ::4], want[:, :, ::4], "at the dense queries")
    close(delta_attention(q, k, v, pattern(), stride=4, tail=30), want, "shorter than its tail")
    close(delta_attention(q, k, v, pattern(), stride=4, tail=8)[:, :, 12:], want[:, :, 12:], "in the tail")


def test_any_sparse_method_will_do() -> None:
    """One that chooses by content, and one that differs by head."""
    q, k, v = heads(32, 4)
    selector = MoBA(block=4, topk=2)
    chosen = regard.attention(q, k, v, mask=masks.causal(), selector=selector)
    by_head = masks.causal() & masks.per_head([masks.window(n) for n in (2, 3, 4, 5)])
    for method, sparse in ((selector, chosen), (by_head, regard.attention(q, k, v, mask=by_head))):
        got = delta_attention(q, k, v, method, stride=4, tail=0)
        close(got, naive.delta_attention(q, k, v, sparse, 4))
    layer = DeltaCorrection(8, 2, causal=True, pattern=MoBA(block=4, topk=1), stride=4, tail=0).double()
    assert layer(normal(1, 2, 20, 8)).isfinite().all()


def test_no_query_reads_what_comes_later() -> None:
    q, k, v = heads(23)
    whole = delta_attention(q, k, v, pattern(), stride=4, tail=0)
    for n in (1, 4, 5, 22):
        close(delta_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], pattern(), stride=4, tail=0), whole[:, :, :n])


@pytest.mark.parametrize("mask", [masks.causal(), masks.window(5), masks.blocks(4) & masks.causal(), masks.full()])
def test_rows_of_a_mask(mask: masks.Mask) -> None:
    for T, S, step, count in ((20, 20, 3, 7), (20, 27, 4, 5), (9, 9, 1, 9), (8, 8, 5, 1)):
        rows = every_row(mask, step, T=T, S=S, count=count)
        want = mask.dense(T, S)[:, :, : step * count : step]
        assert torch.equal(rows.dense(count, S), want)
        assert rows.count(count, S) == int(want.sum())


def test_rows_that_may_see_nothing() -> None:
    keep = torch.tensor([[0, 0, 1, 1, 0, 1], [1] * 6, [0] * 6]).bool()
    tree = masks.dense(torch.ones(6, 6).tril(-1).bool())
    for mask in (masks.padding(keep), masks.padding(keep) & masks.causal(), tree, tree & masks.padding(keep)):
        got = sees_any(mask, torch.arange(6), 6)
        want = mask.dense(6).any(-1)
        assert torch.equal(got.expand(3, 1, 6), want.expand(3, 1, 6))
    assert sees_any(masks.causal(), torch.arange(6), 6) is None


def test_a_prompt_and_what_follows() -> None:
    torch.manual_seed(0)
    rotary = regard.positions.Rotary(4)
    layer = DeltaCorrection(12, 3, stride=3, window=2, sinks=1, tail=2, causal=True, position=rotary).double()
    x, full = normal(5, 2, 15, 12), layer.dense()
    y, state = layer.prompt(x[:, :12], 15)
    close(y, layer(x[:, :12]), "the prompt")
    more = []
    for t in range(12, 15):
        out, state = full.step(x[:, t : t + 1], state)
        more.append(out)
    close(torch.cat(more, 1), full(x)[:, 12:], "what follows")
    assert full.q_proj is layer.q_proj
    assert full.training == layer.training


def test_documents_have_tails_of_their_own() -> None:
    layer = DeltaCorrection(12, 3, stride=3, window=2, sinks=0, tail=2, causal=True).double()
    x, packed = normal(5, 1, 20, 12), masks.packed(torch.tensor([0, 7, 19]))
    got = layer(x, mask=packed)
    close(got[:, :7], layer(x[:, :7]))
    close(got[:, 7:19], layer(x[:, 7:19]))
    assert not got[:, 19:].any()


def test_refusals() -> None:
    q, k, v = heads(5)
    with pytest.raises(
        TypeError, match=r"delta_attention: sparse has the wrong type \(got str\); expected a Mask, a Sel"
    ):
        delta_attention(q, k, v, "window")
    with pytest.raises(ValueError, match="delta_attention: sparse has the wrong shape"):
        delta_attention(q, k, v, q)
    with pytest.raises(ValueError, match="delta_attention: mode is unknown"):
        delta_attention(q, k, v, pattern(), mode="full")
    with pytest.raises(ValueError, match="DeltaCorrection: stride is too small"):
        regard.create("delta_correction", dim=8, num_heads=2, stride=0)
    with pytest.raises(ValueError, match="DeltaCorrection: tail is too small"):
        regard.create("delta_correction", dim=8, num_heads=2, tail=-1)
    with pytest.raises(TypeError, match="DeltaCorrection: pattern has the wrong type"):
        DeltaCorrection(8, 2, pattern="window")
    with pytest.raises(ValueError, match="DeltaCorrection: position adds to scores or values"):
        DeltaCorrection(8, 2, position=regard.positions.Alibi(2))
