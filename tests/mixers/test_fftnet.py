"""FFTNet against a plain Fourier sum, the author's numbers (A113), and what the transform keeps."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import regard
from mixers.naive_fftnet import naive_fftnet, naive_fftnet_b
from regard import masks
from regard.laws.agreement import close
from regard.mixers.fftnet import FFTNet, modrelu, spectral_filter

VECTORS = Path(__file__).parents[1] / "vectors" / "A113.npz"


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def module(M: int, H: int, N: int, activation: str = "modrelu") -> FFTNet:
    made = FFTNet(M, H, max_length=N, activation=activation).double()
    with torch.no_grad():
        for p in made.parameters():
            p.normal_(std=0.7)
    return made


def mlp_of(made: FFTNet) -> tuple[Tensor, ...]:
    first, _, second = made.adapt
    return first.weight, first.bias, second.weight, second.bias


def same_with_gradients(got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    close(got, want)
    direction = normal(*got.shape)
    for g, w in zip(*(torch.autograd.grad(z, leaves, direction) for z in (got, want)), strict=True):
        close(g, w)


@pytest.mark.parametrize(("B", "T", "M", "H"), [(1, 1, 1, 1), (2, 5, 6, 3), (2, 8, 4, 2), (1, 7, 3, 1)])
def test_is_the_formula(B, T, M, H):
    made, x = module(M, H, T), normal(B, T, M).requires_grad_()
    want = naive_fftnet(x, made.base_filter[..., None], made.base_bias[..., None], mlp_of(made))
    same_with_gradients(made(x), want, [x, *made.parameters()])


@pytest.mark.parametrize(("B", "T", "M", "H"), [(2, 5, 6, 3), (1, 6, 4, 2)])
def test_is_the_formula_with_gelu(B, T, M, H):
    """The later form. The oracle normalises first and adds the residual."""
    made, x = module(M, H, T, "gelu"), normal(B, T, M).requires_grad_()
    norm = normal(M), normal(M)
    normed = F.layer_norm(x, (M,), *norm)
    want = naive_fftnet_b(x, made.base_filter[..., None], made.base_bias[..., None], mlp_of(made), norm)
    same_with_gradients(x + made(normed), want, [x, *made.parameters()])


@pytest.mark.parametrize(("length", "N"), [(5, 8), (1, 7), (7, 12)])
def test_shorter_sequences_are_filled_up(length, N):
    """The filter of N tokens on [x, 0]; the mean is over x alone."""
    made, x = module(4, 2, N), normal(2, length, 4)
    change = made.adapt(x.mean(1)).unflatten(-1, (2, -1)).tanh()
    filled = torch.cat([x, torch.zeros(2, N - length, 4)], 1).double()
    want = spectral_filter(filled, made.base_filter + change, made.base_bias[None], length=N)[:, :length]
    close(made(x), want)
    keep = torch.arange(N) < length
    padded = torch.cat([x, torch.full((2, N - length, 4), float("nan")).double()], 1)
    close(made(padded, mask=masks.padding(keep.expand(2, N)))[:, :length], want)


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {n.removeprefix(f"{case}_"): torch.from_numpy(file[n]) for n in file if n.startswith(case)}


def author(given: dict[str, Tensor], activation: str) -> FFTNet:
    (_, T, M), H = given["x"].shape, int(given["heads"])
    made = FFTNet(M, H, max_length=T, activation=activation).double()
    bias = given["P_modrelu_bias" if activation == "modrelu" else "P_base_bias"]
    state = {"base_filter": given["P_base_filter"][..., 0], "base_bias": bias[..., 0]}
    state |= {n.replace("P_adaptive_mlp", "adapt"): p for n, p in given.items() if n.startswith("P_adaptive_mlp")}
    made.load_state_dict(state)
    return made


@pytest.mark.parametrize("case", ["c1", "c2", "c3", "c4", "c5"])
def test_authors_numbers(case):
    """c1, c2: the module with its norm after; c3: without adaptation; c4, c5: the later form, its norm before."""
    given = vectors(case)
    x = given["x"].requires_grad_()
    if case == "c3":
        fixed = given["P_base_filter"][None, ..., 0], given["P_modrelu_bias"][None, ..., 0]
        y = spectral_filter(x, *fixed, length=x.shape[1])
    elif case in ("c4", "c5"):
        norm = given["P_pre_norm.weight"], given["P_pre_norm.bias"]
        y = author(given, "gelu")(F.layer_norm(x, x.shape[-1:], *norm))
    else:
        y = author(given, "modrelu")(x)
    out = x + y
    if case in ("c1", "c2", "c3"):
        out = F.layer_norm(out, x.shape[-1:], given["P_norm.weight"], given["P_norm.bias"])
    close(out, given["out"])
    close(torch.autograd.grad(out, x, given["w"])[0], given["gx"])


@pytest.mark.parametrize("N", [7, 8])
def test_energy_is_kept(N):
    """Parseval, the paper's claim; and a filter of 1 without threshold is the identity."""
    x = normal(2, N, 4)
    power = torch.fft.rfft(x, dim=1, norm="ortho").abs().square()
    twice = power.sum(1) * 2 - power[:, 0] - (power[:, -1] if N % 2 == 0 else 0)
    close(twice, x.square().sum(1))
    bins = N // 2 + 1
    close(spectral_filter(x, torch.ones(1, 2, bins), torch.zeros(1, 2, bins), length=N), x)
    half = spectral_filter(x, torch.full((1, 2, bins), 0.5), torch.zeros(1, 2, bins), length=N)
    close(half.square().sum(1), x.square().sum(1) / 4)
    made = FFTNet(4, 2, max_length=N).double()
    for parameter in (made.base_bias, *made.adapt[2].parameters()):
        nn.init.zeros_(parameter)
    close(made(x).square().sum(1), x.square().sum(1))  # where a mean loses some


def test_modrelu():
    z = torch.tensor([3 + 4j, 0.3 + 0.4j, 0, 0.0003j], dtype=torch.complex128)
    got = modrelu(z, torch.tensor(-1.0).double())
    close(torch.view_as_real(got), torch.view_as_real(z * torch.tensor([0.8, 0, 0, 0], dtype=torch.float64)))
    small = modrelu(z[3], torch.tensor(0.0).double())  # below 1e-3 it falls faster
    assert abs(small / z[3] - 0.3) < 1e-12


def test_heads_own_blocks_of_features():
    made, x = module(6, 3, 9), normal(1, 9, 6)
    want = made(x)
    with torch.no_grad():
        made.base_filter[1] += 1
    changed = (made(x) != want).any(1)[0]
    assert changed.tolist() == [False, False, True, True, False, False]


def test_refusals():
    with pytest.raises(ValueError, match="causal"):
        regard.create("fftnet", dim=8, num_heads=2, causal=True)
    with pytest.raises(ValueError, match=r"dim is no multiple of num_heads = 3 \(got 8\)"):
        FFTNet(8, 3)
    with pytest.raises(ValueError, match=r"max_length is too small \(got 0\); expected an int >= 1"):
        FFTNet(8, 2, max_length=0)
    with pytest.raises(ValueError, match=r"activation is unknown \(got 'relu'\); expected one of 'modrelu', 'gelu'"):
        FFTNet(8, 2, activation="relu")
    with pytest.raises(ValueError, match=r"x is too long \(got 6 tokens\); expected at most max_length = 5"):
        FFTNet(8, 2, max_length=5)(torch.randn(1, 6, 8))
    x, filters = torch.randn(1, 6, 8), torch.ones(1, 2, 3)
    with pytest.raises(ValueError, match=r"frequencies \(got 3\); expected length // 2 \+ 1 = 4"):
        spectral_filter(x, filters, filters, length=6)
    with pytest.raises(ValueError, match=r"x is too long \(got 6 tokens\); expected at most length = 5"):
        spectral_filter(x, filters, filters, length=5)
    with pytest.raises(ValueError, match=r"offset has the wrong shape \(got \(1, 2, 4\)\)"):
        spectral_filter(x, filters, torch.ones(1, 2, 4), length=6)
    with pytest.raises(ValueError, match=r"features is no multiple of heads = 3 \(got 8\)"):
        spectral_filter(x, torch.ones(1, 3, 4), torch.ones(1, 3, 4), length=6)
    with pytest.raises(ValueError, match=r"head_dim is none of its options \(got 3\)"):
        regard.create("fftnet", dim=8, num_heads=2, head_dim=3, causal=False)
