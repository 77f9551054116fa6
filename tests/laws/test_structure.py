"""L3, L4, L6, L10, L17: what may reach what, exactly, and nothing else does."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import regard
from laws.subject import (
    BATCHED,
    B,
    T,
    build,
    causalities,
    close,
    crossings,
    field_of,
    form,
    inputs,
    law,
    reaches,
    run,
    same,
    tokens,
)
from regard.pipeline.head_mixer import HeadMixer

NAN = float("nan")


def check_field(name: str, got: Tensor, allowed: Tensor) -> None:
    leaks = (got & ~allowed).nonzero().tolist()
    assert not leaks, f"outputs see tokens outside the receptive field: {leaks[:5]}"
    if not {"sparse", "routed"} & regard.card(name).traits:
        lost = (allowed & ~got).nonzero().tolist()
        assert not lost, f"outputs miss tokens of their receptive field: {lost[:5]}"


def check_span(module: regard.Attention) -> None:
    """A window of W sees W keys back, its own included, by count and not by the mask's own predicate."""
    back, ahead = module.receptive_field().span
    i, j = reaches(module, tokens(1)).nonzero().T
    assert (i - j).max() <= back, f"a query sees {int((i - j).max()) + 1} keys back, more than {back + 1}"
    assert (j - i).max() <= ahead, f"a query sees {int((j - i).max())} keys ahead, more than {ahead}"


@law("L3")
def test_receptive_field(name: str) -> None:
    """Both ways: a token outside the receptive field has gradient exactly 0, one inside has not."""
    for causal in causalities(name):
        module = build(name, causal=causal)
        if hasattr(module, "receptive_field"):
            check_span(module)
        got, allowed = reaches(module, tokens(1)), field_of(module, T) | torch.eye(T, dtype=torch.bool)
        # Without a receptive field of its own only the leaks can be judged: nothing sees the future.
        check_field(name, got, allowed if hasattr(module, "receptive_field") else allowed & (got | ~allowed))


@law("L17", needs="cross")
def test_alignment_of_unequal_lengths(name: str) -> None:
    """T != S: the last query stands where the last key stands; queries before the first key see nothing."""
    for causal in crossings(name):
        module = build(name, causal=causal)
        for length, keys in ((5, 9), (9, 5), (1, 7)):
            got = reaches(module, tokens(1, length), tokens(1, keys, seed=5))
            check_field(name, got, field_of(module, length, keys))


@law("L4", needs="causal")
def test_future_changes_nothing(name: str) -> None:
    """The future times 100, bit for bit; and as NaN, where masked keys are promised not to poison."""
    module, x = build(name, causal=True), tokens()
    want = module(x)
    for last in (0, 4, T - 2):
        future = x.clone()
        future[:, last + 1 :] *= 100
        same(module(future)[:, : last + 1], want[:, : last + 1], "the past")
        if isinstance(module, regard.Attention | HeadMixer):
            future[:, last + 1 :] = NAN
            out = module(future)
            same(out[:, : last + 1], want[:, : last + 1], "the past of NaN")
            assert not out[:, -1].isfinite().any()


@law("L6", needs="causal")
def test_prefixes(name: str) -> None:
    """f(x[:t]) = f(x)[:t], and so for the gradients of a loss on the first t outputs."""
    module, x = build(name, causal=True), tokens()
    grad_out = tokens(seed=6)
    for t in (1, 2, 5, T - 1):
        part = grad_out.clone()
        part[:, t:] = 0
        whole = run(module, x, grad_out=part)
        short = run(module, x[:, :t], grad_out=grad_out[:, :t])
        close(whole["out"][:, :t], short["out"], "out")
        same(whole["input0"][:, t:], torch.zeros_like(x[:, t:]), "gradient of the future")
        close(whole["input0"][:, :t], short["input0"], "input0")
        for key in whole.keys() - {"out", "input0"}:
            close(whole[key], short[key], key)


@law("L10", protocols=BATCHED)
def test_batch_rows_do_not_meet(name: str) -> None:
    """Another batch row changes nothing; alone is as in the batch."""
    for causal in causalities(name):
        module = build(name, causal=causal)
        given = (tokens(3),) if regard.card(name).protocol in ("TokenMixer", "Pooler") else inputs(name)
        batch = len(given[0])

        def rows(change: Callable[[Tensor], Tensor], given=given, batch=batch) -> list[Tensor]:
            return [change(g) if g.is_floating_point() and len(g) == batch else g for g in given]

        def replaced(g: Tensor) -> Tensor:
            return torch.cat([g[:1], 7 * g[1:2].flip(1), g[2:]])

        want, got = module(*given), module(*rows(replaced))
        same(got[0], want[0], "row 0")
        same(got[2:], want[2:], "rows after 1")
        close(module(*rows(lambda g: g[1:2])), want[1:2], "row 1 alone")


@law("L12", protocols="GraphMixer")
def test_order_of_nodes_and_edges_is_free(name: str) -> None:
    """Nodes under other numbers, and edges in another order, give the same answers."""
    module, (nodes, edges, *rest) = build(name), inputs(name)
    generator = torch.Generator().manual_seed(0)
    order, shuffled = (torch.randperm(n, generator=generator) for n in (len(nodes), edges.shape[1]))
    moved = [r[order] if len(r) == len(nodes) else r for r in rest]
    if all(len(r) == len(nodes) for r in rest):
        close(module(nodes, edges[:, shuffled], *rest), module(nodes, edges, *rest), "edges in another order")
    if "position_free" in regard.card(name).traits:
        got = module(nodes[order], order.argsort()[edges], *moved)
        close(got, module(nodes, edges, *rest)[order], "renumbered nodes")


@law("L17", function=True)
@pytest.mark.parametrize("kernel", ["eager", "chunked"])
def test_one_query_is_the_last(name: str, kernel: str) -> None:
    """A causal pass over the last queries alone equals the last rows of the whole pass."""
    if "causal" not in regard.card(name).supports:
        return
    f = form(name)
    if any(getattr(p, "halo", 0) for p in f.parts.values()):
        return  # earlier query rows belong to its input
    q, k, v = f.qkv()
    whole = f(q, k, v, causal=True, kernel=kernel)
    if f.rotates:  # positions count from the first key
        assert whole.shape == (B, *q.shape[1:3], v.shape[3])
    for t in (1, 5):
        close(f(q[:, :, -t:], k, v, causal=True, kernel=kernel), whole[:, :, -t:])
