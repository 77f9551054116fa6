"""What is true of memory-efficient attention alone: how much it holds at once."""

import torch

import regard
from laws.measured import largest
from regard.kernels.chunked import TILE_BYTES


def test_no_more_than_a_tile_of_scores_at_once():
    """The T x T matrix would be four times as large; a bias keeps the layer from the fused kernels."""
    T = 4096
    layer = regard.create("memory_efficient+kerple", dim=8, num_heads=1, causal=True)
    x = torch.randn(1, T, 8)
    with torch.no_grad():
        assert largest(lambda: layer(x)) <= TILE_BYTES // 4 == T * T // 4
