"""What is true of DPFP alone; its map is in test_features.py."""

import pytest
import torch

import regard
from regard.linear import DPFPAttention


@torch.no_grad()
@pytest.mark.parametrize("nu", [1, 2, 4])
def test_has_room_for_more_keys_than_features_go_in(nu: int) -> None:
    """The weights of many tokens have rank 2 D nu, up to the 2D that alone are neighbours of themselves."""
    torch.manual_seed(0)
    layer = regard.create("dpfp", dim=8, num_heads=2, nu=nu, dtype=torch.float64)
    q, k = torch.randn(2, 1, 2, 200, 4, dtype=torch.float64)
    weights = layer.mix(q, k, torch.eye(200).double().expand(1, 2, -1, -1), None)
    room = torch.linalg.matrix_rank(weights)
    assert (room > 4).all()
    assert (room <= 2 * 4 * nu).all()
    assert (layer.q_map(q) == 0).double().mean() > 0.5
    assert (weights == 0).any(), "keys of other cells are not seen at all"
    plain = regard.create("linear", dim=8, num_heads=2, dtype=torch.float64)
    less = plain.mix(q, k, torch.eye(200).double().expand(1, 2, -1, -1), None)
    assert (torch.linalg.matrix_rank(less) <= 4).all()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="DPFP: nu is too small"):
        DPFPAttention(8, 2, nu=0)
