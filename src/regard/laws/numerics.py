"""L2, L25 to L28, L38: precision, large logits, layouts, sizes, determinism, and moves between dtypes."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from regard.laws.agreement import Broken, close, does_not_apply, hold, naive_precision, near, run, same, says
from regard.laws.registry import LAYERS, MIXERS, law
from regard.laws.subject import Subject, no_worse_than_naive

FINE, FINER = 1e-6, 1e-7
"""Steps of a difference quotient. float64's own noise in the finer one is 1e-9; float32's is about 1."""


@contextlib.contextmanager
def only_what_torch_can(s: Subject) -> Iterator[None]:
    """Someone else's module may use what torch has not in every dtype."""
    try:
        yield
    except RuntimeError as error:
        if s.foreign and "not implemented for" in str(error):
            does_not_apply(str(error))
        raise


def not_routed(s: Subject) -> str:
    return "in half precision content may route to other keys" if "routed" in s.traits else ""


def half_precision(s: Subject, dtype: torch.dtype) -> None:
    with only_what_torch_can(s):
        no_worse_than_naive(s, dtype, [(s.tokens(dtype=dtype, seed=100 + n),) for n in range(4)])


@law("L2", where=not_routed, weight="heavy")
def bfloat16_precision(s: Subject) -> None:
    """In bfloat16, forward and backward are no worse than a plain computation in bfloat16."""
    half_precision(s, torch.bfloat16)


@law("L2", where=not_routed, weight="heavy")
def float16_precision(s: Subject) -> None:
    """In float16, forward and backward are no worse than a plain computation in float16."""
    half_precision(s, torch.float16)


@law("L2", protocols=LAYERS)
def single_precision(s: Subject) -> None:
    """In float32, forward and backward are no worse than a plain computation in float32."""
    no_worse_than_naive(s, torch.float32, [s.inputs(torch.float32)])


def quotient(module: nn.Module, given: tuple[Tensor, ...], step: float, seed: int) -> dict[str, Tensor]:
    """The central difference of the output and all gradients, along a random direction of inputs and parameters."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [p.data for p in module.parameters() if p.is_floating_point()]
    start = [p.clone() for p in leaves]
    ways = [torch.randn(g.shape, generator=generator, dtype=torch.float64) for g in (*given, *leaves)]

    def at(far: float) -> dict[str, Tensor]:
        for p, p0, way in zip(leaves, start, ways[len(given) :], strict=True):
            p.copy_(p0 + far * way)
        moved = (g + far * way if g.is_floating_point() else g for g, way in zip(given, ways, strict=False))
        return run(module, *moved)

    ahead, back = at(step), at(-step)
    at(0.0)
    return {key: (ahead[key] - back[key]) / (2 * step) for key in ahead}


@law("L2", protocols=LAYERS)
def float64_is_float64(s: Subject) -> None:
    """In float64 output and gradients are smooth down to float64's precision: nothing inside is cast to less."""
    module, given = s.build(), s.inputs()
    found = {key: float(t.abs().max()) for key, t in run(module, *given).items()}
    floor = 1e-3 * max(found.values())  # some are 0 but for the rounding of much larger terms, such as keys' biases
    noisy = dict.fromkeys(found, float("inf"))
    for seed in range(3):  # a choice or a kink may fall between two points of one direction, but not of all
        coarse, fine = (quotient(module, given, step, seed) for step in (FINE, FINER))
        for key in found:
            scale = floor + found[key] + float(coarse[key].abs().max()) or 1.0
            noise = float((coarse[key] - fine[key]).abs().max()) / scale
            if noise <= 1e-5:
                noisy.pop(key, None)
            elif key in noisy:
                noisy[key] = min(noisy[key], noise)
        if not noisy:
            return
    texts = ", ".join(f"{key} ({noise:.2g})" for key, noise in noisy.items())
    raise Broken(f"difference quotients are noisy, as if something were cast to less than float64: {texts}")


def finite(results: dict[str, Tensor], what: str) -> None:
    wrong = [key for key, t in results.items() if not t.isfinite().all()]
    hold(not wrong, f"{what}: {', '.join(wrong)} not finite")


@law("L25", pipeline=True)
def large_logits(s: Subject) -> None:
    """Logits of thousands, and identical ones: finite forward and backward, in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        module, x = s.build(dtype=dtype), s.tokens(dtype=dtype)
        q, k = (p(x).unflatten(-1, (-1, s.width)).float().norm(dim=-1).max() for p in (module.q_proj, module.k_proj))
        with torch.no_grad():
            module.q_proj.weight *= 1e4 * s.width**0.5 / float(q * k)
        finite(run(module, x), f"logits of 1e4 in {dtype}")
        with torch.no_grad():
            module.q_proj.weight.zero_()
        finite(run(module, x), f"identical logits in {dtype}")


@law("L25", protocols=MIXERS)
def large_inputs(s: Subject) -> None:
    """Inputs with a standard deviation of 300: finite forward and backward, in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        given = [300 * g if g.is_floating_point() else g for g in s.inputs(dtype)]
        with only_what_torch_can(s):
            finite(run(s.build(dtype=dtype), *given), f"inputs of 300 in {dtype}")


@law("L25", pipeline=True, weight="heavy")
def larger_logits_are_no_less_exact(s: Subject) -> None:
    """Queries times 10 in bfloat16 are as exact as plain ones, by the same measure."""

    def grow(module: Any) -> None:
        with torch.no_grad():
            module.q_proj.weight *= 10

    given: list[tuple[Tensor, ...]] = [(s.tokens(dtype=torch.bfloat16, seed=100 + n),) for n in range(8)]
    no_worse_than_naive(s, torch.bfloat16, given, grow)


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda t: t.mT.contiguous().mT,
    "sliced": lambda t: torch.cat([t, t], 2)[..., : t.shape[2]],
    "offset": lambda t: torch.cat([t[:1], t])[1:],
    "flipped": lambda t: t.flip(1).contiguous().flip(1),
}


@law("L26", weight="heavy")
def layouts(s: Subject) -> None:
    """However x and the output's gradient lie in memory, the answer is that of the contiguous ones."""
    module, x, grad_out = s.build(), s.tokens(), s.tokens(seed=8)
    want = run(module, x, grad_out=grad_out)
    parameters = {key: p for key, p in module.named_parameters() if p.requires_grad}
    for how, lay in LAYOUTS.items():
        got = module(laid := lay(x).detach().requires_grad_())
        close(got, want["out"], how)
        grads = torch.autograd.grad(got, [laid, *parameters.values()], lay(grad_out), allow_unused=True)
        for (key, p), grad in zip({"input0": laid, **parameters}.items(), grads, strict=True):
            close(torch.zeros_like(p) if grad is None else grad, want[key], f"{how}: gradient of {key}")
    repeated = s.tokens(1).expand(s.batch, -1, -1)
    close(module(repeated), module(repeated.contiguous()), "stride 0")
    summed = torch.autograd.grad(module(leaf := x.clone().requires_grad_()).sum(), leaf)[0]  # a stride 0 gradient
    close(summed, run(module, x, grad_out=torch.ones_like(x))["input0"], "gradient of a sum")


@law("L27")
def sizes(s: Subject) -> None:
    """No batch, no tokens, one token, odd lengths: a result of the right shape, or a refusal."""
    refusals: type[Exception] = Exception if s.foreign else ValueError
    for causal in s.causalities:
        module = s.build(causal=causal)
        for batch, length in ((0, 5), (2, 0), (0, 0), (1, 1), (1, 2), (3, 17)):
            what = f"{batch} sequences of {length} tokens"
            x = s.tokens(batch, length).requires_grad_()
            try:
                y = module(x)
            except refusals as error:
                hold(batch * length < 3, f"{what} are refused: {error}")
                if not s.foreign:
                    says(error, length, "token")
                continue
            hold(y.shape == x.shape, f"{what} give {tuple(y.shape)}")
            hold(y.isfinite().all(), f"{what} give NaN or inf")
            y.sum().backward()
            hold(x.grad is not None and x.grad.shape == x.shape, f"{what} get no gradient")


@law("L27", function=True)
def head_widths(s: Subject) -> None:
    """Any head width, or a refusal at the time of building; values may be wider than keys."""
    for width in (1, 3, 8):
        try:
            f: Any = s.form(width=width)
        except ValueError as error:
            says(error, width)
            hold(width % 2 == 1, f"heads of {width} are refused: {error}")
            continue
        q, k, v = f.qkv()
        out = f(q, k, v)
        hold(out.shape == (*q.shape[:3], width), f"heads of {width} give {tuple(out.shape)}")
        if s.is_part:
            close(out, f(q, k, v, kernel="eager"), f"heads of {width}")
        if "linear_in_values" not in s.traits:
            continue
        q, k, v = f.qkv(value_width=width + 2)
        out = f(q, k, v)
        hold(out.shape[-1] == width + 2, f"values of {width + 2} give {out.shape[-1]}")
        close(out[..., :width], f(q, k, v[..., :width]), f"values wider than keys of {width}")


@law("L28", protocols=LAYERS)
def determinism(s: Subject) -> None:
    """The same call gives the same bits, again and again, and so do the gradients."""
    module, given = s.build(dtype=torch.float32), s.inputs(torch.float32)
    first = run(module, *given)
    for _ in range(5):
        same(module(*given), first["out"], "the same call again")
    again = run(module, *given)
    for key in first:
        same(again[key], first[key], f"the same call again: {key}")


@law("L38")
def autocast(s: Subject) -> None:
    """Under autocast the output is in autocast's dtype, and as exact as that allows."""
    module, x = s.build(dtype=torch.float32), s.tokens(16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x)
    if s.foreign:
        got = got.bfloat16()  # torch's own rule leaves float32 where the last step is no product
    hold(got.dtype == torch.bfloat16, f"under autocast the output is {got.dtype}")
    want = s.build(dtype=torch.float32).double()(x.double())
    low = s.build(dtype=torch.float32).bfloat16()
    if isinstance(getattr(low, "kernel", None), str):
        low.kernel = "eager"
    with naive_precision():
        naive = low(x.bfloat16())
    near(got.detach(), want.detach(), naive.detach(), "autocast")


@law("L38", protocols=LAYERS)
def moves_between_dtypes(s: Subject) -> None:
    """`.bfloat16().float()` leaves no buffer at bfloat16's precision; outputs have the module's dtype."""
    moved = s.build(dtype=torch.float32).bfloat16()
    with only_what_torch_can(s):
        dtype = moved(*s.inputs(torch.bfloat16)).dtype
    hold(dtype == torch.bfloat16, f"in bfloat16 the output is {dtype}")
    moved = moved.float()
    fresh = s.build(dtype=torch.float32)
    with torch.no_grad():
        for p, q in zip(fresh.parameters(), moved.parameters(), strict=True):
            p.copy_(q)
    given = s.inputs(torch.float32)
    same(moved(*given), fresh(*given), "the output after .bfloat16().float()")
