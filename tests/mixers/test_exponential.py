"""The blocked sum over the past against its recurrence, and against the papers' FFT over the whole length."""

import pytest
import torch
from torch import Tensor

from regard.laws.agreement import close, same
from regard.mixers.exponential import BLOCK, exponential_sum, lags

LENGTHS = (1, 2, 5, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK, 3 * BLOCK + 7, 9 * BLOCK + 1)


def case(T: int, kind: str, B: int = 2, M: int = 3, N: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, log decay, weight and a first state."""
    generator = torch.Generator().manual_seed(T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    x = normal(B, T, M)
    rate = -normal(1 if kind == "complex" else M, N).exp() / 10
    if kind == "real":
        return x, rate, normal(M, N), normal(B, M, N)
    turn = torch.complex(rate, 3 * normal(*rate.shape))
    return x, turn, torch.complex(normal(M, N), normal(M, N)), torch.complex(normal(B, M, N), normal(B, M, N))


def recurrence(x: Tensor, log_decay: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    outs = []
    for t in range(x.shape[1]):
        state = log_decay.exp() * state + x[:, t, :, None]
        outs.append((weight * state).sum(-1).real)
    return torch.stack(outs, 1), state


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("T", LENGTHS)
def test_equals_the_recurrence(T: int, kind: str) -> None:
    leaves = [z.requires_grad_() for z in case(T, kind)]
    x, log_decay, weight, state = leaves
    want = recurrence(*leaves)
    got = exponential_sum(x, (log_decay[..., None] * lags(x)).exp(), weight, state)
    sums = []
    for y, last in (got, want):
        direction = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        sums.append((y * direction).sum() + (last.abs().square()).sum())
    close(got[0].detach(), want[0].detach(), "y")
    close(torch.view_as_real(got[1].detach() + 0j), torch.view_as_real(want[1].detach() + 0j), "state")
    for g, w in zip(torch.autograd.grad(sums[0], leaves), torch.autograd.grad(sums[1], leaves), strict=True):
        close(torch.view_as_real(g + 0j), torch.view_as_real(w + 0j), "gradient")


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("T", [3, 100, 400])
def test_equals_one_fft(T: int, kind: str) -> None:
    """The papers' way: the kernel over all lags, times x in the frequency domain, padded to 2 T."""
    x, log_decay, weight, _ = case(T, kind)
    time = torch.arange(T, dtype=torch.float64)
    kernel = (weight[..., None] * (log_decay[..., None] * time).exp()).sum(1).real
    spectrum = torch.fft.rfft(x, n=2 * T, dim=1) * torch.fft.rfft(kernel, n=2 * T).mT
    want = torch.fft.irfft(spectrum, n=2 * T, dim=1)[:, :T]
    close(exponential_sum(x, (log_decay[..., None] * lags(x)).exp(), weight)[0], want)


def test_in_pieces() -> None:
    """Any cut of the sequence, with the state handed on, gives the same outputs and the same last state."""
    x, log_decay, weight, state = case(200, "real")
    whole, last = exponential_sum(x, (log_decay[..., None] * lags(x)).exp(), weight, state)
    outs = []
    for piece in x.split([1, 0, 70, 1, 128], 1):
        y, state = exponential_sum(piece, (log_decay[..., None] * lags(piece)).exp(), weight, state)
        outs.append(y)
    close(torch.cat(outs, 1), whole)
    close(state, last)


def test_the_future_leaves_no_trace() -> None:
    """Not even a rounding error: bit for bit in the outputs, exactly 0 in the gradients."""
    x, log_decay, weight, _ = case(300, "real")
    powers = (log_decay[..., None] * lags(x)).exp()
    y, _ = exponential_sum(x, powers, weight)
    for t in (0, 63, 64, 200):
        changed = x.clone()
        changed[:, t + 1 :] *= 1e6
        same(exponential_sum(changed, powers, weight)[0][:, : t + 1], y[:, : t + 1])
    x.requires_grad_()
    grad = torch.autograd.grad(exponential_sum(x, powers, weight)[0][:, :150].sum(), x)[0]
    same(grad[:, 150:], torch.zeros_like(grad[:, 150:]))
    assert grad[:, :150].ne(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_single(dtype: torch.dtype) -> None:
    x, log_decay, weight, _ = case(300, "real")
    x = x.to(dtype)
    y, state = exponential_sum(x, (log_decay.float()[..., None] * lags(x)).exp(), weight.float())
    want, _ = exponential_sum(x.double(), (log_decay[..., None] * lags(x.double())).exp(), weight)
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    assert (y.double() - want).abs().max() <= torch.finfo(dtype).eps * want.abs().max()
