"""Which kernel runs, and why not the others."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from regard.kernels import block_sparse, chunked, eager, neighborhood, sdpa, window
from regard.kernels.problem import Problem, honest
from regard.kernels.size import MATERIALISE, score_bytes, sized
from regard.masks import Mask, causal
from regard.masks.algebra import Joined, Not
from regard.masks.neighborhood import Neighborhood

KERNELS: dict[str, ModuleType] = {
    "sdpa": sdpa,
    "window": window,
    "neighborhood": neighborhood,
    "block_sparse": block_sparse,
    "chunked": chunked,
    "eager": eager,
}
"""By preference where estimates tie. Each module has `run(problem)` and `why_not(problem)`."""


@dataclass(frozen=True)
class Plan:
    """The kernel that will run, and for every other one the reasons why it will not."""

    kernel: str
    because: str
    why_not: dict[str, list[str]]

    def __str__(self) -> str:
        lines = [f"{self.kernel}: {self.because}"]
        lines += [f"  not {name}: {'; '.join(reasons)}" for name, reasons in self.why_not.items()]
        return "\n".join(lines)


def choose(p: Problem, kernel: str = "auto") -> Plan:
    """The plan for this problem. A kernel named outright is taken or refused, never replaced."""
    if kernel not in ("auto", *KERNELS):
        raise ValueError(f"attention: unknown kernel {kernel!r}; known: auto, {', '.join(KERNELS)}")
    cannot = {name: module.why_not(p) for name, module in KERNELS.items()}
    if kernel != "auto":
        if cannot[kernel]:
            able = [name for name, reasons in cannot.items() if not reasons]
            raise ValueError(
                f"attention: kernel {kernel!r} can't run this: {'; '.join(cannot[kernel])}; "
                f"these can: {', '.join(able)}"
            )
        return Plan(kernel, "asked for by name", {n: r or ["not asked for"] for n, r in cannot.items() if n != kernel})
    work = {name: _work(p, name) for name in KERNELS if not cannot[name]}
    best = min(work, key=lambda name: work[name][0])
    why_not = {
        name: cannot[name] or [f"about {work[name][0] / work[best][0]:.3g} times the time: {work[name][1]}"]
        for name in KERNELS
        if name != best
    }
    return Plan(best, work[best][1], why_not)


def execute(p: Problem, kernel: str = "auto") -> Tensor:
    """Run the problem on the kernel that `choose` takes."""
    run: Callable[[Problem], Tensor]
    if kernel == "auto" and _plain(p):
        run = sdpa.run  # what choose() would say, without its price on small inputs
    elif kernel == "auto" and torch.compiler.is_compiling():
        run = _compiling(p)
    else:
        run = KERNELS[choose(p, kernel).kernel].run
    if 0 in (p.q.shape[0], p.q.shape[2], p.k.shape[2]):
        run = sdpa.run  # nothing to attend to: zeros, whatever the stages would make of an empty matrix
    if torch.is_autocast_enabled(p.q.device.type):
        with torch.autocast(p.q.device.type, enabled=False):
            return honest(p, run)
    return honest(p, run)


def _compiling(p: Problem) -> Callable[[Problem], Tensor]:
    """What `choose` would take, without its words and estimates: those would tie the graph to one length."""
    if not sdpa.why_not(p):
        return sdpa.run
    return chunked.run if p.q.shape[0] * score_bytes(p) > MATERIALISE else eager.run


def _plain(p: Problem) -> bool:
    return (
        p.position is None
        and p.normalizer is None
        and p.score_mix is None
        and p.weight_mix is None
        and (p.mask is None or (p.q.shape[2] in (1, p.k.shape[2]) and p.mask == causal()))
    )


def _work(p: Problem, name: str) -> tuple[float, str]:
    """Estimated cost of a kernel in multiply-adds of torch's fused one, and what makes it so.

    The factors are ratios of forward times to torch's fused kernel over all pairs, measured on a 2-core CPU at
    T = 1024 to 8192 and rounded.
    """
    B, H, _, T, S = p.shape
    dense = max(1.0, float(B * H * T * S * (p.q.shape[3] + p.v.shape[3])))
    biased = p.position_bias is not None or p.bias is not None
    if name == "sdpa":
        if p.mask is None and not biased:
            return dense, "torch's fused kernel"
        if T == S and p.mask == causal() and not biased:
            return 0.6 * dense, "torch's fused kernel"
        what = "bias and mask" if biased else "the mask"
        return (3.0 if biased else 2.0) * _share(p) * dense, f"torch's fused kernel, {what} formed by chunks of queries"
    if name == "window":
        assert p.mask is not None
        keys = int(sum(p.mask.span)) + 1
        seen = keys + window.block(keys)
        return 1.8 * min(
            1.0, seen / max(S, 1)
        ) * dense + 3e6, f"queries in blocks of {window.block(keys)}, {seen} keys each"
    if name == "neighborhood":
        assert isinstance(p.mask, Neighborhood)
        share = neighborhood.scored(p.mask) / (T * S)
        return 3.0 * share * dense + 1e7, f"{share:.1%} of the scores formed, in tiles"
    if name == "block_sparse":
        density = _density(p, T, S)
        # Each block of queries costs a few calls, worth about a million multiply-adds here.
        rows = block_sparse.BLOCK if p.mask is None else block_sparse.block_of(p.mask)[0]
        calls = 1e6 * -(-T // rows) * (1 if p.mask is None else p.mask.batch * p.mask.heads)
        factor = 2.0 if not biased and not p.stages else 3.6 if not sdpa.why_not(p) else 7.0
        return factor * density * dense + calls, f"{density:.0%} of the blocks hold an allowed pair"
    if name == "chunked":
        return 7.5 * _share(p) * dense + 2e5, "scores formed a chunk at a time"
    bytes_ = B * score_bytes(p) * 4 // p.q.element_size()
    heavy = 2.0 if bytes_ > MATERIALISE else 1.0
    return 7.0 * heavy * dense, f"scores formed all at once: {sized(bytes_)}"


def _share(p: Problem) -> float:
    """Share of all pairs that is left when query chunks take only the keys that the mask's bounds let them reach."""
    S = p.k.shape[2]
    if p.mask is None:
        return 1.0
    causal_share = 0.55 if p.mask.is_causal else 1.0
    return causal_share if p.mask.reach is None else min(causal_share, (p.mask.reach + 256) / max(S, 1))


def _density(p: Problem, T: int, S: int) -> float:
    """Block density of the mask; 1 where finding out would cost more than it could save."""
    if p.mask is None or torch.compiler.is_compiling() or T < 4 * block_sparse.BLOCK:
        return 1.0
    return (_known_density if _by_value(p.mask) else _block_density)(p.mask, T, S)


def _block_density(mask: Mask, T: int, S: int) -> float:
    return mask.layout(T, S, block=block_sparse.block_of(mask)).block_density


_known_density = lru_cache(maxsize=64)(_block_density)


def _by_value(mask: Mask) -> bool:
    """Whether equal masks compare equal; one that holds tensors must not be kept alive by a cache."""
    if isinstance(mask, Joined):
        return all(map(_by_value, mask.parts))
    return _by_value(mask.part) if isinstance(mask, Not) else type(mask).__eq__ is not object.__eq__
