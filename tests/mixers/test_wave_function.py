"""The wave function around factored attention: the authors' numbers, what leaves it alone, and a ground state."""

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mixers import naive_factored as naive
from regard.mixers.factored import FactoredAttention
from regard.mixers.wave_function import WaveFunction, log_cosh, patches
from regard.pipeline import Attention

VECTORS = Path(__file__).parents[1] / "vectors" / "B173.npz"
NAMES = {
    "Embed_0.embed": "embed",
    "OuputHead_0.out_layer_norm": "norm",
    "OuputHead_0.output_layer0": "real_proj",
    "OuputHead_0.output_layer1": "imag_proj",
    "OuputHead_0.norm2": "real_norm",
    "OuputHead_0.norm3": "imag_norm",
}
INSIDE = {
    "attn.v": "attention.v_proj",
    "attn.W": "attention.o_proj",
    "attn": "attention",
    "ff.layers_0": "mlp.0",
    "ff.layers_2": "mlp.2",
    "layer_norm_1": "norm1",
    "layer_norm_2": "norm2",
}


def ours(theirs: str) -> str:
    """The name of a parameter of the authors' flax model."""
    path, _, leaf = theirs.rpartition(".")
    leaf = {"kernel": "weight", "scale": "weight"}.get(leaf, leaf)
    if path.startswith("Encoder_0.layers_"):
        layer, _, rest = path.removeprefix("Encoder_0.layers_").partition(".")
        return f"blocks.{layer}.{INSIDE[rest]}.{leaf}"
    return f"{NAMES[path]}.{leaf}"


def test_gives_the_authors_numbers() -> None:
    with np.load(VECTORS) as file:
        found = {k.removeprefix("vit_p_"): torch.from_numpy(file[k]) for k in file if k.startswith("vit_p_")}
        spins, want = torch.from_numpy(file["vit_spins"]), torch.from_numpy(file["vit_logpsi"])
    model = WaveFunction((4, 4), dim=6, num_heads=2, depth=2).double()
    model.load_state_dict({ours(name): p.T if name.endswith("kernel") else p for name, p in found.items()})
    got = model(spins.double())
    assert (got - want).abs().max() < 1e-10
    loops = naive.log_psi(spins.double(), found, 4, 2, 2, (2, 2))
    assert (got - loops).abs().max() < 1e-10


def made(size: tuple[int, int] = (4, 6), patch: tuple[int, int] = (2, 3), **options) -> WaveFunction:
    torch.manual_seed(0)
    model = WaveFunction(size, patch, **{"dim": 8, "num_heads": 2, "depth": 2, **options}).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def some(count: int, spins: int) -> Tensor:
    return torch.randint(2, (count, spins), generator=torch.Generator().manual_seed(1)).double() * 2 - 1


def test_a_shift_by_a_patch_changes_nothing() -> None:
    """Nor does it with factored attention alone; a shift by one site does, and one without the symmetry sees both."""
    spins = some(3, 24).unflatten(1, (4, 6))
    for invariant in (True, False):
        model = made(translation_invariant=invariant)
        want = model(spins.flatten(1))
        for step, same in (((2, 0), invariant), ((0, 3), invariant), ((2, 3), invariant), ((1, 0), False)):
            off = (model(spins.roll(step, (1, 2)).flatten(1)) - want).abs().max()
            assert off < 1e-12 if same else off > 1e-3, (invariant, step)


def test_patches_lie_row_by_row() -> None:
    found = patches(torch.arange(24)[None], (4, 6), (2, 3))
    assert found[0].tolist()[:2] == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]
    assert found[0, 2, 0] == 12


def test_log_cosh() -> None:
    z = torch.complex(*torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    torch.testing.assert_close(log_cosh(z).exp(), torch.cosh(z))
    assert log_cosh(torch.tensor([1e4 + 1j, -1e4 + 1j])).isfinite().all()


def ring(spins: int) -> tuple[Tensor, Tensor]:
    """Configurations without magnetisation and the ground state of the Heisenberg ring, by diagonalisation."""
    states = [s for s in product((-1, 1), repeat=spins) if sum(s) == 0]
    place = {s: n for n, s in enumerate(states)}
    energy = torch.zeros(len(states), len(states), dtype=torch.float64)
    for n, s in enumerate(states):
        for i in range(spins):
            j = (i + 1) % spins
            energy[n, n] += s[i] * s[j] / 4
            if s[i] != s[j]:
                swapped = list(s)
                swapped[i], swapped[j] = s[j], s[i]
                energy[place[tuple(swapped)], n] += 0.5
    return torch.tensor(states, dtype=torch.float32), torch.linalg.eigh(energy)[1][:, 0].float()


@pytest.mark.slow
def test_learns_a_ground_state_with_fewer_parameters() -> None:
    """The ring of 8 spins: its amplitudes, signs and all, from 70 configurations, where dot products know no places."""
    spins, target = ring(8)
    lost, sizes = {}, {}
    for kind in ("factored", "softmax"):
        torch.manual_seed(0)
        model = WaveFunction((1, 8), (1, 2), dim=16, num_heads=4, depth=2)
        if kind == "softmax":
            for block in model.blocks:
                block.attention = Attention(16, 4, bias=True)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
        for _ in range(150):
            log_psi = model(spins)
            psi = torch.exp(log_psi - log_psi.real.max().detach())
            overlap = (psi * target).sum().abs().square() / psi.abs().square().sum()
            optimizer.zero_grad()
            (1 - overlap).backward()
            optimizer.step()
        lost[kind], sizes[kind] = 1 - overlap.item(), sum(p.numel() for p in model.parameters())
    assert lost["factored"] < 0.001
    assert lost["softmax"] > 0.05
    assert sizes["factored"] < sizes["softmax"]


def test_starting_values_and_sizes() -> None:
    model = WaveFunction()
    assert (model.num_spins, model.embed.in_features, len(model.blocks)) == (100, 4, 4)
    attention = model.blocks[0].attention
    assert isinstance(attention, FactoredAttention)
    assert (attention.grid, attention.num_heads, attention.dim) == ((5, 5), 10, 60)
    assert attention.alpha.shape == (10, 25)
    assert not model.embed.bias.any()
    assert model.norm.eps == 1e-6
    with pytest.raises(ValueError, match=r"X is no multiple of patch_x = 3"):
        WaveFunction((4, 8), (2, 3))
    with pytest.raises(ValueError, match="spins has the wrong shape"):
        model(torch.ones(2, 99))
