"""The key/value cache by itself: an append-only value over shared buffers."""

import copy
import pickle

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule

from regard import KVCache


def cache(capacity: int = 8, window: int | None = None, batch: int = 2) -> KVCache:
    n = capacity if window is None else 0
    return KVCache({"k": torch.zeros(batch, 1, n, 3), "v": torch.zeros(batch, 1, n, 2)}, window=window)


def new(t: int, batch: int = 2) -> dict[str, torch.Tensor]:
    return {"k": torch.randn(batch, 1, t, 3), "v": torch.randn(batch, 1, t, 2)}


def test_append_returns_all_that_is_held() -> None:
    a, b = new(3), new(2)
    first, state = cache().append(**a)
    second, state = state.append(**b)
    assert torch.equal(first["k"], a["k"])
    assert torch.equal(second["v"], torch.cat([a["v"], b["v"]], -2))
    assert (state.length, state.kept, state.capacity, state.batch_size) == (5, 5, 8, 2)
    assert state.nbytes == 5 * 2 * (3 + 2) * 4


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (new(9), "9 new tokens exceed capacity 8 .*capacity >= 9"),
        (new(1, batch=3), r"k of shape \(3, 1, 1, 3\) does not fit"),
        ({"k": torch.zeros(2, 1, 1, 3)}, r"holds \['k', 'v'\], got \['k'\]"),
        ({"k": torch.zeros(2, 1, 1, 4), "v": torch.zeros(2, 1, 1, 2)}, "k of shape .* must match"),
        (
            {"k": torch.zeros(2, 1, 1, 3).half(), "v": torch.zeros(2, 1, 1, 2)},
            "k is torch.float16.*must match",
        ),
        ({"k": torch.zeros(2, 1, 1, 3, device="meta"), "v": torch.zeros(2, 1, 1, 2)}, "meta.*must match"),
    ],
)
def test_what_does_not_fit_is_refused(bad: dict, message: str) -> None:
    state = cache()
    with pytest.raises(ValueError, match=message):
        state.append(**bad)
    assert state.length == 0
    state.append(**new(8))


@pytest.mark.parametrize("length", [-1, 6, True, 2.0, None])
def test_bad_crops(length: object) -> None:
    _, state = cache().append(**new(5))
    with pytest.raises((ValueError, TypeError), match=r"KVCache: length .*expected an int from 0 to 5|an int >= 0"):
        state.crop(length)


@pytest.mark.parametrize("index", [torch.tensor([2]), torch.tensor([-1]), torch.tensor([[0]]), torch.tensor([0.0])])
def test_bad_orders(index: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"KVCache: index (has the wrong shape|is out of range)"):
        cache().reorder(index)


def test_a_window_forgets_and_never_fills() -> None:
    state, seen = cache(window=3), []
    for t in (1, 2, 5, 1, 0, 1):
        tokens = new(t)
        seen.append(tokens["k"])
        before = state.kept
        held, state = state.append(**tokens)
        assert held["k"].shape[-2] == before + t
        assert torch.equal(state.buffers["k"], torch.cat(seen, -2)[..., -min(3, state.length) :, :])
    assert (state.length, state.kept, state.capacity) == (10, 3, None)
    assert state.buffers["k"].untyped_storage().nbytes() <= 1.5 * 2 * 3 * 3 * 4, "old tokens are kept alive"
    with pytest.raises(ValueError, match=r"can't crop by 1.*forgotten"):
        state.crop(9)


def test_a_graph_is_not_written_into() -> None:
    """With gradients on, earlier outputs can still be differentiated after later appends."""
    a, b = new(2), new(2)
    leaf = a["k"].requires_grad_()
    held, state = cache().append(k=leaf, v=a["v"])
    loss = held["k"].square().sum()
    state.append(**b)
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], 2 * leaf)


def test_copies() -> None:
    a, b = new(2), new(1)
    _, state = cache().append(**a)
    for twin in (copy.deepcopy(state), pickle.loads(pickle.dumps(state)), state.fork()):
        held, _ = twin.append(**b)
        assert torch.equal(held["k"], torch.cat([a["k"], b["k"]], -2))
    held, _ = state.append(**a)
    assert torch.equal(held["k"], torch.cat([a["k"], a["k"]], -2))


class Histories(RuleBasedStateMachine):
    """However caches are appended to, forked, cropped and reordered: each holds its own history."""

    caches = Bundle("caches")

    @initialize(target=caches)
    def start(self):
        return cache(), torch.zeros(2, 1, 0, 3)

    @rule(target=caches, at=caches, t=st.integers(0, 4), seed=st.integers(0, 99))
    def append(self, at, t, seed):
        state, history = at
        torch.manual_seed(seed)
        tokens = new(t)
        if state.length + t > 8:
            with pytest.raises(ValueError, match="capacity"):
                state.append(**tokens)
            return at
        held, state = state.append(**tokens)
        history = torch.cat([history, tokens["k"]], -2)
        assert torch.equal(held["k"], history)
        return state, history

    @rule(target=caches, at=caches)
    def fork(self, at):
        return at[0].fork(), at[1]

    @rule(target=caches, at=caches, n=st.integers(0, 8))
    def crop(self, at, n):
        n = min(n, at[0].length)
        return at[0].crop(n), at[1][..., :n, :]

    @rule(target=caches, at=caches)
    def swap(self, at):
        return at[0].reorder(torch.tensor([1, 0])), at[1][[1, 0]]

    @rule(at=caches)
    def holds_its_history(self, at):
        held, _ = at[0].append(**new(0))
        assert torch.equal(held["k"], at[1])


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=60, stateful_step_count=15, deadline=None, derandomize=True, database=None
)
