"""Absolute positions: the sinusoids of 1706.03762 (section 3.5) and learned tables, added to the tokens."""

import math

import pytest
import torch

import regard
from regard.positions import Learned, Sinusoidal


def wave(p: int, c: int, dim: int, base: float = 10000.0) -> float:
    """PE(p, 2i) = sin(p / base^(2i / dim)), PE(p, 2i + 1) = cos of the same."""
    angle = p / base ** ((c - c % 2) / dim)
    return math.cos(angle) if c % 2 else math.sin(angle)


@pytest.mark.parametrize("seed", range(20))
def test_sinusoidal_matches_the_definition(seed):
    gen = torch.Generator().manual_seed(seed)
    B, T, dim = (int(torch.randint(1, top, (), generator=gen)) for top in (4, 6, 6))
    dim *= 2
    x = torch.randn(B, T, dim, dtype=torch.float64)
    at = torch.randint(0, 3000, (B, T) if seed % 2 else (T,), generator=gen)
    wanted = x.clone()
    for b in range(B):
        for t in range(T):
            for c in range(dim):
                wanted[b, t, c] += wave(int(at.expand(B, T)[b, t]), c, dim)
    torch.testing.assert_close(Sinusoidal(dim).embed(x, at), wanted, rtol=0, atol=1e-10)


def test_an_offset_is_one_linear_map():
    """PE(p + 5) = M PE(p) with one M for every p: the reason given for choosing sinusoids."""
    dim, at = 8, torch.arange(60)
    nothing = torch.zeros(1, 60, dim, dtype=torch.float64)
    here, there = (Sinusoidal(dim).embed(nothing, at + s)[0] for s in (0, 5))
    assert there.abs().max() > 0.9
    solution = torch.linalg.lstsq(here[:20], there[:20]).solution
    torch.testing.assert_close(here @ solution, there, rtol=0, atol=1e-6)


def test_sinusoidal_half_precision_is_computed_wide():
    x, at = torch.zeros(1, 2, 8, dtype=torch.bfloat16), torch.tensor([65535, 65536])
    got = Sinusoidal(8).embed(x, at)
    assert got.dtype == torch.bfloat16
    wanted = torch.tensor([[[wave(p, c, 8) for c in range(8)] for p in at.tolist()]])
    torch.testing.assert_close(got.float(), wanted, rtol=0, atol=0.02)


@pytest.mark.parametrize("seed", range(20))
def test_learned_matches_the_definition(seed):
    gen = torch.Generator().manual_seed(seed)
    B, T, dim = (int(torch.randint(1, top, (), generator=gen)) for top in (4, 6, 6))
    part = Learned(dim, max_positions=9).double()
    x = torch.randn(B, T, dim, dtype=torch.float64)
    at = torch.randint(0, 9, (B, T) if seed % 2 else (T,), generator=gen)
    wanted = torch.stack(
        [torch.stack([x[b, t] + part.table[int(at.expand(B, T)[b, t])] for t in range(T)]) for b in range(B)]
    )
    torch.testing.assert_close(part.embed(x, at), wanted, rtol=0, atol=0)
    part.embed(x, at).sum().backward()
    used = torch.bincount(at.expand(B, T).flatten(), minlength=9).double()
    torch.testing.assert_close(part.table.grad, used[:, None].expand(-1, dim))


def test_learned_refuses_what_the_table_lacks():
    part = Learned(4, max_positions=3)
    with pytest.raises(ValueError, match=r"Learned: positions reach .* \(got 0 to 3\); expected 0 to 2; build it with"):
        part.embed(torch.zeros(1, 4, 4), torch.arange(4))
    with pytest.raises(ValueError, match=r"got -1 to -1\); expected 0 to 2"):
        part.embed(torch.zeros(1, 1, 4), torch.tensor([-1]))


@pytest.mark.parametrize("cls", [Learned, Sinusoidal])
def test_refuses_other_widths(cls):
    name = cls.__name__
    with pytest.raises(ValueError, match=rf"{name}: dim is too small \(got 0\); expected an int >= 1"):
        cls(0)
    with pytest.raises(
        ValueError, match=rf"{name}: x has the wrong shape \(got \(1, 3, 6\)\); expected \(B, T, M = 4\)"
    ):
        cls(4).embed(torch.zeros(1, 3, 6), torch.arange(3))


def test_sinusoidal_refuses_odd_widths_and_small_bases():
    with pytest.raises(ValueError, match=r"Sinusoidal: dim is no multiple of pair = 2 \(got 7\)"):
        Sinusoidal(7)
    with pytest.raises(ValueError, match=r"Sinusoidal: base is out of range \(got 1.0\); expected a finite number > 1"):
        Sinusoidal(4, base=1.0)


@pytest.mark.parametrize("name", ["sinusoidal", "learned"])
def test_positions_enter_before_the_projections(name):
    layer = regard.create(name, dim=8, num_heads=2, causal=True).double()
    plain = regard.create("softmax", dim=8, num_heads=2, causal=True).double()
    plain.load_state_dict(layer.state_dict(), strict=False)
    x, at = torch.randn(2, 5, 8, dtype=torch.float64), torch.arange(5)
    torch.testing.assert_close(layer(x), plain(layer.position.embed(x, at)), rtol=0, atol=1e-12)
