"""L23, L24, L43: derivatives are right, second ones right or refused, and the layer can be trained."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from laws.subject import B, build, causalities, law, says, tokens
from regard import masks


@law("L23")
@pytest.mark.parametrize("length", [1, 3, 5])
def test_first_derivatives(name: str, length: int) -> None:
    """Against finite differences, for tokens and all parameters, with a row that may see nothing."""
    module = build(name, dim=12, num_heads=2, noise=0.02)
    x = tokens(B, length, dim=12).requires_grad_()
    keys = [k for k, _ in module.named_parameters()]
    options = {}
    if "mask" in module.supports:
        allowed = torch.ones(B, 1, length, length, dtype=torch.bool).tril()
        allowed[0, 0, length - 1] = False
        options["mask"] = allowed

    def f(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return functional_call(module, dict(zip(keys, parameters, strict=True)), (x,), options)

    if length == 1:
        try:
            module(x.detach())
        except ValueError as error:
            says(error, "token")
            return
    parameters = [p.detach().requires_grad_() for p in module.parameters()]
    assert gradcheck(f, (x, *parameters), fast_mode=True)


@law("L24")
def test_second_derivatives(name: str) -> None:
    """Right, or refused in so many words."""
    module, x = build(name, dim=12, num_heads=2), tokens(B, 3, dim=12).requires_grad_()
    try:
        assert gradgradcheck(module, (x,), fast_mode=True)
    except (RuntimeError, NotImplementedError) as error:
        words = str(error)
        assert "differentia" in words or "derivative" in words or "double backward" in words, words
        assert "mismatch" not in words, words


@law("L43")
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


@law("L43")
def test_every_parameter_has_a_gradient(name: str) -> None:
    module, x = build(name), tokens(B, 9)
    mask = {"mask": masks.padding(lengths=torch.tensor([9, 7]))} if "padding" in module.supports else {}
    module(x, **mask).square().sum().backward()
    for key, p in module.named_parameters():
        assert p.grad is not None, f"{key} has no gradient"
        assert p.grad.isfinite().all(), f"{key} has a gradient that isn't finite"
        assert p.grad.ne(0).any(), f"{key} has gradient 0"
