"""Window-query attention against loops whose author saw the equations only, and the authors' numbers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from mixers import naive_window_query as naive
from regard import masks
from regard.laws.agreement import close
from regard.mixers.multi_query import MultiQueryEncoder, NextItem, WindowStack
from regard.mixers.window_query import WindowQueryAttention, window_mean
from regard.training.transition_distillation import transition_counts, transition_distillation, transition_labels

VECTORS = Path(__file__).parents[1] / "vectors" / "window_query.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


NAMES = {"attend.norm": "norm1", "norm": "norm2"}
MAPS = {"attend.q_proj": "q", "attend.k_proj": "k", "attend.v_proj": "v", "first": "1", "second": "2"}


def fill(stack: WindowStack, z: dict[str, Tensor], side: str) -> None:
    given = {f"norm.{kind}": z[f"{side}_final_{kind}"] for kind in ("weight", "bias")}
    for n in range(len(stack.blocks)):
        for own, name in NAMES.items():
            given |= {f"blocks.{n}.{own}.{kind}": z[f"{side}{n}_{name}_{kind}"] for kind in ("weight", "bias")}
        for own, name in MAPS.items():
            given |= {
                f"blocks.{n}.{own}.weight": z[f"{side}{n}_W{name}"],
                f"blocks.{n}.{own}.bias": z[f"{side}{n}_b{name}"],
            }
    stack.load_state_dict(given)


def test_gives_the_authors_numbers() -> None:
    with np.load(VECTORS) as file:
        z = {k: torch.from_numpy(file[k]) for k in file}
    model = NextItem(7, 6, 2, max_length=6, mix=0.3, num_blocks=2).double()
    with torch.no_grad():
        model.items.copy_(z["item"])
        model.positions.copy_(z["position"])
    for side in ("short", "long"):
        fill(getattr(model.encoder, side), z, side)
    items, target = z["input"].long(), z["target"].long()
    x, keep = model.embed(items)
    close(x, z["x0"])
    short, long = model.encoder.short(x, keep), model.encoder.long(x, keep)
    close(short, z["short"])
    close(long, z["long"])
    close(model(items), z["logits"])
    table = (model.items, model.positions)
    got = torch.autograd.grad((long * z["w"]).sum(), table)
    close(got[0], z["grad_item"])
    close(got[1], z["grad_position"])
    close(transition_labels(z["transitions"]), z["kd_labels"])
    found, distilled = model.loss(items, target), transition_distillation(model.items, items, z["transitions"])
    close(found, z["loss_rec"])
    close(distilled, z["loss_kd"])
    loss = found + 0.1 * distilled + 1e-4 / 2 * sum((p * p).sum() for p in model.parameters())
    close(loss, z["loss"])
    close(torch.autograd.grad(loss, model.items)[0], z["grad_item_of_loss"])


def layer(**options: int | float) -> WindowQueryAttention:
    made = regard.create("window_query", dim=6, num_heads=2, causal=True, **options).double()
    for n, p in enumerate(made.parameters()):
        nn.init.normal_(p, std=0.7, generator=torch.Generator().manual_seed(n))
    return made


def loops(made: WindowQueryAttention, x: Tensor, keep: Tensor) -> Tensor:
    given = {"norm_weight": made.norm.weight, "norm_bias": made.norm.bias, "num_heads": 2, "window": made.window}
    for n in "qkv":
        proj = getattr(made, f"{n}_proj")
        given |= {f"W{n}": proj.weight, f"b{n}": proj.bias}
    return naive.window_query_attention(x, keep, **given)


@pytest.mark.parametrize("window", [1, 2, 3, 9])
@pytest.mark.parametrize("padded", ["", "front", "anywhere"])
def test_the_layer_and_its_steps_equal_the_loops(window: int, padded: str) -> None:
    made, x = layer(window=window), normal(1, 3, 6, 6).requires_grad_()
    keep = torch.ones(3, 6, dtype=torch.bool)
    if padded == "front":
        keep[0, :2] = keep[2, :5] = False
    elif padded:
        keep[0, 5:] = keep[1, 2] = keep[2, 1:4] = False
    want = loops(made, x, keep)
    for mask in (keep, keep[:, None, None], masks.padding(keep), *([] if padded else [None])):
        got = made(x, mask=mask)
        close(got[keep], want[keep])
    leaves = (x, *made.parameters())
    weights = normal(9, *want.shape) * keep[..., None]
    for one, other in zip(*(torch.autograd.grad((y * weights).sum(), leaves) for y in (got, want)), strict=True):
        close(one, other)
    for sizes in ((1,) * 6, (4, 0, 2)):
        state, outs, at = made.init_state(3, 6), [], 0
        for t in sizes:
            out, state = made.step(x[:, at : at + t], state, mask=keep[:, at : at + t] if padded else None)
            outs, at = [*outs, out], at + t
            assert state.recent.shape[1] == min(at, window - 1)
        close(torch.cat(outs, 1)[keep], want[keep])


def test_window_mean_equals_the_loops() -> None:
    x, keep = normal(2, 2, 7, 3), torch.rand(2, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    for window in (1, 3, 20):
        got = window_mean(x, keep, window)
        for b, t in np.ndindex(2, 7):
            close(got[b, t], naive.window_mean(x[b], keep[b], t, window))
        close(window_mean(x, keep, window, 2), got[:, -2:])


def test_the_order_within_a_window_changes_no_answer() -> None:
    """The last token but one changes places with the last: of a window of 3 the last answer stays, of 1 it doesn't."""
    x = normal(3, 2, 6, 6)
    other = x[:, [0, 1, 2, 3, 5, 4]]
    same, changed = layer(window=3), layer(window=1)
    close(same(other)[:, -1], same(x)[:, -1])
    assert (changed(other)[:, -1] - changed(x)[:, -1]).abs().max() > 0.1


def test_equal_stacks_of_equal_windows_are_one() -> None:
    made = MultiQueryEncoder(6, 2, windows=(1, 1), mix=0.3, num_blocks=2).double()
    made.long.load_state_dict(made.short.state_dict())
    x, keep = normal(4, 2, 5, 6), torch.tensor([[True] * 5, [False] * 2 + [True] * 3])
    close(made(x, mask=keep), made.short(x, keep))
    close(made(x, mask=masks.padding(keep)), made(x.masked_fill(~keep[..., None], 7.0), mask=keep))
    close(made(x, mask=keep)[1:, 2:], made(x[1:, 2:]))


def test_counts_and_labels_equal_the_loops() -> None:
    sequences = [[0, 1, 2, 1], [5, 3, 0], [4], [], [2, 2, 2, 0, 1]]
    for span in (1, 2, 7):
        counts = transition_counts(sequences, 5, span)
        assert counts.tolist() == naive.transition_counts(sequences, 5, span).tolist()
        close(transition_labels(counts, 0.3), naive.transition_labels(counts, 0.3))
    assert torch.allclose(transition_labels(counts)[4], torch.full((5,), 0.2, dtype=torch.float64)), "nothing follows"


def test_distillation_equals_the_loops() -> None:
    table = normal(5, 5, 4).requires_grad_()
    counts = transition_counts([[0, 1, 2, 3, 4, 0, 1, 2]], 5)
    items = torch.tensor([[5, 0, 1, 1], [2, 3, 4, 5]])
    got = transition_distillation(table, items, counts, 0.5)
    want = naive.transition_distillation(table, items, naive.transition_labels(counts, 0.5), 0.5)
    close(got, want)
    for one, other in zip(*(torch.autograd.grad(z, table) for z in (got, want)), strict=True):
        close(one, other)
    close(transition_distillation(table, items, counts, 0.5, asking=table * 1), got)
    assert float(transition_distillation(table, items[:, :0], counts).detach()) == 0


def test_starts_as_written() -> None:
    made = regard.create("window_query", dim=6, num_heads=2, causal=True)
    assert (made.window, made.norm.eps, made.dropout) == (3, 1e-24, 0.0)
    torch.manual_seed(0)
    model = NextItem(500, 16, max_length=400)
    for table in (model.items, model.positions):
        assert float(table.detach().std()) == pytest.approx(0.01, rel=0.05)
    assert (model.encoder.mix, model.encoder.short.blocks[0].attend.window) == (0.5, 1)
    assert model.encoder.long.blocks[0].attend.window == 3
    assert len(model.encoder.long.blocks) == 1
    items = torch.tensor([[500, 500, 3, 4]])
    assert torch.equal(model(items)[..., 500], torch.zeros(1, 4)), "the class of padding"
    close(model.double()(items[:, 2:]), model(items)[:, 2:])


def test_dropout_is_for_training() -> None:
    model = NextItem(7, 8, 2, max_length=5, dropout=0.5).double()
    items = torch.tensor([[1, 2, 3, 4, 5]])
    assert torch.equal(model.eval()(items), model(items))
    assert not torch.equal(model.train()(items), model(items))
    made = layer(dropout=0.5).train()
    x = normal(1, 2, 5, 6)
    assert not torch.equal(made(x), made(x))


def test_refuses() -> None:
    with pytest.raises(ValueError, match="window is too small"):
        WindowQueryAttention(6, 2, window=0)
    with pytest.raises(ValueError, match="dim is no multiple of num_heads = 4"):
        WindowQueryAttention(6, 4)
    with pytest.raises(ValueError, match="causal is off"):
        WindowQueryAttention(6, 2, causal=False)
    with pytest.raises(ValueError, match="x has the wrong shape"):
        layer()(torch.zeros(2, 3, 5))
    with pytest.raises(TypeError, match="state has the wrong type"):
        layer().step(normal(0, 2, 1, 6), None)
    with pytest.raises(ValueError, match="state has another batch than x"):
        layer().step(normal(0, 2, 1, 6), layer().init_state(1, 3))
    with pytest.raises(ValueError, match="windows has the wrong length"):
        MultiQueryEncoder(6, windows=(1,))
    with pytest.raises(ValueError, match="mix is out of range"):
        MultiQueryEncoder(6, mix=1.5)
    with pytest.raises(ValueError, match="num_blocks is too small"):
        MultiQueryEncoder(6, num_blocks=0)
    with pytest.raises(ValueError, match="items are too many"):
        NextItem(3, 4, max_length=2)(torch.zeros(1, 3, dtype=torch.long))
    counts = torch.zeros(3, 3)
    for bad in (0.0, math.nan):
        with pytest.raises(ValueError, match="temperature is out of range"):
            transition_distillation(torch.zeros(3, 2), torch.zeros(1, dtype=torch.long), counts, bad)
    with pytest.raises(ValueError, match="transitions has negative counts"):
        transition_distillation(torch.zeros(3, 2), torch.zeros(1, dtype=torch.long), counts - 1)
    with pytest.raises(ValueError, match="span is too small"):
        transition_counts([[0, 1]], 2, 0)
