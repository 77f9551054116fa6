"""L50: what torch does with functions, a mechanism lets be done to itself: mapped, differentiated, traced, exported."""

import linecache
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from regard import masks
from regard.laws.agreement import Broken, close, does_not_apply, hold, near, same
from regard.laws.registry import BATCHED, LAYERS, law
from regard.laws.subject import Subject
from regard.laws.together import hidden, stream


def said(error: Exception) -> bool:
    """Whether it is a refusal in one line: raised by a `raise` of the mechanism's own, and not from inside torch."""
    kinds = (ValueError, TypeError, NotImplementedError, RuntimeError)
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not isinstance(error, kinds) or len(str(error).strip().splitlines()) != 1:
        return False
    file = trace.tb_frame.f_code.co_filename
    raised = linecache.getline(file, trace.tb_lineno).strip().startswith("raise ")
    return raised and not file.startswith(os.path.dirname(torch.__file__))


@contextmanager
def or_refused(s: Subject, what: str) -> Iterator[None]:
    """What is inside works, or the mechanism says in one line that it does not support it.

    For other code torch may say it: its fused attention, for one, has no forward mode.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Broken:
        raise
    except NotImplementedError as error:
        if s.foreign:
            does_not_apply(f"{what}: {' '.join(str(error).split())[:100]}")
        if not said(error):
            raise Broken(f"{what}: NotImplementedError: {' '.join(str(error).split())[:300]}") from error
    except Exception as error:
        if not said(error):
            raise Broken(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def floating(s: Subject) -> tuple[tuple[Tensor, ...], Callable[..., tuple[Any, ...]]]:
    """The inputs that may be differentiated, and how to put others in their place."""
    given = s.inputs()
    at = [n for n, g in enumerate(given) if g.is_floating_point()]

    def filled(*leaves: Tensor) -> tuple[Any, ...]:
        whole: list[Any] = list(given)
        for n, leaf in zip(at, leaves, strict=True):
            whole[n] = leaf
        return tuple(whole)

    return tuple(given[n] for n in at), filled


def calls(s: Subject) -> Iterator[tuple[str, Any, tuple[Tensor, ...], dict[str, Any]]]:
    """A module of each causality with what it is called with, and for mixers of tokens a call with padding, too."""
    for causal in s.causalities:
        module = s.build(causal=causal)
        yield f"causal={causal}", module, s.inputs(), {}
        if s.protocol == "TokenMixer" and s.given is None and "padding" in s.supports:
            yield f"causal={causal} and padding", module, s.inputs(), {"mask": masks.padding(hidden(s, s.length))}


@law("L50", protocols=BATCHED, weight="heavy")
def mapped_over_the_batch(s: Subject) -> None:
    """torch.vmap over the batch, one sequence at a time, gives what the batch gives."""
    for name, module, given, call in calls(s):
        if call or any(len(g) != len(given[0]) for g in given):
            continue
        with or_refused(s, f"vmap, {name}"), torch.no_grad():
            got = torch.vmap(lambda *one, m=module: m(*(g[None] for g in one))[0])(*given)
            close(got, module(*given), f"vmap, {name}")


@law("L50", protocols=BATCHED, weight="heavy")
def gradients_of_each_sample(s: Subject) -> None:
    """vmap of grad gives each sample's gradients."""
    module, given = s.build(), s.inputs()
    if any(len(g) != len(given[0]) for g in given):
        does_not_apply("its inputs have no batch in common")
    params = dict(module.named_parameters())
    if not params:
        does_not_apply("it has no parameters")

    def loss(params: dict[str, Tensor], *one: Tensor) -> Tensor:
        return torch.func.functional_call(module, params, tuple(g[None] for g in one)).square().sum()

    with or_refused(s, "vmap of grad"):
        got = torch.vmap(torch.func.grad(loss), (None, *(0 for _ in given)))(params, *given)
        for row in range(len(given[0])):
            one = loss(params, *(g[row] for g in given))
            want = torch.autograd.grad(one, list(params.values()), allow_unused=True)
            for (key, g), w in zip(got.items(), want, strict=True):
                close(g[row], torch.zeros_like(g[row]) if w is None else w, f"{key} of sample {row}")


@law("L50", protocols=LAYERS, weight="heavy")
def forward_mode(s: Subject) -> None:
    """A Jacobian times a vector, forwards, is what backward says of it: w (J t) = (w J) t."""
    for name, module, _, call in calls(s):
        leaves, filled = floating(s)
        generator = torch.Generator().manual_seed(3)
        tangents = tuple(torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in leaves)

        def f(*given: Tensor, m: Any = module, call: Any = call, filled: Any = filled) -> Tensor:
            return m(*filled(*given), **call)

        with or_refused(s, f"jvp, {name}"):
            out, forwards = torch.func.jvp(f, leaves, tangents)[:2]
            wanted = [x.clone().requires_grad_() for x in leaves]
            plain = f(*wanted)
            close(out.detach(), plain.detach(), f"outputs beside a jvp, {name}")
            w = torch.randn(plain.shape, generator=generator, dtype=plain.dtype)
            back = torch.autograd.grad(plain, wanted, w, allow_unused=True)
            want = sum(((g * t).sum() for g, t in zip(back, tangents, strict=True) if g is not None), torch.zeros(()))
            close((forwards * w).sum().detach(), want.to(out.dtype), f"jvp, {name}")


@law("L50", protocols=LAYERS, weight="heavy")
def hessians(s: Subject) -> None:
    """torch.func.hessian in two directions, forwards through backward, is what backward through backward gives."""
    module, (leaves, filled) = s.build(), floating(s)
    generator = torch.Generator().manual_seed(3)
    ways = [[torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in leaves] for _ in range(2)]

    def f(a: Tensor) -> Tensor:
        moved = (x + a[0] * t + a[1] * u for x, t, u in zip(leaves, *ways, strict=True))
        return module(*filled(*moved)).square().sum()

    with or_refused(s, "hessian"):
        got = torch.func.hessian(f)(torch.zeros(2, dtype=leaves[0].dtype))
        want = torch.func.jacrev(torch.func.jacrev(f))(torch.zeros(2, dtype=leaves[0].dtype)).detach()
        close(got.detach(), want, "hessian")


@law("L50", protocols=LAYERS, weight="heavy")
def fake_tensors(s: Subject) -> None:
    """Under FakeTensorMode, where there are shapes and no data, outputs have the real ones' shapes and dtypes."""
    for name, module, given, call in calls(s):
        want = module(*given, **call)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with or_refused(s, f"fake tensors, {name}"), mode:
            got = module(*(mode.from_tensor(g) for g in given), **call)
            hold(got.shape == want.shape and got.dtype == want.dtype, f"fake tensors, {name}: {got.shape}")


@law("L50", needs="compile", where=lambda s: "its inputs are its own" if s.given is not None else "", weight="long")
def exported_with_a_free_length(s: Subject) -> None:
    """torch.export with a length that is free, without bounds of its own, gives one graph, right at other lengths."""
    longest = s.example.get("max_length")
    # torch frees no axis that may have a size of 0 or 1, as that of the tokens beside those that stand apart.
    free = torch.export.Dim("T", min=2 + s.example.get("num_global", 0), max=longest)
    for causal in s.causalities:
        module, x = s.build(causal=causal), s.tokens()
        with or_refused(s, f"export, causal={causal}"):
            exported = torch.export.export(module, (x,), dynamic_shapes=({1: free},)).module()
            for length in (s.length, 5, min(31, longest or 31), min(150, longest or 150)):
                other = s.tokens(length=length, seed=8)
                try:
                    want = module(other)
                except ValueError:  # more tokens than it has positions for
                    continue
                close(exported(other), want, f"exported, causal={causal}, at {length} tokens")


@law("L50", protocols=LAYERS, weight="heavy")
def traced_by_jit(s: Subject) -> None:
    """torch.jit.trace gives a graph that is right for other inputs of the shapes."""
    for name, module, given, call in calls(s):
        if call:
            continue
        with or_refused(s, f"jit.trace, {name}"), torch.no_grad():
            traced = torch.jit.trace(module, given, check_trace=False)
            others = tuple(1.7 * g.flip(1) if g.is_floating_point() and g.dim() > 1 else g for g in given)
            others = others if s.given is None else given
            close(traced(*others), module(*others), f"jit.trace, {name}")


@law("L50", protocols=LAYERS, weight="heavy")
def inference_then_training(s: Subject) -> None:
    """After calls under torch.inference_mode training goes on as if there had been none."""
    module, fresh, (leaves, filled) = s.build(), s.build(), floating(s)
    with torch.inference_mode():
        module(*filled(*(x.clone() for x in leaves)))
    results = []
    for one in (module, fresh):
        wanted = [x.clone().requires_grad_() for x in leaves]
        one.train()
        torch.manual_seed(0)
        out = one(*filled(*wanted))
        leaves_ = [*wanted, *one.parameters()]
        grads = torch.autograd.grad(out.square().sum(), leaves_, allow_unused=True)
        results.append([out.detach(), *(g for g in grads if g is not None)])
    for n, (got, want) in enumerate(zip(*results, strict=True)):
        same(got, want, f"result {n} after inference_mode")


@law("L50", needs="streaming", weight="heavy")
def inference_then_steps(s: Subject) -> None:
    """A state that was begun under torch.inference_mode can be stepped from outside of it."""
    module, x = s.build(causal=True), s.tokens()
    with torch.inference_mode():
        _, state = module.step(x[:, :4].clone(), module.init_state(s.batch, s.length))
    with torch.no_grad():
        close(module.step(x[:, 4:], state)[0], module(x)[:, 4:], "steps after inference_mode")


@law("L50", protocols=BATCHED, weight="heavy")
def autocast_in_steps(s: Subject) -> None:
    """Under autocast outputs are about as exact as in half precision, in a stream as in the full pass."""
    chooses = "routed" in s.traits
    for causal in s.causalities:
        exact, wide, half = (
            s.build(causal=causal, dtype=torch.float32).to(d) for d in (torch.float64, torch.float32, torch.bfloat16)
        )
        given = s.inputs(torch.float32)
        want, naive = exact(*cast(given, torch.float64)), half(*cast(given, torch.bfloat16))
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            got = wide(*given)
        compare(got, want, naive, f"autocast, causal={causal}", chooses=chooses)
        if causal and "streaming" in s.supports:
            if len(given) > 1:  # a stream is given tokens alone
                want, naive = exact(given[0].double()), half(given[0].bfloat16())
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                got = stream(wide, given[0], [1, 3, s.length - 4])
            compare(got, want, naive, "autocast in step", chooses=chooses)


def cast(given: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(g.to(dtype) if g.is_floating_point() else g for g in given)


def compare(got: Tensor, want: Tensor, naive: Tensor, what: str, *, chooses: bool) -> None:
    """Against float64, three times as far off as the module in half precision at most."""
    hold(got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if chooses:  # other roundings choose other keys
        hold(got.isfinite().all(), f"{what}: NaN or inf")
        return
    near(got.to(naive.dtype), want.detach(), naive.detach(), what, grad=True)
