"""L23, L24, L43: derivatives are right, second ones right or refused, and the layer can be trained."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

import regard
from laws.subject import ALL, B, build, causalities, inputs, law, says, tokens
from regard import masks


@law("L23")
@pytest.mark.parametrize("length", [1, 3, 5])
def test_first_derivatives(name: str, length: int) -> None:
    """Against finite differences, for tokens and all parameters, with a row that may see nothing."""
    module = build(name, dim=12, num_heads=2, noise=0.02)
    x = tokens(B, length, dim=12)
    options = {}
    if "mask" in module.supports:
        allowed = torch.ones(B, 1, length, length, dtype=torch.bool).tril()
        allowed[0, 0, length - 1] = False
        options["mask"] = allowed
    if length == 1:
        try:
            module(x)
        except ValueError as error:
            says(error, "token")
            return
    assert differentiable(module, (x,), options)


@law("L23", protocols=ALL, where=lambda card: card.protocol != "TokenMixer")
def test_first_derivatives_of_all_inputs(name: str) -> None:
    assert differentiable(build(name, dim=12, num_heads=2, noise=0.02), inputs(name, dim=12, num_heads=2), {})


def differentiable(module: torch.nn.Module, given: tuple[torch.Tensor, ...], options: dict) -> bool:
    """gradcheck for all floating point inputs and all parameters."""
    keys = [k for k, _ in module.named_parameters()]
    given = tuple(g.detach().clone().requires_grad_() if g.is_floating_point() else g for g in given)

    def f(*values: torch.Tensor) -> torch.Tensor:
        parameters = dict(zip(keys, values[len(given) :], strict=True))
        return functional_call(module, parameters, values[: len(given)], options)

    parameters = [p.detach().requires_grad_() for p in module.parameters()]
    return gradcheck(f, (*given, *parameters), fast_mode=True)


@law("L24", protocols=ALL)
def test_second_derivatives(name: str) -> None:
    """Right, or refused in so many words."""
    module = build(name, dim=12, num_heads=2)
    given = inputs(name, dim=12, num_heads=2)
    if regard.card(name).protocol == "TokenMixer":
        given = (given[0][:, :3],)
    given = tuple(g.detach().clone().requires_grad_() if g.is_floating_point() else g for g in given)
    try:
        assert gradgradcheck(module, given, fast_mode=True)
    except (RuntimeError, NotImplementedError) as error:
        words = str(error)
        assert "differentia" in words or "derivative" in words or "double backward" in words, words
        assert "mismatch" not in words, words


@law("L43", where=lambda card: card.inputs is None)
def test_training(name: str) -> None:
    """One batch is learnt (loss down to a tenth in at most 200 steps), and every parameter has a gradient."""
    for causal in causalities(name)[-1:]:
        module = build(name, causal=causal, dtype=torch.float32, noise=0).train()
        x, target = tokens(B, 6, dtype=torch.float32), 0.3 * tokens(B, 6, seed=12, dtype=torch.float32)
        optimizer = torch.optim.Adam(module.parameters(), 2e-2)
        first = best = None
        for _ in range(200):
            loss = (module(x) - target).square().mean()
            value = loss.item()
            first, best = first or value, min(best or value, value)
            if best <= first / 10:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert best <= first / 10, f"loss {first:.3g} only came down to {best:.3g}"


@law("L43", protocols=ALL)
def test_every_parameter_has_a_gradient(name: str) -> None:
    module, given, mask = build(name), inputs(name), {}
    if regard.card(name).protocol == "TokenMixer" and regard.card(name).inputs is None:
        given = (tokens(B, 9),)
        mask = {"mask": masks.padding(lengths=torch.tensor([9, 7]))} if "padding" in module.supports else {}
    if not list(module.parameters()):
        return
    module(*given, **mask).square().sum().backward()
    for key, p in module.named_parameters():
        assert p.grad is not None, f"{key} has no gradient"
        assert p.grad.isfinite().all(), f"{key} has a gradient that isn't finite"
        assert p.grad.ne(0).any(), f"{key} has gradient 0"
