"""L23, L24, L43: derivatives are right, second ones right or refused, and the layer can be trained."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from regard import masks
from regard.laws.agreement import Broken, does_not_apply, hold, says
from regard.laws.modules import drops
from regard.laws.registry import LAYERS, law
from regard.laws.subject import Subject


def smaller(s: Subject) -> Subject:
    """Half as wide, where it is built to size; a third where heads of that width can't be."""
    if s.foreign:
        return s
    half, third = (replace(s, dim=s.dim // by, heads=s.heads // 3) for by in (2, 3))
    try:
        half.build()
    except ValueError:
        return third
    return half


def leaves(given: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(g.detach().clone().requires_grad_() if g.is_floating_point() else g for g in given)


def differentiable(module: nn.Module, given: tuple[Tensor, ...], options: dict[str, Any], what: str) -> None:
    """gradcheck for all floating point inputs and all parameters."""
    trained = {key: p for key, p in module.named_parameters() if p.requires_grad}
    given = leaves(given)

    def f(*values: Tensor) -> Tensor:
        parameters = dict(zip(trained, values[len(given) :], strict=True))
        return functional_call(module, parameters, values[: len(given)], options)

    try:
        gradcheck(f, (*given, *leaves(trained.values())), fast_mode=True)
    except RuntimeError as error:
        raise Broken(f"{what}: {error}") from error


def first_derivatives_at(s: Subject, length: int) -> None:
    """With a row that may see nothing, where there may be masks."""
    s = smaller(s)
    module, x = s.build(noise=0.02), s.tokens(length=length)
    options = {}
    if "mask" in s.supports:
        allowed = torch.ones(s.batch, 1, length, length, dtype=torch.bool).tril()
        allowed[0, 0, length - 1] = False
        options["mask"] = allowed
    if length == 1:
        try:
            module(x)
        except ValueError as error:
            says(error, "token")
            return
    if s.foreign and options and not module(x, **options).isfinite().all():
        options["mask"][0, 0, length - 1, 0] = True  # what a row that sees nothing gives is for L8 to say
    differentiable(module, (x,), options, f"{length} tokens")


@law("L23")
def first_derivatives(s: Subject) -> None:
    """Derivatives agree with finite differences, for tokens and all parameters, with a row that may see nothing."""
    first_derivatives_at(s, 5)


@law("L23", weight="heavy")
def first_derivatives_of_few(s: Subject) -> None:
    """Gradients are right for one token and for three, too."""
    for length in (1, 3):
        first_derivatives_at(s, length)


@law("L23", protocols=LAYERS.replace("TokenMixer ", ""), weight="heavy")
def first_derivatives_of_all_inputs(s: Subject) -> None:
    """Derivatives agree with finite differences, for all inputs and parameters."""
    s = smaller(s)
    differentiable(s.build(noise=0.02), s.inputs(), {}, "its inputs")


@law("L24", protocols=LAYERS, weight="heavy")
def second_derivatives(s: Subject) -> None:
    """Second derivatives are right, or refused in so many words."""
    s = smaller(s)
    module, given = s.build(), s.inputs()
    if s.protocol == "TokenMixer":
        given = (given[0][:, :3],)
    try:
        gradgradcheck(module, leaves(given), fast_mode=True)
    except (RuntimeError, NotImplementedError) as error:
        words = str(error)
        if "mismatch" in words or not any(w in words for w in ("differentia", "derivative", "double backward")):
            raise Broken(f"second derivatives: {words}") from error


@law("L43", where=lambda s: "it is not called with tokens alone" if s.given else "", weight="heavy")
def training(s: Subject) -> None:
    """One batch is learnt: the loss comes down to a tenth in at most 200 steps."""
    module = s.build(dtype=torch.float32, noise=0)
    x, target = s.tokens(length=6, dtype=torch.float32), 0.3 * s.tokens(length=6, seed=12, dtype=torch.float32)
    parameters = [p for p in module.parameters() if p.requires_grad]
    if s.foreign and sum(p.numel() for p in parameters) < target.numel():
        does_not_apply("it has fewer parameters than the batch has numbers")
    module.train(not s.foreign or not drops(module))
    optimizer = torch.optim.Adam(parameters, 2e-2)
    first = best = float("nan")
    for step in range(200):
        loss = (module(x) - target).square().mean()
        value = loss.item()
        first, best = (value, value) if step == 0 else (first, min(best, value))
        if best <= first / 10:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise Broken(f"the loss of {first:.3g} only came down to {best:.3g}")


@law("L43", protocols=LAYERS)
def every_parameter_has_a_gradient(s: Subject) -> None:
    """Every parameter gets a gradient, finite and not all 0."""
    module, given, options = s.build(), s.inputs(), {}
    if s.protocol == "TokenMixer" and s.given is None:
        given = (s.tokens(length=9),)
        if "padding" in s.supports:
            options["mask"] = masks.padding(lengths=torch.tensor([9, 7]).repeat(s.batch)[: s.batch])
    wanted = {key: p for key, p in module.named_parameters() if p.requires_grad or s.card}
    if not wanted:
        does_not_apply("it has no parameters")
    module(*given, **options).square().sum().backward()
    for key, p in wanted.items():
        hold(p.grad is not None, f"{key} has no gradient")
        hold(p.grad.isfinite().all(), f"{key} has a gradient that isn't finite")
        hold(p.grad.ne(0).any(), f"{key} has gradient 0")
