"""Where a tensor's numbers lie in memory changes no result: every kernel, for views of what it is given."""

from dataclasses import replace

import pytest
import torch

from regard.kernels import KERNELS, execute
from regard.kernels.problem import Problem

B, H, T, S, D = 2, 4, 9, 24, 8
BIASES = {
    "by heads last": lambda draw: draw(B, T, S, H).permute(0, 3, 1, 2),
    "keys before queries": lambda draw: draw(B, H, S, T).transpose(2, 3),
    "every second key": lambda draw: draw(B, H, T, 2 * S)[..., ::2],
    "one batch, by heads last": lambda draw: draw(1, T, S, H).permute(0, 3, 1, 2),
    "the same for all keys": lambda draw: draw(B, H, T, 1).expand(B, H, T, S),
    "the same for all queries": lambda draw: draw(B, H, 1, S).expand(B, H, T, S),
    "one number": lambda draw: draw(1, 1, 1, 1),
}
VIEWS = {
    "tokens before heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "widths before tokens": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "a part of a wider one": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "every second number": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "tokens that share numbers": lambda x: x.flatten()[: x.shape[2] + D - 1].unfold(0, D, 1).expand(x.shape),
    "one token": lambda x: x[:, :, :1].expand(x.shape),
}


def problem(**fields):
    torch.manual_seed(0)
    q, k, v = torch.randn(B, H, T, D), torch.randn(B, H, S, D), torch.randn(B, H, S, D)
    return Problem(q=q, k=k, v=v, scale=D**-0.5, **fields)


def outcome(p, name):
    """The output, and the gradients of queries, keys and values."""
    out = execute(p, name)
    return [out, *torch.autograd.grad(out.square().sum(), (p.q, p.k, p.v))]


def agree(p):
    p = replace(p, **{name: getattr(p, name).detach().requires_grad_() for name in "qkv"})  # views stay views
    wanted = outcome(p, "eager")
    tried = [name for name, kernel in KERNELS.items() if name != "eager" and not kernel.why_not(p)]
    assert {"chunked", "sdpa"} <= set(tried)
    for name in [*tried, "auto"]:
        for what, got, want in zip(("output", "dq", "dk", "dv"), outcome(p, name), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=f"{name}, {what}")


@pytest.mark.parametrize("layout", BIASES)
def test_a_bias_may_lie_in_any_order(layout):
    agree(problem(bias=BIASES[layout](torch.randn)))


@pytest.mark.parametrize("which", "qkv")
@pytest.mark.parametrize("layout", VIEWS)
def test_queries_keys_and_values_may_lie_in_any_order(layout, which):
    p = problem()
    agree(replace(p, **{which: VIEWS[layout](getattr(p, which))}))
