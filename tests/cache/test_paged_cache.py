"""The pool of pages and the cache in it: what is shared, copied, given back and refused."""

import copy
import pickle

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

import regard
from regard import masks
from regard.cache import PagedKVCache, PagePool
from regard.kernels.native import build

G, D, V = 2, 3, 4


def cache(
    pages: int = 32, page_size: int = 4, batch: int = 2, limit: int = 100, window: int | None = None
) -> PagedKVCache:
    pool = PagePool(pages, page_size=page_size)
    return PagedKVCache.empty(
        pool,
        batch,
        limit,
        window,
        {"k": torch.zeros(1, G, 0, D), "v": torch.zeros(1, G, 0, V), "x": torch.zeros(1, 0, 5)},
    )


def new(t: int, batch: int = 2) -> dict[str, torch.Tensor]:
    return {"k": torch.randn(batch, G, t, D), "v": torch.randn(batch, G, t, V), "x": torch.randn(batch, t, 5)}


def test_pages_are_taken_when_needed() -> None:
    state, seen = cache(), []
    for t, used in ((1, 2), (3, 2), (1, 4), (0, 4), (9, 8)):
        tokens = new(t)
        seen.append(tokens)
        held, state = state.append(**tokens)
        for name in "kvx":
            assert torch.equal(held[name], torch.cat([s[name] for s in seen], -2)), name
        assert state.pool.used_pages == used
    assert (state.length, state.kept, state.batch_size, state.capacity) == (14, 14, 2, 100)
    numbers = 4 * (G * (D + V) + 5)
    assert state.nbytes == state.pool.nbytes == 8 * numbers * 4


def test_forks_share_full_pages_and_copy_the_last() -> None:
    _, state = cache().append(**new(6))
    fork, pool = state.fork(), state.pool
    assert pool.used_pages == 4, "a fork takes nothing"
    more, other = new(1), new(1)
    a, state = state.append(**more)
    assert pool.used_pages == 4, "who goes on first writes behind what is there"
    b, fork = fork.append(**other)
    assert pool.used_pages == 6, "the other has copied the last page of each sequence"
    assert torch.equal(a["k"][..., :6, :], b["k"][..., :6, :])
    assert torch.equal(b["k"][..., 6:, :], other["k"])
    assert torch.equal(state.read("k"), a["k"])
    del state
    assert pool.used_pages == 4
    assert torch.equal(fork.read("v"), b["v"])
    del fork
    assert pool.used_pages == 0


def test_beams_share() -> None:
    _, state = cache(batch=1).append(**new(10, 1))
    beams = state.reorder(torch.zeros(8, dtype=torch.long))
    assert beams.pool.used_pages == 3
    held, beams = beams.append(**(tokens := new(1, 8)))
    assert beams.pool.used_pages == 2 + 8
    del state
    assert torch.equal(held["k"][:, :, :10], held["k"][:1, :, :10].expand(8, -1, -1, -1))
    assert torch.equal(held["k"][:, :, 10:], tokens["k"])
    for index in ([3, 3, 0], [2, 1, 0], [0]):
        picked = beams.reorder(torch.tensor(index))
        assert torch.equal(picked.append(**new(0, len(index)))[0]["v"], held["v"][index])


def test_pages_behind_a_window_are_free() -> None:
    state, seen = cache(window=5, batch=1), []
    for t in (1, 3, 7, 1, 1, 0, 40, 1, 1, 1, 1, 1):
        tokens, before = new(t, 1), state.kept
        seen.append(tokens["k"])
        held, state = state.append(**tokens)
        assert torch.equal(held["k"], torch.cat(seen, -2)[..., -(before + t) :, :][..., -held["k"].shape[-2] :, :])
        assert held["k"].shape[-2] == before + t
        assert state.pool.used_pages <= 3
        assert torch.equal(state.read("k"), torch.cat(seen, -2)[..., -5:, :])
    assert (state.length, state.kept, state.capacity) == (58, 5, None)
    with pytest.raises(ValueError, match=r"PagedKVCache: can't crop by 1.*forgotten"):
        state.crop(57)


def test_a_full_pool_says_so_first() -> None:
    _, state = cache(pages=5).append(**new(7))
    pool, before = state.pool, state.read("k")
    with pytest.raises(
        ValueError,
        match=r"PagePool: num_pages is too small: 2 more pages of 4 tokens needed and 1 free; nothing was written "
        r"\(got 5\); expected at least 6, or states let go of",
    ):
        state.append(**new(2))
    assert (pool.used_pages, state.length) == (4, 7)
    assert torch.equal(state.read("k"), before)
    held, state = state.append(**new(1))
    assert torch.equal(held["k"][..., :7, :], before)
    half = state.reorder(torch.tensor([0]))
    del state
    assert pool.used_pages == 2
    half.append(**new(9, 1))
    del half
    assert pool.used_pages == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (new(1, batch=3), r"k of shape \(3, 2, 1, 3\) does not fit"),
        ({"k": torch.zeros(2, G, 1, D)}, r"PagedKVCache: holds \['k', 'v', 'x'\], got \['k'\]"),
        ({n: z.half() for n, z in new(1).items()}, "k is torch.float16.*must match"),
        (new(101), "101 new tokens exceed capacity 100 .*capacity >= 101"),
        ({n: z.requires_grad_() for n, z in new(1).items()}, "want a gradient, and pages are written in place"),
    ],
)
def test_what_does_not_fit_is_refused(bad: dict, message: str) -> None:
    state = cache()
    with pytest.raises(ValueError, match=message):
        state.append(**bad)
    assert state.pool.used_pages == 0
    with torch.no_grad():
        state.append(**new(1))


@pytest.mark.parametrize("size", [0, -1, 1.5, True, None])
def test_bad_sizes(size: object) -> None:
    with pytest.raises((ValueError, TypeError), match=r"PagePool: page_size .*expected an int >= 1"):
        PagePool(4, page_size=size)
    with pytest.raises((ValueError, TypeError), match=r"PagePool: num_pages .*expected an int >= 1"):
        PagePool(size)


@pytest.mark.parametrize("index", [torch.tensor([2]), torch.tensor([-1]), torch.tensor([[0]]), torch.tensor([0.0])])
def test_bad_orders(index: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"PagedKVCache: index (has the wrong shape|is out of range)"):
        cache().reorder(index)


def test_pages_that_are_nobodys() -> None:
    pool = PagePool(4)
    pages = pool.take(3)
    pool.share(pages[:1])
    pool.free(pages)
    assert (pool.free_pages, pool.used_pages) == (3, 1), "one has an owner still"
    for use in (pool.free, pool.share):
        with pytest.raises(ValueError, match=r"PagePool: pages are free, and nobody's \(got \[1\]\)"):
            use([0, 1])
        with pytest.raises(ValueError, match=r"PagePool: pages are out of range \(got \[4\]\); expected .* 0 to 3"):
            use([4])
    pool.free([0])
    assert sorted(pool.take(4)) == [0, 1, 2, 3]


def test_pools_are_not_mixed() -> None:
    (_, a), (_, b) = cache().append(**new(2)), cache().append(**new(2))
    with pytest.raises(ValueError, match="PagedKVCache: others have their pages in another pool"):
        a.join(b)
    layer, wide = regard.Attention(12, 2, causal=True), regard.Attention(24, 2, causal=True)
    pool = PagePool(8)
    layer.init_state(1, 8, pool=pool)
    with pytest.raises(ValueError, match=r"PagePool: pool holds tokens of another kind .*or a pool of its own"):
        wide.init_state(1, 8, pool=pool)
    with pytest.raises(TypeError, match=r"init_state: pool has the wrong type \(got int\); expected a PagePool"):
        layer.init_state(1, 8, pool=8)


def test_joined_sequences() -> None:
    state = cache(batch=1, pages=64)
    (long, a), (short, b) = state.append(**new(9, 1)), state.append(**new(4, 1))
    both = a.join(b)
    assert (both.length, both.lengths) == (9, (9, 4))
    held, both = both.append(**(tokens := new(2)))
    assert torch.equal(held["k"][0], torch.cat([long["k"][0], tokens["k"][0]], -2))
    assert torch.equal(held["k"][1, :, 5:], torch.cat([short["k"][0], tokens["k"][1]], -2))
    assert not held["k"][1, :, :5].any()
    only = both.reorder(torch.tensor([1]))
    assert (only.length, only.ragged) == (6, False)
    cropped = both.crop(8)
    assert cropped.lengths == (8, 3)
    assert torch.equal(cropped.read("k")[1, :, 5:], short["k"][0, :, :3])
    with pytest.raises(ValueError, match=r"PagedKVCache: length is too small .*expected an int from 5 to 11"):
        both.crop(4)
    with pytest.raises(ValueError, match="others hold no tokens"):
        a.join(state)


def test_copies() -> None:
    a, b = new(2), new(1)
    _, state = cache().append(**a)
    for twin in (copy.deepcopy(state), copy.copy(state), state.fork()):
        held, _ = twin.append(**b)
        assert torch.equal(held["k"], torch.cat([a["k"], b["k"]], -2))
        assert twin.pool is state.pool
    with pytest.raises(TypeError, match="PagePool: can't be pickled"):
        pickle.dumps(state)


def test_inference_mode_and_back() -> None:
    with torch.inference_mode():
        _, state = cache().append(**(a := new(3)))
    with torch.no_grad():
        held, state = state.append(**new(1))
    assert torch.equal(held["k"][..., :3, :], a["k"])
    with torch.inference_mode():
        held, _ = state.append(**new(2))
    assert torch.equal(held["k"][..., :3, :], a["k"])


@torch.no_grad()
def test_a_layer_reads_pages_where_they_lie() -> None:
    torch.manual_seed(0)
    layer = regard.Attention(32, 4, causal=True)
    x, pool = torch.randn(2, 40, 32), PagePool(64, page_size=4)
    _, state = layer.step(x[:, :39], layer.init_state(2, 40, pool=pool))
    plan = layer.plan(x[:, 39:], state=state)
    assert plan.kernel == "paged" or build.why_not()
    assert state.length == 39
    assert "keys gathered from pages" in plan.why_not["decode"][0] or build.why_not()
    y, _ = layer.step(x[:, 39:], state)
    torch.testing.assert_close(y, layer(x)[:, 39:])
    assert layer.plan(x[:, 38:], state=layer.init_state(2, 40, pool=pool)).kernel != "paged", "two queries"
    _, plain = layer.step(x[:, :39], layer.init_state(2, 40))
    assert layer.plan(x[:, 39:], state=plain).why_not["paged"] == ["keys and values don't lie in pages of a pool"]
    with pytest.raises(ValueError, match="are not what step takes"):
        layer.plan(x[:, 39:], x, state=plain)


@torch.no_grad()
def test_layers_share_a_pool() -> None:
    layers = [regard.Attention(32, 4, causal=True, mask=m) for m in (None, masks.window(3))]
    pool = PagePool(16, page_size=4)
    states = [layer.init_state(1, 40, pool=pool) for layer in layers]
    for n, layer in enumerate(layers):
        _, states[n] = layer.step(torch.randn(1, 30, 32), states[n])
    assert pool.used_pages == 8 + 2


@torch.no_grad()
def test_unequal_lengths_need_what_knows_of_padding() -> None:
    moba = regard.create("moba", dim=24, num_heads=4, causal=True, block=3)
    x, start = torch.randn(2, 5, 24), moba.init_state(1, 20, pool=PagePool(32))
    both = moba.step(x[:1], start)[1].join(moba.step(x[1:, :2], start)[1])
    with pytest.raises(ValueError, match="selector counts places in the batch, not in each sequence"):
        moba.step(torch.randn(2, 1, 24), both)
    layer = regard.Attention(24, 4, causal=True)
    start = layer.init_state(1, 20, pool=PagePool(32))
    both = layer.step(x[:1], start)[1].join(layer.step(x[1:, :2], start)[1])
    with pytest.raises(ValueError, match="step: x has another batch than the state"):
        layer.step(torch.randn(3, 1, 24), both)


def test_a_layer_in_training_is_refused() -> None:
    layer = regard.Attention(24, 4, causal=True)
    with pytest.raises(ValueError, match="new tokens want a gradient"):
        layer.step(torch.randn(1, 2, 24), layer.init_state(1, 20, pool=PagePool(4)))


class Histories(RuleBasedStateMachine):
    """However states are appended to, forked, cropped, reordered, joined and dropped: each holds its own history, and
    no page is in use that no state holds."""

    states = Bundle("states")

    def __init__(self):
        super().__init__()
        self.alive = []

    def kept(self, state, histories):
        self.alive.append(state)
        return len(self.alive) - 1, histories

    @initialize(target=states, window=st.sampled_from([None, 3]))
    def start(self, window):
        self.window, start = window, cache(pages=24, page_size=3, window=window)
        self.pool = start.pool
        return self.kept(start, [torch.zeros(G, 0, D)] * 2)

    def longer(self, at, t, seed):
        n, histories = at
        state = self.alive[n]
        torch.manual_seed(seed)
        tokens = new(t, state.batch_size)
        if state.needed(t) > self.pool.free_pages:
            with pytest.raises(ValueError, match="num_pages is too small"):
                state.append(**tokens)
            return None
        held, after = state.append(**tokens)
        histories = [torch.cat([h, k], 1) for h, k in zip(histories, tokens["k"], strict=True)]
        for k, h in zip(held["k"], histories, strict=True):
            k, h = k[:, -min(k.shape[1], h.shape[1]) :], h[:, -min(k.shape[1], h.shape[1]) :]
            assert torch.equal(k, h)
        return after, histories

    @rule(target=states, at=states, t=st.integers(0, 7), seed=st.integers(0, 99))
    def append(self, at, t, seed):
        found = self.longer(at, t, seed)
        return multiple() if found is None else self.kept(*found)

    @rule(target=states, at=states)
    def fork(self, at):
        return self.kept(self.alive[at[0]].fork(), at[1])

    @rule(target=states, at=states, n=st.integers(0, 9))
    def crop(self, at, n):
        state = self.alive[at[0]]
        n = min(n, state.length)
        if (self.window is not None and state.length > self.window) or n < max(state.pads):
            return multiple()
        return self.kept(state.crop(n), [h[:, : h.shape[1] - (state.length - n)] for h in at[1]])

    @rule(target=states, at=states, index=st.lists(st.integers(0, 1), min_size=1, max_size=3))
    def reorder(self, at, index):
        state = self.alive[at[0]]
        index = [b % state.batch_size for b in index]
        return self.kept(state.reorder(torch.tensor(index)), [at[1][b] for b in index])

    @rule(target=states, a=states, b=states)
    def join(self, a, b):
        pair = self.alive[a[0]], self.alive[b[0]]
        if min(len(h[0]) for h in (*a[1], *b[1])) == 0 or sum(s.batch_size for s in pair) > 4:
            return multiple()
        return self.kept(pair[0].join(pair[1]), [*a[1], *b[1]])

    @rule(target=states, at=consumes(states))
    def drop(self, at):
        if sum(s is not None for s in self.alive) == 1:
            return at
        self.alive[at[0]] = None
        return multiple()

    @rule(at=states)
    def holds_its_history(self, at):
        state = self.alive[at[0]]
        for k, h in zip(state.read("k"), at[1], strict=True):
            count = min(state.kept, h.shape[1])
            assert torch.equal(k[:, k.shape[1] - count :], h[:, h.shape[1] - count :])

    @invariant()
    def no_page_is_lost(self):
        if hasattr(self, "pool"):
            rows = {id(r): r for s in self.alive if s is not None for r in s.rows}.values()
            held = torch.cat([torch.zeros(0, dtype=torch.int32), *(r.pages for r in rows)])
            assert self.pool.used_pages == len(held.unique())
            assert torch.equal(self.pool._owners, torch.bincount(held, minlength=24).int())


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=80, stateful_step_count=20, deadline=None, derandomize=True, database=None
)


@pytest.mark.parametrize("name", ["mla", "el_attention", "chunk_attention"])
def test_no_plan_of_a_step_of_ones_own(name: str) -> None:
    layer = regard.create(name, dim=32, num_heads=4, causal=True)
    with pytest.raises(ValueError, match="this layer steps in its own way"):
        layer.plan(torch.zeros(1, 1, 32), state=layer.init_state(1, 8))
