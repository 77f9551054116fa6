"""L4, L10, L28 and sameness, asked of one module as it stands, with the inputs that it was really given: for runs.

    call = recorded(model, model.mixers, lambda: task.loss(model, batch))[0]
    future_changes_nothing(call)              # returns, or raises Broken

Every pass is made by a copy of the module with torch's generator set aside, so that nothing is left behind.
"""

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.laws.agreement import hold

MODES = ("eval", "training")


@dataclass(frozen=True)
class Call:
    """A module and what it was called with. Sequences, maps or sets lie along the first axis of its tensors."""

    module: nn.Module
    given: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def batch(self) -> int:
        return self.given[0].shape[0]

    @property
    def length(self) -> int:
        return self.given[0].shape[1]


def recorded(modules: Sequence[nn.Module], run: Callable[[], Any]) -> list[Call]:
    """The first call of each of these modules while `run()` runs, in eval mode and without gradients."""
    found: dict[nn.Module, Call] = {}

    def note(module: nn.Module, given: tuple[Any, ...], options: dict[str, Any]) -> None:
        found.setdefault(module, Call(module, given, options))

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad(), torch.random.fork_rng():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return list(found.values())


def future_changes_nothing(call: Call, modes: Sequence[str] = MODES) -> None:
    """L4: outputs up to a token are the same, bit for bit, whatever comes after it; in eval and in training."""
    x, *rest = call.given
    for mode in modes:
        want = output(call, mode)
        for last in sorted({0, call.length // 3, call.length // 2, call.length - 2} & set(range(call.length - 1))):
            future = x.clone()
            future[:, last + 1 :] = 100 * x[:, last + 1 :].flip(1)
            got = replace(call, given=(future, *rest))
            off = apart(output(got, mode)[:, : last + 1], want[:, : last + 1])
            if off and beyond_rounding(call, got, mode, (slice(None), slice(last + 1))):
                said = f"of {call.length} tokens, those up to {last} change by {off:.2g} in {mode}"
                hold(False, f"{said} with what comes after them")


def batch_rows_do_not_meet(call: Call, modes: Sequence[str] = MODES) -> None:
    """L10: another example of the batch changes nothing, bit for bit; in eval and in training."""

    def replaced(g: Any) -> Any:
        if not isinstance(g, Tensor) or not g.is_floating_point() or g.shape[:1] != (call.batch,):
            return g
        return torch.cat([g[:1], 7 * g[1:2].flip(1), g[2:]])

    if call.batch < 2:
        return
    got = Call(call.module, tuple(map(replaced, call.given)), {k: replaced(g) for k, g in call.options.items()})
    for mode in modes:
        off = apart(output(got, mode)[:1], output(call, mode)[:1])
        if off and beyond_rounding(call, got, mode, (slice(1),)):
            hold(False, f"the first of {call.batch} examples changes by {off:.2g} in {mode} with the second")


def calls_are_alike(call: Call, modes: Sequence[str] = MODES) -> None:
    """L28: called twice with the same inputs in eval, it gives the same bit for bit."""
    if "eval" not in modes:
        return
    module = copied(call.module).eval()
    with torch.no_grad(), seeded():
        first = tensor(module(*call.given, **call.options))
    with torch.no_grad(), seeded():
        off = apart(tensor(module(*call.given, **call.options)), first)
    hold(not off, f"a second call with the same inputs differs by {off:.2g}")


def computes(call: Call, other: nn.Module) -> bool:
    """Whether it is another mechanism at this size: with the other's weights it computes what the other does."""
    state = call.module.state_dict()
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in other.state_dict().items()}:
        return False
    other = copy.deepcopy(other).to(call.given[0])
    other.load_state_dict(state)
    for mode in MODES:
        got, want = output(call, mode), output(replace(call, module=other), mode)
        if got.shape != want.shape or not torch.allclose(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max())):
            return False
    return True


def where(module: nn.Module) -> str:
    """The file and line that its class stands in, or its name alone."""
    kind = type(module)
    try:
        return f"{inspect.getsourcefile(kind)}:{inspect.getsourcelines(kind)[1]}"
    except (OSError, TypeError):
        return f"{kind.__module__}.{kind.__qualname__}"


# --- passes -------------------------------------------------------------------------------------------------


def output(call: Call, mode: str) -> Tensor:
    """What a fresh copy of the module gives, always with the same random numbers."""
    module = copied(call.module).train(mode == "training")
    with seeded(), torch.set_grad_enabled(mode == "training"):
        return tensor(module(*call.given, **call.options)).detach()


def tensor(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out[0]


def copied(module: nn.Module) -> nn.Module:
    """A copy, whose buffers and counts may move; the module itself where it can't be copied."""
    try:
        return copy.deepcopy(module)
    except (RuntimeError, TypeError):
        return module


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def apart(got: Tensor, want: Tensor) -> float:
    """The largest difference; 0 for NaN in the same places, NaN for NaN in others."""
    if got.shape != want.shape:
        return float("inf")
    same = (got == want) | (got.isnan() & want.isnan())
    return 0.0 if bool(same.all()) else float((got - want)[~same].abs().max())


def beyond_rounding(call: Call, changed: Call, mode: str, part: tuple[slice, ...]) -> bool:
    """Whether the difference is there in float64 too: what mixes by Fourier transforms differs by rounding alone."""

    def exact(one: Call) -> Tensor:
        def wide(g: Any) -> Any:
            return g.double() if isinstance(g, Tensor) and g.is_floating_point() else g

        module = copy.deepcopy(one.module).double()
        options = {name: wide(g) for name, g in one.options.items()}
        return output(Call(module, tuple(map(wide, one.given)), options), mode)[part]

    try:
        got, want = exact(changed), exact(call)
    except Exception:  # it has no float64: then the bits decide
        return True
    return not apart(got, want) <= 1e-10 * (1 + float(want.abs().max()))
