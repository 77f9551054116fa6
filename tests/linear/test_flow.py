"""Flow-Attention against loops over sinks and sources, the authors' numbers (B101) and the conservation of flows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from linear.naive_flow import naive_flow
from regard import masks
from regard.laws.agreement import close
from regard.linear.conserved_flow import _flows, _through, causal_flow_attention, flow_attention
from regard.linear.flow import FlowAttention

VECTORS = Path(__file__).parents[1] / "vectors" / "B101.npz"


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def qkv(B: int, H: int, G: int, T: int, S: int, D: int, V: int) -> list[Tensor]:
    shapes = (B, H, T, D), (B, G, S, D), (B, G, S, V)
    return [normal(*shape).requires_grad_() for shape in shapes]


def same_with_gradients(got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    close(got, want)
    direction = normal(*got.shape)
    for g, w in zip(*(torch.autograd.grad(z, leaves, direction) for z in (got, want)), strict=True):
        close(g, w)


@pytest.mark.parametrize("bound", [1.0, 5.0])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1, 1), (2, 3, 3, 5, 7, 3, 4), (2, 2, 1, 9, 4, 2, 3)])
def test_is_the_formula(shape, bound):
    q, k, v = qkv(*shape)
    repeated = (z.repeat_interleave(shape[1] // shape[2], 1) for z in (k, v))
    same_with_gradients(flow_attention(q, k, v, bound=bound), naive_flow(q, *repeated, clamp=bound), [q, k, v])


@pytest.mark.parametrize("causal", [False, True])
def test_hidden_tokens_are_not_there(causal):
    q, k, v = qkv(2, 2, 2, 7, 7, 3, 3)
    keep = torch.tensor([[0, 1, 1, 0, 1, 1, 0], [1, 1, 0, 1, 1, 1, 1]]).bool()
    if causal:
        got = causal_flow_attention(q, k, v, keep=keep)[0]
    else:
        got = flow_attention(q, k, v, keep=keep, query_keep=keep)
    real = keep[:, None, :, None]
    want = naive_flow(q, k, v, causal=causal, keep=keep)
    same_with_gradients(got * real, want * real, [q, k, v])
    bad_k, bad_v = (z.detach().masked_fill(~real, float("nan")) for z in (k, v))
    again = (
        causal_flow_attention(q, bad_k, bad_v, keep=keep)[0]
        if causal
        else flow_attention(q, bad_k, bad_v, keep=keep, query_keep=keep)
    )
    close(again * real, want * real)


@pytest.mark.parametrize("bound", [1.0, 10.0])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1, 1), (2, 3, 3, 7, 7, 3, 4), (1, 4, 2, 11, 11, 2, 3)])
def test_causal_is_the_formula(shape, bound):
    q, k, v = qkv(*shape)
    repeated = (z.repeat_interleave(shape[1] // shape[2], 1) for z in (k, v))
    want = naive_flow(q, *repeated, causal=True, clamp=bound)
    same_with_gradients(causal_flow_attention(q, k, v, bound=bound)[0], want, [q, k, v])


def test_across_many_chunks():
    q, k, v = (t.detach() for t in qkv(1, 1, 1, 150, 150, 2, 2))
    close(causal_flow_attention(q, k, v)[0], naive_flow(q, k, v, causal=True))


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_authors_numbers(case):
    """The released module: a across two sequences, b causal, c self-attention."""
    with np.load(VECTORS) as file:
        given = {name.removeprefix(f"{case}_"): torch.from_numpy(file[name]) for name in file if name[0] == case}
    (M, width), H = given["Wq"].T.shape, int(given["heads"])
    module = FlowAttention(M, H, head_dim=width // H, causal=case == "b", bias=True).double()
    state = {f"{n}_proj.{kind}": given[f"{w}{n}"] for n in "qkvo" for kind, w in (("weight", "W"), ("bias", "b"))}
    module.load_state_dict(state)
    sequences = [given[n].requires_grad_() for n in "xs" if n in given]
    y = module(*sequences)
    close(y, given["y"])
    for name, grad in zip("xs", torch.autograd.grad(y, sequences, given["w"]), strict=False):
        close(grad, given[f"g{name}"])


def test_flows_are_conserved():
    """What enters each sink and leaves each source is 1, the conserved outgoing flows sum to the number of sinks; and
    attention is made of just these flows."""
    q, k, v = qkv(2, 3, 3, 5, 7, 4, 4)
    sinks, sources, _ = _flows(q, k, v, None, None)
    flows = sinks @ sources.mT
    incoming = _through(sinks, sources.sum(2, keepdim=True), 0.0)
    outgoing = _through(sources, sinks.sum(2, keepdim=True), 0.0)
    close((flows / incoming).sum(-1), torch.ones(2, 3, 5).double())
    close((flows / outgoing.mT).sum(-2), torch.ones(2, 3, 7).double())
    refined_out = _through(sources, (sinks / incoming).sum(2, keepdim=True), 0.0)
    close(refined_out.sum(2), torch.full((2, 3, 1), 5.0).double())
    refined_in = _through(sinks, (sources / outgoing).sum(2, keepdim=True), 0.0)
    competing = 7 * refined_out.clamp(-1, 1).softmax(2) * v
    allotted = (refined_in * 5 / 7).sigmoid()
    close(flow_attention(q, k, v, eps=0.0), allotted * (sinks / incoming @ (sources.mT @ competing)))


def test_sources_compete():
    """Attention is no trivial mean: a source that agrees with the sinks gets more than the others."""
    q, k = torch.full((1, 1, 6, 4), 2.0).double(), torch.full((1, 1, 6, 4), -3.0).double()
    k[:, :, 2] = 3.0
    weights = flow_attention(q, k, torch.eye(6).double()[None, None])
    assert (weights.argmax(-1) == 2).all()
    assert (weights[..., 2] > 0.5 * weights.sum(-1)).all()


def test_state_does_not_grow():
    module = FlowAttention(8, 2, causal=True).double()
    sizes, state = set(), module.init_state(1, 1000)
    for length in (1, 10, 300):
        _, state = module.step(normal(1, length, 8), state)
        sizes.add(sum(z.numel() for z in state))
    B, H, D = 1, 2, 4
    assert sizes == {B * (H * (D * D + 4 * D + 1) + 1)}


def test_no_square_matrix():
    T, sizes = 512, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out

    q, k, v = (t.detach() for t in qkv(1, 1, 1, T, T, 4, 4))
    with Watch():
        flow_attention(q, k, v)
        causal_flow_attention(q, k, v)
    assert max(sizes) <= 64 * T  # inside chunks of 64


def test_hidden_sources_of_a_context_are_as_if_cut_away():
    """Every sink stays one, also where context and tokens are equally many."""
    module, x, context = FlowAttention(8, 2).double(), *torch.randn(2, 1, 4, 8, dtype=torch.float64)
    got = module(x, context, mask=masks.padding(lengths=torch.tensor([3])))
    torch.testing.assert_close(got, module(x, context[:, :3]))
    assert (got - module(x, context)).abs().max() > 1e-3


def test_refusals():
    with pytest.raises(ValueError, match=r"bound is out of range \(got 0\); expected a finite number > 0 and <= 50"):
        FlowAttention(8, 2, bound=0)
    with pytest.raises(ValueError, match=r"eps is out of range \(got -1.0\); expected a finite number > 0"):
        FlowAttention(8, 2, eps=-1.0)
    with pytest.raises(
        ValueError, match=r"k has the wrong shape \(got \(1, 1, 6, 2\)\); expected \(B = 1, G, T = 5, D = 2\)"
    ):
        causal_flow_attention(*qkv(1, 1, 1, 5, 6, 2, 2))
    module, x = FlowAttention(8, 2), torch.randn(1, 4, 8)
    with pytest.raises(ValueError, match=r"streaming .*expected a layer built with causal=True"):
        module.init_state(1, 4)
    causal = regard.create("flow", dim=8, num_heads=2, causal=True)
    with pytest.raises(TypeError, match=r"state has the wrong type \(got NoneType\); expected the FlowState"):
        causal.step(x, None)
    with pytest.raises(ValueError, match=r"state has another batch than x \(got 2\); expected 1 sequences"):
        causal.step(x, causal.init_state(2, 4))
