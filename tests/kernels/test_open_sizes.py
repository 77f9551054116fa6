"""Layers compiled as one graph whose sizes are all left open."""

import pytest
import torch

import regard


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flare", "moba", "nsa", "dynamic_mask"])
def test_compiles_as_one_graph(name: str) -> None:
    torch._dynamo.reset()
    causal = "causal" in regard.card(name).supports
    layer = regard.create(name, dim=24, num_heads=6, causal=causal, **regard.card(name).example).eval()
    compiled = torch.compile(layer, dynamic=True, fullgraph=True, backend="eager")
    for B, T in ((2, 12), (3, 17)):
        x = torch.randn(B, T, 24, generator=torch.Generator().manual_seed(T))
        torch.testing.assert_close(compiled(x), layer(x))
