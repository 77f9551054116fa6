"""Agent attention against loops, and its form as a generalised linear attention."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from linear.naive_agent import naive_agent
from regard.laws.agreement import close
from regard.linear.agent import AgentAttention, agent_attention, pooling, stretching


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def same_with_gradients(got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    close(got, want)
    direction = normal(*got.shape)
    for g, w in zip(*(torch.autograd.grad(z, leaves, direction) for z in (got, want)), strict=True):
        close(g, w)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1, 1), (2, 3, 5, 7, 2, 3, 4), (2, 2, 4, 3, 6, 2, 3)])
def test_is_the_formula(shape, biased, padded):
    B, H, T, S, n, D, V = shape
    sizes = (B, H, T, D), (B, H, n, D), (B, H, S, D), (B, H, S, V), *([(H, n, S), (H, T, n)] if biased else [])
    leaves = [normal(*size).requires_grad_() for size in sizes]
    keep = torch.arange(S) < torch.randint(1, S + 1, (B, 1)) if padded else None
    q, a, k, v, *biases = leaves
    named = {n: b[None] for n, b in zip(("key_bias", "query_bias"), biases, strict=False)}
    same_with_gradients(
        agent_attention(q, a, k, v, keep=keep, **named), naive_agent(q, a, k, v, *biases, keep=keep), leaves
    )
    if padded:
        hidden = ~keep[:, None, :, None]
        bad = (z.detach().masked_fill(hidden, math.nan) for z in (k, v))
        close(agent_attention(q, a, *bad, keep=keep, **named), naive_agent(q, a, k, v, *biases, keep=keep))
        nothing = torch.zeros_like(keep)
        assert (agent_attention(q, a, k, v, keep=nothing, **named) == 0).all()


@pytest.mark.parametrize(("length", "cells"), [(1, 1), (12, 4), (7, 3), (5, 5), (3, 7), (17, 5)])
def test_pooling_is_adaptive_pooling(length, cells):
    x = normal(2, length, 3)
    rank = torch.arange(length)[None]
    member = pooling(rank, torch.tensor([[length]]), cells).double()
    close((member / member.sum(-1, keepdim=True) @ x).mT, F.adaptive_avg_pool1d(x.mT, cells))


@pytest.mark.parametrize("length", [1, 3, 7, 16])
def test_stretching_is_interpolation(length):
    table = normal(1, 2, 7)
    matrix = stretching(torch.arange(length)[None], torch.tensor([[length]]), 7, torch.float64)
    close(table @ matrix, F.interpolate(table, length, mode="linear"))


def sequence_by_hand(module: AgentAttention, x: Tensor) -> Tensor:
    """The module from its parts: pooled queries, stretched tables, torch's own convolution."""
    T, n = x.shape[1], module.num_agents
    q, k, v = module.split(x, x)
    k, v = (z.repeat_interleave(module.num_heads // module.num_kv_heads, 1) for z in (k, v))
    agents = F.adaptive_avg_pool1d(q.mT.flatten(0, 1), n).unflatten(0, q.shape[:2]).mT
    biases = F.interpolate(module.key_table, T, mode="linear"), F.interpolate(module.query_table, T, mode="linear").mT
    local = module.conv(v.transpose(1, 2).flatten(2).mT).mT
    return module.o_proj(naive_agent(q, agents, k, v, *biases).transpose(1, 2).flatten(2) + local)


@pytest.mark.parametrize(("length", "agents"), [(9, 4), (6, 6), (3, 5), (1, 2)])
def test_sequence_module(length, agents):
    module = AgentAttention(12, 4, num_kv_heads=2, num_agents=agents, bias=True).double()
    with torch.no_grad():
        module.key_table.normal_()
        module.query_table.normal_()
    x = normal(2, length, 12).requires_grad_()
    same_with_gradients(module(x), sequence_by_hand(module, x), [x, *module.parameters()])


def test_as_many_agents_as_queries():
    """Then the agents are the queries themselves: the pooling is the identity."""
    member = pooling(torch.arange(6)[None], torch.tensor([[6]]), 6)
    assert torch.equal(member[0], torch.eye(6).bool())


def test_is_a_generalised_linear_attention():
    """The paper's equality: phi_q(q) phi_k(k)^T are weights whose rows sum to 1, and give the same output."""
    q, a, k, v = (normal(2, 2, n, 3) for n in (5, 3, 7, 7))
    phi_q = (q @ a.mT * 3**-0.5).softmax(-1)
    phi_k = (a @ k.mT * 3**-0.5).softmax(-1).mT
    weights = agent_attention(q, a, k, torch.eye(7).double().expand(2, 2, 7, 7))
    close(weights, phi_q @ phi_k.mT)
    close(weights.sum(-1), torch.ones(2, 2, 5).double())
    close(agent_attention(q, a, k, v), phi_q @ (phi_k.mT @ v))


@torch.no_grad()
def test_weights_have_the_rank_of_the_agents():
    """What makes them linear in the length: rows that sum to 1, made of three for all seven tokens."""
    module = AgentAttention(14, 2, num_agents=3).double()
    module.conv.weight.zero_()
    module.conv.bias.zero_()
    weights = module.mix(normal(2, 2, 7, 7), normal(2, 2, 7, 7), torch.eye(7).double().expand(2, 2, 7, 7), None)
    close(weights.sum(-1), torch.ones(2, 2, 7).double())
    assert (torch.linalg.matrix_rank(weights) == 3).all()


def test_no_square_matrix():
    T, sizes = 512, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out

    module = AgentAttention(8, 2, num_agents=8)
    with Watch():
        module(torch.randn(1, T, 8), mask=torch.arange(T)[None] < 500)
    assert max(sizes) <= 2 * 8 * T


def test_refusals():
    with pytest.raises(ValueError, match="causal"):
        regard.create("agent", dim=8, num_heads=2, causal=True)
    with pytest.raises(ValueError, match=r"num_agents is too small \(got 0\); expected an int >= 1"):
        AgentAttention(8, 2, num_agents=0)
    with pytest.raises(
        ValueError, match=r"agents has the wrong shape \(got \(1, 1, 4, 2\)\); expected \(B = 1, H = 2, n, D = 2\)"
    ):
        agent_attention(*(normal(1, h, 4, 2) for h in (2, 1, 2, 2)))
