"""What is true of T2R alone; its map is in test_features.py."""

import pytest
import torch

import regard
from regard.linear import T2RAttention


@torch.no_grad()
@pytest.mark.parametrize("features", [None, 3, 9])
def test_weights_have_the_rank_of_the_features(features: int | None) -> None:
    torch.manual_seed(1)
    options = {"dim": 12, "num_heads": 2, "num_features": features, "dtype": torch.float64}
    layer, size = regard.create("t2r", **options), 6 if features is None else features
    assert layer.num_features == size
    q, k = torch.randn(2, 1, 2, 40, 6, dtype=torch.float64)
    weights = layer.mix(q, k, torch.eye(40).double().expand(1, 2, -1, -1), None)
    assert (weights >= 0).all()
    assert (torch.linalg.matrix_rank(weights) == size).all()
    assert regard.create("t2r", causal=True, **options).init_state(1, 1).sums.shape == (1, 2, size, 7)


@torch.no_grad()
def test_a_query_without_features_gives_zero() -> None:
    layer = T2RAttention(8, 2).double()
    q, k, v = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64)
    layer.q_map.linear.weight.copy_(torch.eye(4))
    q[:, :, 1] = -q[:, :, 1].abs()
    out = layer.mix(q, k, v, None)
    assert (out[:, :, 1] == 0).all()
    assert out.isfinite().all()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="T2R: features is too small"):
        T2RAttention(8, 2, num_features=0)
