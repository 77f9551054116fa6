"""Where there are no values nobody looks at them, whichever tensor torch works on; and what a mask lets reach what."""

import pytest
import torch
from torch import Tensor, nn

import regard
from regard import masks
from regard.kernels import KERNELS
from regard.kernels.finite import reaches
from regard.kernels.problem import Problem
from regard.positions import Kerple


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Energy(nn.Module):
    """Causal attention with a position that learns, as one number."""

    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.position, self.kernel = Kerple(2), kernel

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        slots = {} if bias is not None else {"position": self.position}
        return regard.attention(q, k, v, mask=masks.causal(), bias=bias, kernel=self.kernel, **slots).square().sum()


@pytest.mark.parametrize("kernel", ["auto", "chunked", "eager"])
def test_torch_func_works_on_a_stage_or_a_bias_alone(kernel: str) -> None:
    q, k, v = (normal(n, 1, 2, 9, 4) for n in range(3))
    energy = Energy(kernel)
    names = dict(energy.named_parameters())
    got = torch.func.grad(lambda held: torch.func.functional_call(energy, held, (q, k, v)))(names)
    want = torch.autograd.grad(energy(q, k, v), list(names.values()))
    for name, expected in zip(names, want, strict=True):
        torch.testing.assert_close(got[name], expected)

    bias = normal(3, 1, 2, 9, 9).requires_grad_()
    (expected,) = torch.autograd.grad(energy(q, k, v, bias), bias)
    torch.testing.assert_close(torch.func.grad(lambda b: energy(q, k, v, b))(bias.detach()), expected)


def test_shapes_alone() -> None:
    """Every kernel that can run a problem can say what shape it gives, on tensors without data."""
    picked = masks.chosen(normal(0, 1, 2, 32, 1) < 0, 32, 32, (1, 32))
    cases = {None: 32, masks.causal(): 32, masks.window(9): 32, masks.causal() & masks.window(9): 1, picked: 32}
    ran = set()
    for mask, T in cases.items():
        q, k, v = (normal(n, 1, 2, t, 8) for n, t in enumerate((T, 32, 32)))
        for name, kernel in KERNELS.items():
            there = Problem(*(t.to("meta") for t in (q, k, v)), 0.5, mask=mask)
            if not kernel.why_not(Problem(q, k, v, 0.5, mask=mask)) and not kernel.why_not(there):
                out = kernel.run(there)
                assert out.is_meta, name
                assert out.shape == (1, 2, T, 8), name
                ran.add(name)
    assert {"eager", "chunked", "sdpa", "block_sparse", "window", "decode"} <= ran


MASKS = {
    "none": None,
    "full": masks.full(),
    "causal": masks.causal(),
    "padding": masks.padding(torch.arange(7) < torch.tensor([[7], [4]])),
    "causal, padding": masks.causal() & masks.padding(torch.arange(7) < torch.tensor([[7], [4]])),
    "window": masks.window(2),
    "window, causal": masks.window(2) & masks.causal(),
    "a mask for each head": masks.per_head([masks.causal(), masks.window(1), masks.full()]),
    "dense": masks.dense(normal(5, 2, 3, 7, 7) < 0) & masks.causal(),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("T", [7, 3, 0])
def test_who_reaches_a_mark(mask: str, T: int) -> None:
    i, j = torch.arange(7 - T, 7), torch.arange(7)
    marks = [normal(n, 2, 3, 7) < -0.8 for n in range(3)] + [torch.ones(2, 3, 7, dtype=torch.bool)]
    allowed = torch.ones(2, 3, T, 7, dtype=torch.bool)
    if MASKS[mask] is not None:
        allowed = MASKS[mask].at(i, j).expand(2, 3, T, 7)
    for found, marked in zip(reaches(MASKS[mask], i, j, *marks, chunk=2), marks, strict=True):
        assert torch.equal(found.expand(2, 3, T), (allowed & marked[:, :, None]).any(-1))


def test_wide_sums_need_no_other_kernel() -> None:
    """Only float32 sums over many keys that are seen lose anything."""
    few = masks.window(64)
    for dtype, mask, refused in (
        (torch.float32, None, True),
        (torch.float64, None, False),
        (torch.float32, few, False),
    ):
        q, k, v = (
            normal(0, 1, 1, 2, 4, dtype=dtype),
            normal(1, 1, 1, 40_000, 4, dtype=dtype),
            normal(2, 1, 1, 40_000, 3, dtype=dtype),
        )
        reasons = [r for r in KERNELS["sdpa"].why_not(Problem(q, k, v, 0.5, mask=mask)) if "sums" in r]
        assert bool(reasons) == refused
