"""L25 to L28, L38: large logits, layouts, sizes, determinism, and moves between dtypes."""

import pytest
import torch

from laws.subject import (
    ALL,
    DIM,
    HEADS,
    B,
    T,
    build,
    causalities,
    close,
    form,
    inputs,
    law,
    naive_precision,
    near,
    no_worse_than_naive,
    run,
    same,
    says,
    tokens,
)


@law("L25", pipeline=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_logits(name: str, dtype: torch.dtype) -> None:
    """Logits of thousands: finite forward and backward, in whatever dtype."""
    module = build(name, dtype=dtype)
    x = tokens(dtype=dtype)
    q, k = (p(x).unflatten(-1, (-1, DIM // HEADS)).float().norm(dim=-1).max() for p in (module.q_proj, module.k_proj))
    with torch.no_grad():
        module.q_proj.weight *= 1e4 * (DIM / HEADS) ** 0.5 / float(q * k)
    got = run(module, x)
    assert all(t.isfinite().all() for t in got.values())
    with torch.no_grad():
        module.q_proj.weight.zero_()  # identical logits
    assert all(t.isfinite().all() for t in run(module, x).values())


@law("L25", pipeline=True)
def test_larger_logits_are_no_less_exact(name: str) -> None:
    """Queries times 10 in half precision, by the same measure as plain ones."""

    def grow(module):
        with torch.no_grad():
            module.q_proj.weight *= 10

    no_worse_than_naive(name, torch.bfloat16, [(tokens(dtype=torch.bfloat16, seed=100 + n),) for n in range(8)], grow)


@law("L26")
def test_layouts(name: str) -> None:
    """However x and the output's gradient lie in memory, the answer is that of the contiguous ones."""
    module, x, grad_out = build(name), tokens(), tokens(seed=8)
    want = run(module, x, grad_out=grad_out)
    layouts = {
        "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "channels first": lambda t: t.mT.contiguous().mT,
        "sliced": lambda t: torch.cat([t, t], 2)[..., : t.shape[2]],
        "offset": lambda t: torch.cat([t[:1], t])[1:],
        "flipped": lambda t: t.flip(1).contiguous().flip(1),
    }
    for how, lay in layouts.items():
        got = module(lay(x).detach().requires_grad_())
        grads = torch.autograd.grad(got, list(module.parameters()), lay(grad_out), allow_unused=True)
        close(got, want["out"], how)
        for (key, p), grad in zip(module.named_parameters(), grads, strict=True):
            close(torch.zeros_like(p) if grad is None else grad, want[key], f"{how}: {key}")
    repeated = tokens(1).expand(B, -1, -1)
    close(module(repeated), module(repeated.contiguous()), "stride 0")
    summed = torch.autograd.grad(module(x_ := x.clone().requires_grad_()).sum(), x_)[0]  # a stride 0 gradient
    close(summed, run(module, x, grad_out=torch.ones_like(x))["input0"], "gradient of a sum")


@law("L27")
def test_sizes(name: str) -> None:
    """No batch, no tokens, one token, odd lengths: a result of the right shape, or a refusal."""
    for causal in causalities(name):
        module = build(name, causal=causal)
        for batch, length in ((0, 5), (2, 0), (0, 0), (1, 1), (1, 2), (3, 17)):
            x = torch.randn(batch, length, DIM, dtype=torch.float64, requires_grad=True)
            try:
                y = module(x)
            except ValueError as error:
                says(error, length, "token")
                assert batch * length < 3, f"{length} tokens refused"
                continue
            assert y.shape == x.shape
            assert y.isfinite().all()
            y.sum().backward()
            assert x.grad.shape == x.shape


@law("L27", function=True)
@pytest.mark.parametrize("width", [1, 3, 8])
def test_head_widths(name: str, width: int) -> None:
    """Any head width, or a refusal at the time of building; values may be wider than keys."""
    try:
        f = form(name, width=width)
    except ValueError as error:
        says(error, width)
        assert width % 2 == 1
        return
    if width == 1 and form(name) is None:
        return
    q, k, v = f.qkv()
    want = f(q, k, v, kernel="eager")
    close(f(q, k, v), want)
    if "linear_in_values" not in f.card.traits:
        return
    q, k, v = f.qkv(value_width=width + 2)
    out = f(q, k, v)
    assert out.shape[-1] == width + 2
    close(out[..., :width], f(q, k, v[..., :width]))


@law("L28", protocols=ALL)
def test_determinism(name: str) -> None:
    module, given = build(name, dtype=torch.float32), inputs(name, torch.float32)
    first = run(module, *given)
    for _ in range(20):
        same(module(*given), first["out"], "forward")
    again = run(module, *given)
    for key in first:
        same(again[key], first[key], key)


@law("L38")
def test_autocast(name: str) -> None:
    """Under autocast the output is in autocast's dtype, and as exact as that allows."""
    module, x = build(name, dtype=torch.float32), tokens(16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = module(x)
        assert got.dtype == torch.bfloat16
    want = build(name, dtype=torch.float32).double()(x.double())
    low = build(name, dtype=torch.float32).bfloat16()
    if hasattr(low, "kernel"):
        low.kernel = "eager"
    with naive_precision():
        naive = low(x.bfloat16())
    near(got.detach(), want.detach(), naive.detach(), "autocast")


@law("L38", protocols=ALL)
def test_moves_between_dtypes(name: str) -> None:
    """`.bfloat16().float()` leaves no buffer at bfloat16's precision; outputs have the module's dtype."""
    moved = build(name, dtype=torch.float32).bfloat16()
    assert moved(*inputs(name, torch.bfloat16)).dtype == torch.bfloat16
    moved = moved.float()
    fresh = build(name, dtype=torch.float32)
    with torch.no_grad():
        for p, q in zip(fresh.parameters(), moved.parameters(), strict=True):
            p.copy_(q)
    given = inputs(name, torch.float32)
    same(moved(*given), fresh(*given), "after .bfloat16().float()")


def test_lengths_are_what_the_tests_assume() -> None:
    assert T > 3
