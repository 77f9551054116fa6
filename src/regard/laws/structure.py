"""L3, L4, L6, L10, L12, L17: what may reach what, exactly, and nothing else does."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from regard.laws.agreement import Broken, close, does_not_apply, hold, run, same
from regard.laws.registry import BATCHED, law
from regard.laws.subject import Subject, field_of, reaches
from regard.pipeline.layer import Attention

FAR = 150
"""Tokens; a mistake may show only behind a block of 64 or 128."""


def check_field(s: Subject, got: Tensor, allowed: Tensor, *, told: bool) -> None:
    """`told`: by the module itself. One that doesn't say what it may see can only be caught seeing too much."""
    leaks = (got & ~allowed).nonzero().tolist()
    hold(not leaks, f"outputs see tokens outside the receptive field: (query, key) {leaks[:5]}")
    if told and not {"sparse", "routed"} & s.traits:
        lost = (allowed & ~got).nonzero().tolist()
        hold(not lost, f"outputs miss tokens of their receptive field: (query, key) {lost[:5]}")


def check_span(s: Subject, module: Attention) -> None:
    """A window of W sees W keys back, its own included, by count and not by the mask's own predicate."""
    back, ahead = module.receptive_field().span
    i, j = reaches(module, s.tokens(1)).nonzero().T
    hold((i - j).max() <= back, f"a query sees {int((i - j).max()) + 1} keys back, more than {back + 1}")
    hold((j - i).max() <= ahead, f"a query sees {int((j - i).max())} keys ahead, more than {ahead}")


@law("L3")
def receptive_field(s: Subject) -> None:
    """A token outside the receptive field has gradient exactly 0, one inside has not."""
    for causal in s.causalities:
        module = s.build(causal=causal)
        told = hasattr(module, "receptive_field")
        if told:
            check_span(s, module)
        got = reaches(module, s.tokens(1))
        allowed = field_of(module, s.length) | torch.eye(s.length, dtype=torch.bool)
        if not told and not causal and s.causalities == [False]:
            does_not_apply("it does not say what it may see")
        check_field(s, got, allowed, told=told)


@law("L17", needs="cross")
def alignment_of_unequal_lengths(s: Subject) -> None:
    """T != S: the last query stands where the last key stands; queries before the first key see nothing."""
    for causal in s.crossings:
        module = s.build(causal=causal)
        for length, keys in ((5, 9), (9, 5), (1, 7)):
            got = reaches(module, s.tokens(1, length), s.context(1, keys))
            check_field(s, got, field_of(module, length, keys), told=hasattr(module, "receptive_field"))


@law("L4", needs="causal")
def future_changes_nothing(s: Subject) -> None:
    """The future times 100 changes no output bit for bit; nor does NaN there, where NaN is safe to hide."""
    module, x = s.build(causal=True), s.tokens()
    want = module(x)
    for last in sorted({0, s.length // 3, max(0, s.length - 2)}):
        future = x.clone()
        future[:, last + 1 :] *= 100
        same(module(future)[:, : last + 1], want[:, : last + 1], f"the outputs up to token {last}")
        if s.nan_safe and last + 1 < s.length:
            future[:, last + 1 :] = torch.nan
            out = module(future)
            same(out[:, : last + 1], want[:, : last + 1], "the past of NaN")
            hold(not out[:, -1].isfinite().any(), "NaN in the last token does not reach its output")


@law("L4", needs="causal")
def far_future_changes_nothing(s: Subject) -> None:
    """The future of 150 tokens changes nothing, either: some mistakes show only behind a block of 64 or 128."""
    module, x = s.build(causal=True), s.tokens(1, FAR)
    try:
        want = module(x)
    except Exception as error:
        if not s.foreign and not isinstance(error, ValueError):
            raise
        does_not_apply(f"it refuses {FAR} tokens: {error}")
    for last in (63, 64, 100, 128, FAR - 2):
        future = x.clone()
        future[:, last + 1 :] *= 100
        if not torch.equal(module(future)[:, : last + 1], want[:, : last + 1]):
            raise shortest_look_ahead(module, x)


@law("L4", needs="causal", weight="heavy")
def future_changes_nothing_in_training(s: Subject) -> None:
    """The future changes nothing while training, either."""
    module, x = s.build(causal=True).train(), s.tokens()

    def called(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return copy.deepcopy(module)(x)  # training may move what it holds

    last = s.length // 2
    future = x.clone()
    future[:, last:] *= 100
    same(called(future)[:, :last], called(x)[:, :last], f"the outputs before token {last}")


def shortest_look_ahead(module: Any, x: Tensor) -> Broken:
    """The first token that changes an output before it."""
    for n in range(2, x.shape[1] + 1):
        last = x[:, :n].clone()
        last[:, -1] *= 100
        moved = (module(last) - module(x[:, :n]))[0, :-1].abs().amax(-1)
        if moved.any():
            at = int(moved.argmax())
            return Broken(f"token {n - 1} changes the output of token {at} by {moved[at]:.3g}", length=n)
    return Broken(f"the future of {x.shape[1]} tokens changes the past, but their last token alone changes nothing")


@law("L6", needs="causal", weight="heavy")
def prefixes(s: Subject) -> None:
    """f(x[:t]) = f(x)[:t], and so for the gradients of a loss on the first t outputs."""
    module, x = s.build(causal=True), s.tokens()
    grad_out = s.tokens(seed=6)
    for t in (1, 2, 5, s.length - 1):
        part = grad_out.clone()
        part[:, t:] = 0
        whole = run(module, x, grad_out=part)
        short = run(module, x[:, :t], grad_out=grad_out[:, :t])
        close(whole["out"][:, :t], short["out"], "out")
        same(whole["input0"][:, t:], torch.zeros_like(x[:, t:]), "gradient of the future")
        close(whole["input0"][:, :t], short["input0"], "input0")
        for key in whole.keys() - {"out", "input0"}:
            close(whole[key], short[key], key)


def rows_apart(s: Subject, mode: str) -> None:
    for causal in s.causalities:
        module = s.build(causal=causal).train(mode == "training")
        given = (s.tokens(3),) if s.protocol in ("TokenMixer", "Pooler") and s.given is None else s.inputs()
        batch = len(given[0])

        def of_batch(change: Callable[[Tensor], Tensor], given=given, batch=batch) -> list[Tensor]:
            return [change(g) if g.is_floating_point() and len(g) == batch else g for g in given]

        def called(given: Sequence[Tensor], module=module) -> Tensor:
            torch.manual_seed(0)
            return copy.deepcopy(module)(*given)  # training may move what it holds

        want = called(given)
        got = called(of_batch(lambda g: torch.cat([g[:1], 7 * g[1:2].flip(1), g[2:]])))
        same(got[0], want[0], f"in {mode}, row 0 beside another row 1")
        same(got[2:], want[2:], f"in {mode}, rows after another row 1")
        if mode == "eval":
            alone = [g[1:2] if len(g) == batch else g for g in given]
            close(called(alone), want[1:2], "row 1 alone")


@law("L10", protocols=BATCHED)
def batch_rows_do_not_meet(s: Subject) -> None:
    """Another batch row changes nothing, bit for bit; alone is as in the batch."""
    rows_apart(s, "eval")


@law("L10", protocols=BATCHED, weight="heavy")
def batch_rows_do_not_meet_in_training(s: Subject) -> None:
    """Another batch row changes nothing while training, either."""
    rows_apart(s, "training")


@law("L12", protocols="GraphMixer")
def order_of_nodes_and_edges_is_free(s: Subject) -> None:
    """Nodes under other numbers, and edges in another order, give the same answers."""
    module, (nodes, edges, *rest) = s.build(), s.inputs()
    generator = torch.Generator().manual_seed(0)
    order, shuffled = (torch.randperm(n, generator=generator) for n in (len(nodes), edges.shape[1]))
    moved = [r[order] if len(r) == len(nodes) else r for r in rest]
    if all(len(r) == len(nodes) for r in rest):
        close(module(nodes, edges[:, shuffled], *rest), module(nodes, edges, *rest), "edges in another order")
    if "position_free" in s.traits:
        got = module(nodes[order], order.argsort()[edges], *moved)
        close(got, module(nodes, edges, *rest)[order], "renumbered nodes")


@law("L17", function=True, needs="causal")
def one_query_is_the_last(s: Subject) -> None:
    """A causal pass over the last queries alone equals the last rows of the whole pass."""
    f: Any = s.form()
    if any(getattr(p, "halo", 0) for p in f.parts.values()):
        does_not_apply("earlier rows of queries belong to its input")
    q, k, v = f.qkv()
    for kernel in ("eager", "chunked") if s.is_part else (None,):
        whole = f(q, k, v, causal=True, kernel=kernel)
        for t in (1, 5):
            close(f(q[:, :, -t:], k, v, causal=True, kernel=kernel), whole[:, :, -t:], f"the last {t}")
