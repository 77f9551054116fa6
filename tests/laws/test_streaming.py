"""L18, L19, L21: token by token and chunk by chunk are the full pass, and a state is a value."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import regard
from laws.subject import HEADS, B, T, build, close, law, same, tokens
from regard import masks


def stream(module: regard.Attention, x: Tensor, sizes: list[int], **options: masks.Mask) -> Tensor:
    """The outputs of all chunks."""
    state, outs, done = module.init_state(x.shape[0], x.shape[1]), [], 0
    for size in sizes:
        y, state = module.step(x[:, done : done + size], state, **options)
        done += size
        outs.append(y)
        assert y.shape[1] == size
        if isinstance(state, regard.KVCache):
            assert state.length == done
            assert all(b.dtype == x.dtype and b.device == x.device for b in state.buffers.values())
    assert done == x.shape[1]
    return torch.cat(outs, 1)


@law("L18", needs="streaming")
@torch.no_grad()
def test_token_by_token(name: str) -> None:
    module, x = build(name, causal=True), tokens()
    want = module(x)
    close(stream(module, x, [1] * T), want, "one by one")
    close(stream(module, x, [1, 3, 0, 2, 5, 1]), want, "odd chunks")
    close(stream(module, x, [T]), want, "all at once")


@law("L19", needs="streaming")
@settings(max_examples=8, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, T), max_size=6))
@torch.no_grad()
def test_any_partition(name: str, cuts: list[int]) -> None:
    module, x = build(name, causal=True), tokens()
    ends = [0, *sorted(cuts), T]
    close(stream(module, x, [b - a for a, b in itertools.pairwise(ends)]), module(x))


@law("L18", needs="streaming gqa")
@torch.no_grad()
def test_grouped_keys_stream(name: str) -> None:
    module = build(name, causal=True, **({} if "gqa" in name or "mqa" in name else {"num_kv_heads": 2}))
    close(stream(module, tokens(), [4, 1, 7]), module(tokens()))


@law("L18", needs="streaming padding", pipeline=True)
@torch.no_grad()
def test_padded_stream(name: str) -> None:
    """Keys hidden in the full pass are hidden in the stream."""
    module, x = build(name, causal=True), tokens()
    mask = masks.padding(torch.tensor([[True] * T, [False] * 3 + [True] * (T - 3)]))
    close(stream(module, x, [2, 1, 6, 3], mask=mask), module(x, mask=mask))


@law("L18", needs="streaming")
def test_gradients_through_the_stream(name: str) -> None:
    """A loss over all steps has the full pass's gradients."""
    module, x = build(name, causal=True), tokens().requires_grad_()
    parameters = list(module.parameters())
    direction = tokens(seed=8)
    want = torch.autograd.grad((module(x) * direction).sum(), [x, *parameters], allow_unused=True)
    got = torch.autograd.grad((stream(module, x, [5, 1, 6]) * direction).sum(), [x, *parameters], allow_unused=True)
    for g, w in zip(got, want, strict=True):
        assert (g is None) == (w is None)
        if w is not None:
            close(g, w)


@law("L21", needs="streaming")
@torch.no_grad()
def test_a_state_is_a_value(name: str) -> None:
    """Stepping from a state leaves it as it was: it can be stepped from again, or copied."""
    module, x, other = build(name, causal=True), tokens(), tokens(seed=11)
    _, early = module.step(x[:, :5], module.init_state(B, T))
    copied = copy.deepcopy(early)
    first, late = module.step(x[:, 5:8], early)
    module.step(other[:, 5:8], early)
    module.step(other[:, 5:6], early)
    again, _ = module.step(x[:, 5:8], early)
    same(again, first, "the same step twice")
    same(module.step(x[:, 5:8], copied)[0], first, "from a copy")
    module.step(other[:, 5:8], early)
    close(module.step(x[:, 8:], late)[0], module(x)[:, 8:], "after others have written")


@law("L21", needs="streaming", pipeline=True)
@torch.no_grad()
def test_cache_algebra(name: str) -> None:
    """fork, reorder, crop: each equals the full pass over the tokens it stands for."""
    module, x, other = build(name, causal=True), tokens(), tokens(seed=11)
    _, state = module.step(x[:, :6], module.init_state(B, T))
    branch = state.fork()
    y, _ = module.step(other[:, 6:9], branch)
    close(y, module(torch.cat([x[:, :6], other[:, 6:9]], 1))[:, 6:], "fork")
    close(module.step(x[:, 6:9], state)[0], module(x[:, :9])[:, 6:], "beside the fork")
    swapped = state.reorder(torch.tensor([1, 0, 1]))
    y, _ = module.step(x[[1, 0, 1], 6:9], swapped)
    close(y, module(x[[1, 0, 1], :9])[:, 6:], "reorder")
    if state.window is None:
        cropped = state.crop(4)
        y, _ = module.step(other[:, 4:7], cropped)
        close(y, module(torch.cat([x[:, :4], other[:, 4:7]], 1))[:, 4:], "crop")
        y, _ = module.step(x[:, 6:9], state)
        close(y, module(x[:, :9])[:, 6:], "after a crop was written to")


@law("L21", needs="streaming", pipeline=True)
@torch.no_grad()
def test_cache_limits(name: str) -> None:
    """A full cache refuses; a layer that looks back W tokens keeps no more, before W, at W and far beyond."""
    module, x = build(name, causal=True), tokens(B, 40)
    _, state = module.step(x[:, :T], module.init_state(B, T))
    if state.window is None:
        with pytest.raises(ValueError, match=rf"1 new token exceeds capacity {T}.*capacity >= {T + 1}"):
            module.step(x[:, T : T + 1], state)
        return
    halo = module._halo()
    assert state.window == max(1, module.receptive_field().reach - 1 + halo)
    want, state = module(x), module.init_state(B, 1)
    for n in range(x.shape[1]):
        y, state = module.step(x[:, n : n + 1], state)
        close(y, want[:, n : n + 1], f"token {n}")
        assert state.kept == min(n + 1, state.window)
        assert all(b.shape[-2] == state.kept for b in state.buffers.values())


@law("L21", needs="streaming", pipeline=True)
@torch.no_grad()
def test_cache_refusals(name: str) -> None:
    module, x = build(name, causal=True), tokens()
    state = module.init_state(B, T)
    with pytest.raises(ValueError, match="must match"):
        module.step(tokens(3, 1), state)
    with pytest.raises(ValueError, match=r"float32.*float64|float64.*float32"):
        module.step(x[:, :1], module.init_state(B, T, dtype=torch.float32))
    with pytest.raises(TypeError, match=r"state has the wrong type .*expected the KVCache"):
        module.step(x[:, :1], None)
    with pytest.raises(ValueError, match=r"capacity is too small .*expected an int >= 1"):
        module.init_state(B, 0)
    if "bidirectional" in module.supports:
        with pytest.raises(ValueError, match="causal=True"):
            build(name, causal=False).init_state(B, T)
    assert HEADS % module.num_kv_heads == 0
