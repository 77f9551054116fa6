"""L51: gradients are slopes, also where scores are peaked."""

import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from regard.laws.agreement import does_not_apply, hold
from regard.laws.registry import LAYERS, law
from regard.laws.subject import Subject

WIDTH = 64
"""Of a head, in models that are used."""
SPREADS = (0.5, 1.0, 1.4)
"""Standard deviations of queries and keys. With 1.4 at that width, scores reach 8 and features of kernels e^10."""
NOISE = (0.02, 0.3, 1.0)
"""What parameters are moved by, the more the more what is spread: far from where they start, bounds on them are met."""
SHORT = 6
"""Tokens."""
STEP = 3e-7
"""Of the differences: what they lose by rounding and by curvature is about the same, and small."""


@law("L51", protocols=LAYERS)
def gradients_are_slopes(s: Subject) -> None:
    """With heads 64 wide, and queries and keys as spread as in trained models, gradients are the output's slopes."""
    seed = zlib.crc32(s.name.encode())
    causal = s.causalities[seed % len(s.causalities)] if s.causalities else None
    module, given = spread(s, SPREADS[seed // 2 % len(SPREADS)], causal)
    compare_slopes(s, module, given, [list(differentiated(module, given))])


@law("L51", protocols=LAYERS, weight="heavy")
def every_gradient_is_a_slope(s: Subject) -> None:
    """The gradient of each input and parameter is the slope, with queries and keys spread 0.5, 1.0 and 1.4.

    A gradient that goes straight through is judged where it doesn't have to: near the parameters' start.
    """
    for causal in causalities(s):
        for size, noise in zip(SPREADS, NOISE, strict=True):
            module, given = spread(s, size, causal, NOISE[0] if "straight_through" in s.traits else noise)
            compare_slopes(s, module, given, [[name] for name in differentiated(module, given)], f"spread {size}: ")


@law("L51", protocols=LAYERS, traits="straight_through")
def gradients_go_straight_through(s: Subject) -> None:
    """Some parameter that is held at a bound has a gradient, though moving it changes nothing."""
    held = 0
    for far in (-10.0, 10.0):  # below what they may be, and above
        module, given = spread(s, SPREADS[1], None)
        few = [p for p in module.parameters() if p.dim() == 1]  # a number a head, or the like
        with torch.no_grad():
            for p in few:
                p.fill_(far)
        grads = torch.autograd.grad(energy(module, given), few, allow_unused=True)
        for p, g in zip(few, grads, strict=True):
            level = slope(partial(energy, module, given), {p: torch.ones_like(p)}, STEP) == 0
            held += level and g is not None and bool(g.ne(0).any())
    hold(held, "every gradient is a slope: nothing goes straight through")


def energy(module: Any, given: tuple[Tensor, ...]) -> Tensor:
    return module(*given).square().sum()


def causalities(s: Subject) -> list[bool | None]:
    """What it can be built with, if it knows of causality at all."""
    return [*s.causalities] or [None]


def spread(s: Subject, size: float, causal: bool | None, noise: float = NOISE[0]) -> tuple[Any, tuple[Tensor, ...]]:
    """A module with heads 64 wide, and inputs with which its queries and keys have this standard deviation."""
    try:
        wide = s if s.foreign else replace(s, dim=2 * WIDTH, heads=2)
        module, given = wide.build(causal=causal, noise=noise), wide.inputs()
    except ValueError:  # its small instance goes with the subject's own heads
        wide = replace(s, dim=s.heads * WIDTH)
        module, given = wide.build(causal=causal, noise=noise), wide.inputs()
    if s.protocol in ("TokenMixer", "Pooler") and s.given is None:
        given = (given[0][:1, :SHORT],)
    if not isinstance(module, nn.Module):
        return module, tuple(size * g if g.is_floating_point() else g for g in given)
    projections = [p for name in ("q_proj", "k_proj") if isinstance(p := getattr(module, name, None), nn.Linear)]
    if not projections:
        return module, tuple(size * g if g.is_floating_point() else g for g in given)
    made: dict[nn.Module, Tensor] = {}
    hooks = [p.register_forward_hook(lambda p, args, out: made.update({p: out.detach()})) for p in projections]
    module(*given)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        for p, out in made.items():
            for parameter in p.parameters():
                parameter.mul_(size / out.std())
    return module, given


def differentiated(module: Any, given: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What has gradients: inputs and parameters, by name."""
    found = {f"input{n}": g.requires_grad_() for n, g in enumerate(given) if g.is_floating_point()}
    parameters = module.named_parameters() if isinstance(module, nn.Module) else ()
    return found | {name: p for name, p in parameters if p.requires_grad}


def compare_slopes(
    s: Subject, module: Any, given: tuple[Tensor, ...], groups: list[list[str]], where: str = ""
) -> None:
    """Gradients next to differences along random directions, each of which moves the tensors of one group."""
    generator = torch.Generator().manual_seed(8)
    leaves = differentiated(module, given)
    with torch.enable_grad():
        out = module(*given)
        weights = torch.randn(out.shape, generator=generator, dtype=out.dtype)
        found = torch.autograd.grad((out * weights).sum(), list(leaves.values()), allow_unused=True)
    grads = {name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(leaves.items(), found, strict=True)}
    whole = float(torch.stack([g.norm() for g in grads.values()]).norm())
    rounding = 16 * torch.finfo(out.dtype).eps * float((out * weights).detach().norm()) / STEP + 1e-9 * whole
    settled = False
    for group in groups:
        for _ in range(3):  # a direction along which a selection changes tells nothing
            directions = {name: torch.randn(leaves[name].shape, generator=generator).double() for name in group}
            moved = {leaves[name]: d for name, d in directions.items()}
            one, two = (slope(lambda: (module(*given) * weights).sum(), moved, n * STEP) for n in (3, 1))
            terms = torch.cat([(grads[name] * d).flatten() for name, d in directions.items()])
            usual = max(float(terms.norm()), abs(two))
            if abs(one - two) <= 1e-6 * usual + rounding:
                break
        else:
            continue
        settled = True
        off = abs(float(terms.sum()) - two)
        what = group[0] if len(group) == 1 else "all together"
        said = f"{where}{what}: the gradient says {float(terms.sum()):.8g}, differences {two:.8g}"
        hold(off <= 1e-5 * usual + rounding, said)
    if not settled and {"routed", "sparse"} & s.traits:
        does_not_apply("its selection changes along every direction")
    hold(settled, f"{where}differences do not settle: {one:.8g} and {two:.8g}; no step is small enough")


@torch.no_grad()
def slope(value: Callable[[], Tensor], moved: dict[Tensor, Tensor], step: float) -> float:
    """The central difference."""
    ends = []
    for sign in (1, -1):
        before = {x: x.clone() for x in moved}
        for x, direction in moved.items():
            x.add_(direction, alpha=sign * step)
        ends.append(float(value()))
        for x, old in before.items():
            x.copy_(old)
    return (ends[0] - ends[1]) / (2 * step)
