"""Agent attention on feature maps against loops and the authors' numbers (B106)."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from laws.measured import flops
from linear.naive_agent import naive_agent, naive_agent_biases, naive_depthwise, naive_pool
from regard.laws.agreement import close
from regard.linear.agent_grid import GridAgentAttention

VECTORS = Path(__file__).parents[1] / "vectors" / "B106.npz"


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {name.removeprefix(f"{case}_"): torch.from_numpy(file[name]) for name in file if name[0] == case}


@pytest.mark.parametrize(("case", "side"), [("a", 5), ("b", 8)])
def test_authors_numbers(case, side):
    given = vectors(case)
    M, H, n = given["Wo"].shape[0], int(given["heads"]), int(given["agents"])
    module = GridAgentAttention(M, H, size=(side, side), num_agents=n, bias=True).double()
    state = {"o_proj.weight": given["Wo"], "o_proj.bias": given["bo"]}
    state |= {"conv.weight": given["dwc_w"], "conv.bias": given["dwc_b"]}
    for at, name in enumerate("qkv"):
        state |= {f"{name}_proj.weight": given["Wqkv"][at * M : (at + 1) * M]}
        state |= {f"{name}_proj.bias": given["bqkv"][at * M : (at + 1) * M]}
    state |= {"key_table": given["an_bias"], "key_rows": given["ah_bias"][0], "key_columns": given["aw_bias"][0]}
    # Theirs put the agents last here.
    state |= {"query_table": given["na_bias"], "query_rows": given["ha_bias"][0].permute(0, 3, 1, 2)}
    state |= {"query_columns": given["wa_bias"][0].permute(0, 3, 1, 2)}
    module.load_state_dict(state)
    x, want, direction, grad = (given[n].mT.unflatten(2, (side, side)) for n in ("x", "y", "w", "gx"))
    y = module(x.requires_grad_())
    close(y, want)
    close(torch.autograd.grad(y, x, direction)[0], grad)


def test_grid_of_unequal_sides():
    """Against the loops, where rows and columns cannot be mixed up."""
    Y, X, H = 3, 5, 2
    module = GridAgentAttention(8, H, size=(Y, X), num_agents=4).double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    x = normal(2, Y * X, 8).requires_grad_()
    q, k, v = module.split(x, x)
    flat = (z.transpose(1, 2).flatten(2) for z in (q, v))
    agents = naive_pool(next(flat), Y, X, 2).unflatten(-1, (H, -1)).transpose(1, 2)
    biases = naive_agent_biases(
        module.key_table,
        module.query_table,
        module.key_rows[None],
        module.key_columns[None],
        module.query_rows.permute(0, 2, 3, 1)[None],
        module.query_columns.permute(0, 2, 3, 1)[None],
        Y,
        X,
    )
    local = naive_depthwise(next(flat), module.conv.weight, module.conv.bias, Y, X)
    want = module.o_proj(naive_agent(q, agents, k, v, *biases).transpose(1, 2).flatten(2) + local)
    got = module(x.mT.unflatten(2, (Y, X))).flatten(2).mT
    close(got, want)
    leaves, direction = [x, *module.parameters()], normal(*got.shape)
    for g, w in zip(*(torch.autograd.grad(z, leaves, direction) for z in (got, want)), strict=True):
        close(g, w)


def test_cost_is_linear_in_places():
    def cost(size: tuple[int, int]) -> int:
        layer = GridAgentAttention(8, 2, size=size, num_agents=4).double()
        return flops(lambda: layer(normal(1, 8, *size)))

    assert cost((16, 32)) == 8 * cost((8, 8)) > 0


def test_refusals():
    with pytest.raises(ValueError, match="causal"):
        regard.create("agent_grid", dim=8, num_heads=2, causal=True)
    with pytest.raises(ValueError, match=r"num_agents is no square number \(got 5\)"):
        GridAgentAttention(8, 2, size=(4, 4), num_agents=5)
    with pytest.raises(ValueError, match=r"size is too small \(got 0\); expected an int >= 1"):
        GridAgentAttention(8, 2, size=(4, 0), num_agents=4)
    with pytest.raises(ValueError, match=r"size is no pair \(got \(4,\)\); expected \(height, width\)"):
        GridAgentAttention(8, 2, size=(4,), num_agents=4)
    made = regard.create("agent_grid", dim=8, num_heads=2, causal=False, size=(3, 4), num_agents=4)
    with pytest.raises(
        ValueError, match=r"x has the wrong shape \(got \(1, 8, 4, 3\)\); expected \(B, M = 8, Y = 3, X = 4\)"
    ):
        made(torch.randn(1, 8, 4, 3))
