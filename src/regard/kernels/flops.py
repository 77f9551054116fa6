"""FLOPs, counted alike whatever kernel does the work: two for each multiply-add.

    attention       2 (D + V) for each query head and each pair that the mask allows: D for q . k, V for weight times v.
                    A causal square has T (T + 1) / 2 pairs and a window its band, so that a window as long as the text
                    costs what causal attention does. (Torch's own counter charges all T x S pairs, masked or not.)
    stages          what they multiply themselves, over all T x S pairs, as the eager kernel runs them
    backward        each product's two gradients, so twice as much; scores that a kernel computes again are not counted
    linear scans    the products of the chunked form
    anything else   matrix products and convolutions as they run, whatever is masked afterwards; torch's fused attention
                    called directly is charged by its mask, as above
    FFTs            5 n log2 n for n complex numbers, half of that for real ones
    nothing         elementwise work, sums, softmax and other normalisers, cumulative sums, sorting and lookups

A kernel that works outside of torch's operators, or computes pairs in vain, makes no difference. Torch's own
FlopCounterMode is told of attention by the same rule, as it knows neither our kernels nor torch's fused one on CPUs.
Where nobody may look (torch.func, torch.compile), there is what torch's operators are charged for.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _len_torch_dispatch_stack
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, _FlopCounterMode

from regard.kernels import eager
from regard.kernels.problem import Problem
from regard.tracing import readable

OP = "regard::attention"
"""The name under which attention stands among the counts."""


class FlopCounter(FlopCounterMode):
    """torch's FlopCounterMode by the rules above: `with FlopCounter() as counter: ...; counter.get_total_flops()`.

    Backward is counted where forward ran inside, too.
    """

    def __init__(self) -> None:
        super().__init__(display=False)

    def _count_flops(self, packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
        """What torch's counter does at every operator."""
        formula = FORMULAS.get(str(packet))
        if formula is None:
            return super()._count_flops(packet, out, args, kwargs)
        names = (a.name for a in packet.default._schema.arguments)
        _add(self, packet, formula({**dict(zip(names, args, strict=False)), **kwargs}))
        return out


def _counters() -> list[FlopCounterMode]:
    """All that count now, innermost last."""
    return [m.counter for m in _get_current_dispatch_mode_stack() if isinstance(m, _FlopCounterMode)]


def counting(p: Problem) -> bool:
    """Whether somebody counts and this problem can be told."""
    if torch.compiler.is_compiling() or not _len_torch_dispatch_stack():  # nearly always
        return False
    return not p.transformed and bool(_counters())


def counted(p: Problem, run: Callable[[Problem], Tensor]) -> Tensor:
    """`run(p)`, counted by what the problem asks for and not by what the kernel does, in backward as well."""
    sources = {name: t for name in ("q", "k", "v") if (t := getattr(p, name)).requires_grad}
    counters = _counters()
    with _muted(counters):
        forward, backward = work(p)
        if trained := bool(sources) and torch.is_grad_enabled():
            p = replace(p, **dict(zip(sources, _Enter.apply(*sources.values()), strict=True)))
        out = run(p)
    for counter in counters:
        _add(counter, OP, forward)
    return _Leave.apply(backward, out) if trained else out


def _add(counter: FlopCounterMode, name: Any, flops: float) -> None:
    """So many more, for every module that is running."""
    for module in set(counter.mod_tracker.parents):
        counter.flop_counts[module][name] += int(flops)


@contextmanager
def _muted(counters: list[FlopCounterMode]) -> Iterator[None]:
    before = [counter for counter in counters if not _is_muted(counter)]
    _mute(before, True)
    # FlexAttention can't run under a counter at all, so those that nothing stands above are taken away.
    away = []
    for counter in reversed(counters):
        if counter.mode is None or _get_current_dispatch_mode() is not counter.mode:
            break
        counter.mode.__exit__(None, None, None)
        away.append(counter.mode)
    try:
        yield
    finally:
        for mode in reversed(away):
            mode.__enter__()
        _mute(before, False)


def _is_muted(counter: FlopCounterMode) -> bool:
    return vars(counter).get("_count_flops") is _ignored


def _mute(counters: list[FlopCounterMode], muted: bool) -> None:
    for counter in counters:
        if muted:
            vars(counter)["_count_flops"] = _ignored
        else:
            vars(counter).pop("_count_flops", None)


def _ignored(packet: Any, out: Any, args: Any, kwargs: Any) -> Any:
    return out


class _Enter(torch.autograd.Function):
    """In backward the last thing inside of attention: from here on, operators count again."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        _mute(_counters(), False)
        return grads


class _Leave(torch.autograd.Function):
    """In backward the first thing inside of attention, whose work is known."""

    @staticmethod
    def forward(ctx: Any, flops: int, out: Tensor) -> Tensor:
        ctx.flops = flops
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        counters = _counters()
        for counter in counters:
            _add(counter, OP, ctx.flops)
        _mute(counters, True)
        # Where nobody wants gradients of q, k or v, backward ends without passing `_Enter`.
        torch.autograd.Variable._execution_engine.queue_callback(lambda: _mute(counters, False))
        return None, grad


# --- what a problem asks for --------------------------------------------------------------------------------------


def work(p: Problem) -> tuple[int, int]:
    """FLOPs of forward and backward."""
    B, H, _, T, S = p.shape
    everywhere, allowed = B * H * T * S, pairs(p)
    if not p.stages:
        one = _per_pair(p, scores=any(t is not None and t.requires_grad for t in (p.q, p.k, p.bias)))
        return one[0] * allowed, one[1] * allowed
    forward, backward, scores = _eager(p)
    one = _per_pair(p, scores=scores)
    return forward - one[0] * (everywhere - allowed), backward - one[1] * (everywhere - allowed)


def pairs(p: Problem) -> int:
    """Pairs of query and key that the mask allows, over all batch rows and heads."""
    B, H, _, T, S = p.shape
    if p.mask is None:
        return B * H * T * S
    if p.first_key:  # masks count their own places from 0
        one = int(p.mask.at(p.i, p.j).sum())
    else:
        one = p.mask.count(T, S) if T and S else 0
    return one * (B // p.mask.batch) * (H // p.mask.heads)


def _per_pair(p: Problem, *, scores: bool) -> tuple[int, int]:
    """What one pair costs forward, and backward if gradients of the `scores` are wanted."""
    dots = p.score is None or any("scores" in stage.needs for stage in p.stages)
    D, V = p.q.shape[3] if dots else 0, p.v.shape[3]
    backward = V * (scores + p.v.requires_grad) + D * (p.q.requires_grad + p.k.requires_grad)
    return 2 * (D + V), 2 * backward


def _eager(p: Problem) -> tuple[int, int, bool]:
    """FLOPs of the eager kernel, forward and backward, and whether it has gradients of scores; on tensors without
    memory, so that no length is too great."""
    if isinstance(p.q, FakeTensor) or p.q.is_meta:
        return _run(p)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def fake(t: Tensor) -> Tensor:
            return mode.from_tensor(t.detach()).requires_grad_(t.requires_grad)

        given = {name: getattr(p, name) for name in ("q", "k", "v", "unturned", "bias", "x", "context", "made")}
        return _run(replace(p, **tree_map_only(Tensor, fake, given)))


def _run(p: Problem) -> tuple[int, int, bool]:
    held = [w for stage in p.stages if isinstance(stage, nn.Module) for w in stage.parameters()]
    given = tree_leaves((p.q, p.k, p.bias, p.x, p.context, p.made, held))
    others = [t for t in given if isinstance(t, Tensor) and t.requires_grad]
    wanted = others + [p.v] * p.v.requires_grad
    with FlopCounterMode(display=False) as counter:
        out = eager.run(p)
        forward = counter.get_total_flops()
        if wanted and out.requires_grad:
            torch.autograd.grad(out, wanted, torch.ones_like(out), allow_unused=True)
    return forward, counter.get_total_flops() - forward, bool(others)


# --- operators that torch's counter does not know, or charges by other rules -----------------------------------------

Given = Mapping[str, Any]


def _fused_pairs(given: Given) -> int:
    """Pairs that a call of torch's fused attention allows. torch aligns causality top left."""
    (B, H, T, _), S = given["query"].shape, given["key"].shape[2]
    term = given.get("attn_mask", given.get("attn_bias"))
    if term is not None and readable(term):
        allowed = term if term.dtype == torch.bool else term > -math.inf
        return int(allowed.sum()) * (B * H * T * S // max(1, allowed.numel()))
    return B * H * (sum(min(t + 1, S) for t in range(T)) if given.get("is_causal") else T * S)


def _fused(given: Given) -> int:
    return 2 * _fused_pairs(given) * (given["query"].shape[3] + given["value"].shape[3])


def _fused_backward(given: Given) -> int:
    return 2 * _fused(given)


def _fft(given: Given, *, real: bool) -> float:
    shape = list(given["self"].shape)
    if "last_dim_size" in given:  # from complex numbers to so many real ones
        shape[given["dim"][-1]] = given["last_dim_size"]
    n = math.prod(shape[d] for d in given["dim"])
    return (2.5 if real else 5.0) * math.prod(shape) * math.log2(max(1, n))


def _decode(given: Given) -> int:
    q, k, v, lengths = (given[n] for n in ("q", "k", "v", "lengths"))
    return 2 * q.shape[1] * (k.shape[2] + v.shape[2]) * int(lengths.sum())


_FUSED = (
    "flash_attention_for_cpu",
    "flash_attention",
    "efficient_attention",
    "cudnn_attention",
    "fused_attention_overrideable",
)
FORMULAS: dict[str, Callable[[Given], float]] = {
    **{f"aten._scaled_dot_product_{name}": _fused for name in _FUSED},
    **{f"aten._scaled_dot_product_{name}_backward": _fused_backward for name in _FUSED},
    "aten._fft_c2c": lambda given: _fft(given, real=False),
    "aten._fft_r2c": lambda given: _fft(given, real=True),
    "aten._fft_c2r": lambda given: _fft(given, real=True),
    "regard.triton_decode": _decode,
}
"""Operator -> its FLOPs from its arguments by name. A file with operators of its own adds theirs."""
