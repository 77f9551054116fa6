"""What is true of Hedgehog alone; its map is in test_features.py."""

import pytest
import torch
from torch import Tensor

import regard
from regard.laws.agreement import close
from regard.linear import HedgehogAttention
from regard.linear.features import hedgehog


def weights(layer: HedgehogAttention, q: Tensor, k: Tensor) -> Tensor:
    """Of all pairs, a matrix for each head."""
    return layer.mix(q, k, torch.eye(k.shape[2]).expand(*k.shape[:2], -1, -1), None)


def test_learns_softmax_s_weights() -> None:
    """By their divergence from softmax's sharp weights of short vectors; on some that it has not seen."""
    torch.manual_seed(0)
    layer, plain = (regard.create(name, dim=4, num_heads=2) for name in ("hedgehog", "linear"))

    def off(seed: int, layer: HedgehogAttention) -> Tensor:
        q, k = 0.3 * torch.randn(2, 64, 2, 6, 2, generator=torch.Generator().manual_seed(seed))
        want, got = (15 * q @ k.mT).softmax(-1), weights(layer, q, k)
        return (want * (want.log() - got.clamp(min=1e-9).log())).sum(-1).mean()

    assert off(0, layer).requires_grad, "the maps have no say in it"
    before = float(off(999, layer).detach())
    optimiser = torch.optim.Adam([*layer.q_map.parameters(), *layer.k_map.parameters()], lr=0.05)
    for step in range(200):
        loss = off(step, layer)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    after = float(off(999, layer).detach())
    assert 0 < after < 0.5 * before, f"{after:.3f} of {before:.3f}"
    assert after < 0.5 * float(off(999, plain)), "elu + 1 is further away"


def test_the_factor_sharpens() -> None:
    layer, q = regard.create("hedgehog", dim=8, num_heads=2, factor=5.0), torch.randn(1, 2, 3, 4)
    close(layer.q_map(q).double(), hedgehog(5.0 * q).double())
    assert layer.q_map is not layer.k_map
    with pytest.raises(ValueError, match="factor is out of range"):
        HedgehogAttention(8, 2, factor=-1.0)
