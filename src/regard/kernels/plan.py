"""Which kernel runs, and why not the others."""

from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from regard.checks import choice, refuse
from regard.kernels import (
    block_sparse,
    chunked,
    decode,
    eager,
    few,
    flex,
    grouped,
    listed,
    native,
    neighborhood,
    paged,
    sdpa,
    triton_attention,
    window,
)
from regard.kernels.check import check_problem
from regard.kernels.cost import Cost, io, rates
from regard.kernels.finite import honest
from regard.kernels.flops import counted, counting
from regard.kernels.problem import CAUSAL, Problem
from regard.kernels.size import MATERIALISE, score_bytes
from regard.slots import IN_KERNELS
from regard.tracing import as_it_is, exporting

KERNELS: dict[str, ModuleType] = {
    "paged": paged,
    "sdpa": sdpa,
    "grouped": grouped,
    "listed": listed,
    "native": native,
    "window": window,
    "neighborhood": neighborhood,
    "block_sparse": block_sparse,
    "triton": triton_attention,
    "flex": flex,
    "few": few,
    "decode": decode,
    "chunked": chunked,
    "eager": eager,
}
"""By preference where predictions tie. Each module has `run`, `why_not` and `cost`, functions of the problem."""


TORCH = (sdpa, chunked, eager)
"""Those that take nothing but torch's own operations, for which torch has rules for everything."""


@dataclass(frozen=True)
class Plan:
    """The kernel that will run, for every other one the reasons why it will not, and what each is expected to cost."""

    kernel: str
    because: str
    why_not: dict[str, list[str]]
    costs: dict[str, Cost] = field(default_factory=dict)
    """Of one forward pass, for each kernel that could run."""

    def __str__(self) -> str:
        lines = [f"{self.kernel}: {self.because}{self._price(self.kernel)}"]
        lines += [f"  not {name}: {'; '.join(reasons)}{self._price(name)}" for name, reasons in self.why_not.items()]
        return "\n".join(lines)

    def _price(self, name: str) -> str:
        return f" ({self.costs[name]})" if name in self.costs else ""


def choose(p: Problem, kernel: str = "auto", device: str | None = None) -> Plan:
    """The plan for this problem. A kernel named outright is taken or refused, never replaced.

    Args:
        device: "cpu" or "cuda", for tensors on meta: what would run there, with the packages installed here.
    """
    check_problem(p)
    if device is not None:
        choice("plan", ("cpu", "cuda"), device=device)
        if not p.q.is_meta:
            refuse("plan", "device", "is said of tensors that are on one", device, "None, or tensors on meta")
        p = replace(p, on=device)
    return _chosen(p, kernel)


def _chosen(p: Problem, kernel: str = "auto") -> Plan:
    """The same for a problem that was looked at."""
    cannot = {name: _reasons(p, module) for name, module in KERNELS.items()}
    if kernel != "auto":
        _named(p, kernel)
    costs = {name: _cost(p, module) for name, module in KERNELS.items() if not cannot[name]}
    if kernel != "auto":
        others = {n: r or ["not asked for"] for n, r in cannot.items() if n != kernel}
        return Plan(kernel, "asked for by name", others, costs)
    seconds = {name: rates().seconds(cost, p.q.dtype) for name, cost in costs.items()}
    # Whatever the time, so much memory is taken only for who asks for it by name.
    large = p.q.shape[0] * score_bytes(p) > MATERIALISE
    best = min((name for name in seconds if name != "eager" or not large), key=seconds.__getitem__)
    times = {name: paid / max(seconds[best], 1e-12) for name, paid in seconds.items()}
    why_not = {
        name: cannot[name] or [f"about {times[name]:.3g} times the time: {costs[name].words}"]
        for name in KERNELS
        if name != best
    }
    return Plan(best, costs[best].words, why_not, costs)


def _cost(p: Problem, module: ModuleType) -> Cost:
    """What it takes, with the copies that all but `paged` need of keys in pages."""
    cost: Cost = module.cost(p)
    if p.pages is None or module is paged:
        return cost
    return replace(cost, bytes=cost.bytes + 2 * io(p), words=f"{cost.words}, keys gathered from pages")


def _named(p: Problem, kernel: str) -> ModuleType:
    """The kernel of that name, if it can run this."""
    choice("attention", ("auto", *KERNELS), kernel=kernel)
    if reasons := _reasons(p, KERNELS[kernel]):
        able = [name for name, module in KERNELS.items() if not _reasons(p, module)]
        raise ValueError(
            f"attention: kernel {kernel!r} can't run this: {'; '.join(reasons)}; these can: {', '.join(able)}"
        )
    return KERNELS[kernel]


def _reasons(p: Problem, module: ModuleType) -> list[str]:
    """Why this kernel can't run this here."""
    if module not in TORCH and p.transformed:
        return ["torch.func and forward-mode AD go through torch's own operations only"]
    return module.why_not(p)


def execute(p: Problem, kernel: str = "auto") -> Tensor:
    """Run the problem on the kernel that `choose` takes. All who have a problem come by here, and it is looked at."""
    check_problem(p)
    empty = p.q.numel() == 0 or p.k.numel() == 0
    module = _named(p, kernel) if kernel != "auto" else sdpa if empty else _auto(p)
    if empty:
        # Nothing to attend to but a memory: zeros, whatever the stages would make of an empty matrix.
        module = sdpa if p.memory is None else eager
    with as_it_is(p.q.device):
        return counted(p, partial(_run, module=module)) if counting(p) else _run(p, module)


def _run(p: Problem, module: ModuleType) -> Tensor:
    p = _apart(p if module is paged else p.gathered())
    return module.run(p) if module in (decode, few, native, paged) else honest(p, module.run)


def _apart(p: Problem) -> Problem:
    """The same with tokens that share no numbers in memory, as sliding windows do: BLAS takes no rows that lie closer
    than they are wide, and torch's fused kernel hands it such and gives wrong numbers."""
    if not p.readable:  # strides may be symbols there
        return p
    shared = {n: x for n in "qkv" if 0 < (x := getattr(p, n)).stride(2) < x.shape[3] and x.stride(3) == 1 < x.shape[2]}
    return replace(p, **{name: x.contiguous() for name, x in shared.items()}) if shared else p


def _auto(p: Problem) -> ModuleType:
    """What `choose` would say, without its price where the answer is plain."""
    if not p.readable:
        return _unseen(p)
    if p.pages is not None and not paged.why_not(p):
        return paged
    if few.banded(p.mask) and p.q.size(2) <= few.MOST and not few.why_not(p):
        return few  # who reads the cache once and needs no more is the cheapest
    if not _plain(p):
        if p.q.size(2) > few.MOST and not grouped.why_not(p) and grouped.apart(p):
            return grouped
        if not listed.why_not(p) and listed.apart(p):
            return listed
        return KERNELS[_chosen(p).kernel]
    if p.q.numel() * p.k.size(2) <= few.TINY:
        return sdpa
    able = [module for module in (sdpa, native, decode) if not module.why_not(p)]
    return min(able, key=lambda module: rates().seconds(module.cost(p), p.q.dtype))


def _unseen(p: Problem) -> ModuleType:
    """What `choose` would take of torch's own operations, without its words and predictions: those would tie a graph to
    one length, and ask masks for their tiles, which takes data."""
    if torch.compiler.is_compiling() and native.operator.worth(p) and not native.why_not(p):
        return native
    if not sdpa.why_not(p):
        return sdpa
    return chunked if not exporting() and p.q.shape[0] * score_bytes(p) > MATERIALISE else eager


def _plain(p: Problem) -> bool:
    return (
        all(getattr(p, slot) is None for slot in IN_KERNELS)
        and p.bias is None
        and (p.mask is None or (p.q.shape[2] in (1, p.k.shape[2]) and p.mask == CAUSAL))
    )
