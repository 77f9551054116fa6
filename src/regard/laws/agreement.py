"""When two results are the same: exactly, to float64's precision, or as exactly as a plain computation in their dtype.

Every function returns nothing, or raises `Broken` with the difference.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn
from unittest import mock

import torch
from torch import Tensor


class Broken(AssertionError):
    """A law does not hold; the message says what differs and by how much.

    Args:
        length: how many tokens it takes, where the law has looked for that itself.
    """

    def __init__(self, what: str, *, length: int | None = None):
        super().__init__(what)
        self.length = length


class DoesNotApply(Exception):
    """Raised by a law that finds, while it looks, that it has nothing to say about the subject."""


def does_not_apply(why: str) -> NoReturn:
    raise DoesNotApply(why)


def hold(condition: object, what: str) -> None:
    """Raise `Broken` unless the condition holds. Not `assert`, which Python may be told to skip."""
    if not condition:
        raise Broken(what)


def same(got: Tensor, want: Tensor, what: str = "") -> None:
    """EXACT: bit for bit."""
    hold(got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if not torch.equal(got, want):
        off = (got.double() - want.double()).abs().max() if got.dtype == want.dtype else f"dtype {got.dtype}"
        raise Broken(f"{what} differs by up to {off:.3g}" if isinstance(off, Tensor) else f"{what}: {off}")


def close(got: Tensor, want: Tensor, what: str = "") -> None:
    """T64: max |difference| <= 1e-10 (1 + max |reference|), on the whole and on every (batch, head) slice."""
    hold(got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    hold(got.dtype == want.dtype, f"{what}: dtype {got.dtype}, expected {want.dtype}")
    if want.numel() == 0:
        return
    hold(torch.equal(got.isfinite(), want.isfinite()), f"{what}: NaN or inf at other places than in the reference")
    for g, w in slices(got.nan_to_num(0, 0, 0), want.nan_to_num(0, 0, 0)):
        off, bound = (g - w).abs().max(), 1e-10 * (1 + w.abs().max())
        hold(off <= bound, f"{what} differs by up to {off:.3g}, allowed {bound:.3g}")


def close_all(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """`close` by name."""
    hold(got.keys() == want.keys(), f"results {sorted(got)}, expected {sorted(want)}")
    for name in want:
        close(got[name], want[name], name)


def near(got: Tensor, want: Tensor, naive: Tensor, what: str = "", *, grad: bool = False) -> None:
    """TLP for half precision, T32 for fp32: no worse than a plain computation in that dtype, up to a factor.

    The bounds come from the naive computation's errors over all inputs. They hold for the whole and, for
    outputs, for every slice: a bound from one small slice alone would rest on a handful of roundings.
    """
    hold(got.dtype == naive.dtype, f"{what}: dtype {got.dtype}, expected {naive.dtype}")
    hold(torch.equal(got.isfinite(), want.isfinite()), f"{what}: NaN or inf at other places than in float64")
    if want.numel() == 0:
        return
    off, naive_off = (got.double() - want).abs(), (naive.double() - want).abs()
    naive_off = naive_off.nan_to_num(torch.inf)  # where the plain computation fails, anything finite is no worse
    if got.dtype == torch.float32:
        bound = max(1e-6, 10 * float(naive_off.mean()))
        hold(off.mean() <= bound, f"{what}: mean error {off.mean():.3g}, allowed {bound:.3g}")
        return
    ref = want.to(got.dtype)
    floor = 2 * float((ref + 0.3 - 0.3 - ref).abs().max())
    most, mean = (3.0, 1.5) if grad else (2.0, 1.1)
    worst = max(float(n.mean()) for (n,) in slices(naive_off)) if not grad else float(naive_off.mean())
    bound = max(floor, most * float(naive_off.max()))
    hold(off.max() <= bound, f"{what}: largest error {off.max():.3g}, allowed {bound:.3g}")
    bound = max(floor, mean * float(naive_off.mean()))
    hold(off.mean() <= bound, f"{what}: mean error {off.mean():.3g}, allowed {bound:.3g}")
    bound = max(floor, mean * worst)
    for (o,) in () if grad else slices(off):
        hold(o.mean() <= bound, f"{what}: mean error of a slice {o.mean():.3g}, allowed {bound:.3g}")


def slices(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The whole, and every batch (and head) slice of activations."""
    yield tensors
    if tensors[0].dim() > 2:
        yield from zip(*(t.flatten(0, -3) for t in tensors), strict=True)


def says(error: Exception, *words: object) -> None:
    """The refusal names what it is about."""
    for word in words:
        hold(str(word) in str(error), f"the refusal does not say {word!r}: {error}")


@contextlib.contextmanager
def refused(kinds: type[Exception] | tuple[type[Exception], ...], *words: str, what: str) -> Iterator[None]:
    """What is inside must raise one of `kinds`, with one of `words` in its message."""
    try:
        yield
    except kinds as error:
        if words and not any(word in str(error) for word in words):
            raise Broken(f"{what}: the refusal says none of {', '.join(words)}: {error}") from error
        return
    raise Broken(f"{what} is taken without a word")


@contextlib.contextmanager
def naive_precision() -> Iterator[None]:
    """Everything in the inputs' own dtype: what a plain half-precision implementation would do."""
    with mock.patch.object(torch, "promote_types", lambda a, b: a):
        yield


def run(module: Any, *given: Tensor, grad_out: Tensor | None = None, **options: Any) -> dict[str, Tensor]:
    """Output and all gradients, by name: "out", "input0", ... and the parameters' own names."""
    leaves = [g.detach().clone().requires_grad_() if g.is_floating_point() else g for g in given]
    params = dict(module.named_parameters())
    with torch.enable_grad():
        out = module(*leaves, **options)
        if grad_out is None:
            generator = torch.Generator().manual_seed(9)
            grad_out = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
        wanted = {f"input{n}": leaf for n, leaf in enumerate(leaves) if leaf.requires_grad}
        wanted |= {key: p for key, p in params.items() if p.requires_grad}
        grads = torch.autograd.grad(out, list(wanted.values()), grad_out, allow_unused=True)
    filled = (torch.zeros_like(w) if g is None else g for g, w in zip(grads, wanted.values(), strict=True))
    return {"out": out.detach(), **dict(zip(wanted, filled, strict=True))}
