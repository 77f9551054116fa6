"""Putting a described problem to every kernel that calls itself able, and making a failing one small."""

from collections.abc import Container, Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor

from kernels import naive_problem
from kernels.problems import DTYPES, JOINED, Built, Description, Tree, build, cut
from regard.kernels import KERNELS
from regard.kernels.plan import execute
from regard.laws.agreement import close, near

SLOW = {"triton": 16, "flex": 12}
"""One problem in so many goes to these too: an interpreter, and what torch traces anew at every call."""

ZERO, FLOOR = 1e-12, 1e-6
"""What counts as 0 in float64, and T32's floor, both relative to the largest gradient."""
DRAWS, ANOTHER = {"fp64": 1, "fp32": 2, "bf16": 5, "fp16": 5}, 1_000_000
"""How many draws of its tensors a problem has, and how far apart their seeds are."""


def able(d: Description, built: list[Built]) -> Iterator[tuple[str, bool]]:
    """(kernel, with gradients) of all that can run each of the problem's draws, with gradients where they can."""
    problems = [each.problem() for each in built]
    for name, module in KERNELS.items():
        if d.seed % SLOW.get(name, 1):
            continue
        if not any(map(module.why_not, problems)):
            yield name, True
            continue
        with torch.no_grad():
            if not any(map(module.why_not, problems)):
                yield name, False


def run(built: Built, kernel: str, grads: bool) -> dict[str, Tensor]:
    """What the kernel gives: the output, and the gradients if wanted."""
    with torch.set_grad_enabled(grads):
        out = execute(built.problem(), kernel)
    found = {"out": out.detach()}
    if grads:
        leaves = list(built.wanted.values())
        got = torch.autograd.grad(out, leaves, built.grad, allow_unused=True)
        filled = (torch.zeros_like(t) if g is None else g for g, t in zip(got, leaves, strict=True))
        found.update(zip(built.wanted, filled, strict=True))
    return found


def failures(d: Description, only: Container[str] = KERNELS) -> dict[str, str]:
    """Kernel -> what is wrong with it."""
    # A handful of roundings is no measure: below float64 the bounds come from several draws.
    draws = [replace(d, seed=d.seed + n * ANOTHER) for n in range(DRAWS[d.dtype])]
    built = [build(each) for each in draws]
    want = [naive_problem.run(each) for each in built]
    plain = want if d.dtype == "fp64" else [naive_problem.run(each, DTYPES[d.dtype]) for each in built]
    largest = 1 + max((float(t.abs().max()) for each in want for t in each.values() if t.numel()), default=0.0)
    wrong = {}
    with cut(d.cut):
        for kernel, grads in able(d, built):
            if kernel not in only:
                continue
            try:
                got = [run(each, kernel, grads) for each in built]
                for name in got[0]:
                    agrees(
                        name, *(torch.stack([found[name] for found in each]) for each in (got, want, plain)), largest
                    )
            except Exception as error:  # whatever it is, it is the finding
                wrong[kernel] = f"{type(error).__name__}: {error}"
    return wrong


def agrees(name: str, got: Tensor, want: Tensor, plain: Tensor, largest: float) -> None:
    """By T64, T32 or TLP; `largest` of all that is looked at."""
    if got.dtype == torch.float64:
        return close(got, want, name)
    zero = name != "out" and want.numel() and float(want.abs().max()) <= ZERO * largest
    if zero and float(got.double().abs().mean()) <= FLOOR * largest:
        # Terms cancel, to the last digit where a plain computation has one term only: no bound comes from there.
        return None
    return near(got, want, plain, name, grad=name != "out")


# --- making small -------------------------------------------------------------------------------------------------


def smallest(d: Description, kernel: str, tries: int = 200) -> Description:
    """Greedily: any simpler description on which the kernel still fails takes the place of d."""
    found = True
    while found and tries > 0:
        found = False
        for simpler in simpler_than(d):
            tries -= 1
            if tries <= 0:
                break
            try:
                if not failures(simpler, (kernel,)):
                    continue
            except Exception:  # no problem at all, such as a window that no longer fits
                continue
            d, found = simpler, True
            break
    return d


def simpler_than(d: Description) -> Iterator[Description]:
    """One thing less, or smaller; the greatest steps first."""
    for f in fields(d):
        value = getattr(d, f.name)
        if value != f.default and f.name not in ("seed", "dtype", "B", "H", "G", "T", "S", "D", "V"):
            yield replace(d, **{f.name: f.default})
    if d.mask is not None:
        for tree in simpler_trees(d.mask):
            yield replace(d, mask=tree)
    for n, layout in enumerate(d.layouts):
        if layout != "plain":
            yield replace(d, layouts=(*d.layouts[:n], "plain", *d.layouts[n + 1 :]))
    for axis in d.bias if len(d.bias) > 1 else "":
        yield replace(d, bias=d.bias.replace(axis, ""))
    if d.H > d.G:
        yield replace(d, H=d.G)
    if d.G > 1:
        yield replace(d, G=1, H=d.H // d.G)
    sizes = {name: getattr(d, name) for name in ("B", "T", "S", "D", "V", "first_key", "cut")}
    for name, size in sizes.items():
        least = 4 if name == "D" else 1
        for smaller in (least, size // 2, size - 1):
            if least <= smaller < size and not (name == "D" and smaller % 2):
                yield replace(d, **{name: smaller})
    if d.T == d.S and d.T > 1:
        yield replace(d, T=d.T - 1, S=d.S - 1)


def simpler_trees(tree: Tree) -> Iterator[Tree]:
    """Parts in place of the whole, then simpler parts."""
    if tree[0] not in JOINED:
        return
    parts = tree[1:]
    yield from parts
    if len(parts) > 2 or (len(parts) > 1 and tree[0] == "per_head"):
        for n in range(len(parts)):
            yield (tree[0], *parts[:n], *parts[n + 1 :])
    for n, part in enumerate(parts):
        for simpler in simpler_trees(part):
            yield (tree[0], *parts[:n], simpler, *parts[n + 1 :])
