"""The prefix tree: exact attention for every sequence, shared chunks once, none lost; and the layer around it."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from torch import Tensor

import regard
from cache.naive_chunk_attention import naive_chunk_attention, naive_stored_tokens
from regard.cache import PrefixTree
from regard.cache.chunk_attention import ChunkAttention
from regard.laws.agreement import close
from regard.laws.subject import tokens

VECTORS = Path(__file__).parents[1] / "vectors" / "A165.npz"
HEADS, WIDTH, VALUES = 2, 3, 4


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def named(names: list[int]) -> tuple[Tensor, Tensor]:
    """Keys and values that depend on the past and the token, as a model's do: (G, S, D), (G, S, V)."""
    k, v, past = [], [], 0
    for name in names:
        past = hash((past, name)) % 2**31
        k.append(normal(past, HEADS, 1, WIDTH))
        v.append(normal(past + 1, HEADS, 1, VALUES))
    empty = torch.zeros(HEADS, 0, WIDTH).double(), torch.zeros(HEADS, 0, VALUES).double()
    return (torch.cat(k, 1), torch.cat(v, 1)) if names else empty


def tree(chunk: int = 3) -> PrefixTree:
    return PrefixTree(HEADS, WIDTH, value_dim=VALUES, chunk=chunk, dtype=torch.float64)


def check(t: PrefixTree, histories: dict[int, list[int]], seed: int = 0) -> None:
    """Every sequence attends to exactly its own history."""
    ids = list(histories)
    q = normal(seed, len(ids), 4, WIDTH)
    whole = [named(histories[i]) for i in ids]
    keys, values = ([one[n].transpose(0, 1).repeat_interleave(2, 1) for one in whole] for n in (0, 1))
    close(t.attend(q, ids), naive_chunk_attention(q, keys, values).view(len(ids), 4, VALUES))
    for i, (k, v) in zip(ids, whole, strict=True):
        assert t.length(i) == len(histories[i])
        assert all(torch.equal(a, b) for a, b in zip(t.keys(i), (k, v), strict=True))


PROMPTS = [
    [1, 2, 3, 4, 5, 6, 7],
    [1, 2],
    [1, 2, 3, 4, 5, 6, 8, 9],
    [1, 2, 3, 9, 9, 9],
    [],
    [4, 4, 4],
    [1, 2, 3, 4, 5, 6],
]


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 64])
def test_every_sequence_sees_its_own_tokens(chunk: int) -> None:
    t = tree(chunk)
    histories = {t.add(*named(p), tokens=p): list(p) for p in PROMPTS}
    check(t, histories)
    check(t, dict(reversed(histories.items())), 1)
    check(t, dict(list(histories.items())[2:5]), 2)
    for step in range(2 * chunk if chunk < 9 else 4):
        more = [step % 2, *range(10, 16)]
        for history, name in zip(histories.values(), more, strict=True):
            history.append(name)
        new = [[z[:, -1:] for z in named(h)] for h in histories.values()]
        t.append(list(histories), *(torch.stack(z) for z in zip(*new, strict=True)), tokens=[[n] for n in more])
        check(t, histories, step)


def test_prefixes_are_stored_once() -> None:
    """By whole chunks; at least as few as in the released code, which does not share a full last chunk."""
    t = tree(3)
    for p in PROMPTS:
        t.add(*named(p), tokens=p)
    # 123 456 7.. | 12. | 123 456 89. | 123 999 | - | 444 | 123 456
    assert t.chunks_in_use == 7
    assert t.chunks_in_use * 3 < sum(map(len, PROMPTS)) == 32
    assert naive_stored_tokens(PROMPTS, 3) >= 3 + 3 + 1 + 2 + 2 + 3 + 3
    assert t.nbytes == 7 * 3 * HEADS * (WIDTH + VALUES) * 8
    assert t.held([1, 2, 3, 4, 5, 6, 100]) == 6
    assert t.held([1, 2, 3]) == 3
    assert t.held([2, 2, 3]) == 0
    nameless = tree(3)
    for p in PROMPTS:
        nameless.add(*named(p))
    assert nameless.chunks_in_use == 3 + 1 + 3 + 2 + 0 + 1 + 2


def test_keys_of_what_is_held_need_not_be_given() -> None:
    t = tree(3)
    p = [1, 2, 3, 4, 5, 6, 7]
    first = t.add(*named(p), tokens=p)
    other = [1, 2, 3, 4, 5, 6, 9, 9]
    second = t.add(*(z[:, t.held(other) :] for z in named(other)), tokens=other)
    check(t, {first: p, second: other})
    with pytest.raises(ValueError, match=r"got keys of 1 of 8 tokens\); expected .*, as 6 are"):
        t.add(*(z[:, -1:] for z in named(other)), tokens=other)
    assert t.chunks_in_use == 4


def test_gives_the_authors_numbers() -> None:
    """Their C++ code in fp32: five prompts, two tokens each, one sequence gone."""
    with np.load(VECTORS) as file:
        z = {k: torch.from_numpy(file[k]) for k in file}
    t = PrefixTree(2, 5, chunk=int(z["chunk_size"]))
    ids = [
        t.add(*(z[f"prompt{p}_{n}"].transpose(0, 1) for n in "kv"), tokens=z[f"prompt{p}_tokens"].tolist())
        for p in range(5)
    ]
    rows = [ids[p] for p in z["row_order"].tolist()]

    def near(got: Tensor, want: Tensor) -> None:
        assert (got - want).abs().max() < 1e-6

    near(t.attend(z["s0_q"], rows), z["s0_out"])
    for step in ("s1", "s2"):
        names = [[n] for n in z[f"{step}_new_tokens"].tolist()]
        t.append(rows, z[f"{step}_new_k"][:, :, None], z[f"{step}_new_v"][:, :, None], tokens=names)
        near(t.attend(z[f"{step}_q"], rows), z[f"{step}_out"])
    t.free(rows.pop(1))
    near(t.attend(z["rm_q"], rows), z["rm_out"])


def test_chunks_go_back_to_the_pool() -> None:
    t = tree(2)
    p = list(range(9))
    first = t.add(*named(p), tokens=p)
    second = t.fork(first)
    third = t.add(*named(p[:5]), tokens=p[:5])
    assert t.chunks_in_use == 6  # 01 23 45 67 8. and 4. of its own
    t.free(first)
    assert t.chunks_in_use == 6
    t.free(second)
    assert t.chunks_in_use == 3
    assert t.held(p) == 4
    t.free(third)
    assert (t.chunks_in_use, t.nbytes, t.held(p)) == (0, 0, 0)
    room = t.k.shape
    again = t.add(*named(p), tokens=p)
    assert t.k.shape == room, "the pool grew although it was empty"
    check(t, {again: p})


def test_forks_part_without_disturbing_each_other() -> None:
    """Both go on from a half-filled chunk: the first in place, the second in a copy."""
    t = tree(4)
    one = t.add(*named([1, 2]), tokens=[1, 2])
    two, three = t.fork(one), t.fork(one)
    assert t.chunks_in_use == 1
    histories = {one: [1, 2], two: [1, 2], three: [1, 2]}
    for i, name in ((two, 7), (one, 8), (two, 9)):
        histories[i].append(name)
        t.append([i], *(z[None, :, -1:] for z in named(histories[i])), tokens=[[name]])
    assert t.chunks_in_use == 2
    check(t, histories)


def test_lengths_of_a_shared_chunk_differ() -> None:
    """Two rows share a full chunk that is the last, and only half known, for a third."""
    t = tree(4)
    short = t.add(*named([1, 2]), tokens=[1, 2])
    long = t.fork(short)
    t.append([long], *(z[None, :, 2:] for z in named([1, 2, 3, 4, 5])), tokens=[[3, 4, 5]])
    longer = t.fork(long)
    check(t, {short: [1, 2], long: [1, 2, 3, 4, 5], longer: [1, 2, 3, 4, 5]})


class Histories(RuleBasedStateMachine):
    """However sequences are added, grown, forked and freed: each attends to its own history, and no chunk is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.tree, self.histories = tree(2), {}

    @rule(names=st.lists(st.integers(0, 1), max_size=6))
    def add(self, names):
        self.histories[self.tree.add(*named(names), tokens=names)] = list(names)

    @precondition(lambda self: self.histories)
    @rule(data=st.data(), names=st.lists(st.integers(0, 1), min_size=1, max_size=5), known=st.booleans())
    def append(self, data, names, known):
        i = data.draw(st.sampled_from(sorted(self.histories)))
        history = self.histories[i]
        history += names
        new = (z[None, :, -len(names) :] for z in named(history))
        self.tree.append([i], *new, tokens=[names] if known else None)

    @precondition(lambda self: self.histories)
    @rule(data=st.data())
    def fork(self, data):
        i = data.draw(st.sampled_from(sorted(self.histories)))
        self.histories[self.tree.fork(i)] = list(self.histories[i])

    @precondition(lambda self: self.histories)
    @rule(data=st.data())
    def free(self, data):
        i = data.draw(st.sampled_from(sorted(self.histories)))
        self.tree.free(i)
        del self.histories[i]

    @precondition(lambda self: self.histories)
    @rule()
    def is_exact(self):
        check(self.tree, self.histories)

    def teardown(self):
        for i in self.histories:
            self.tree.free(i)
        assert self.tree.chunks_in_use == 0
        assert not self.tree._known


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=40, stateful_step_count=15, deadline=None, derandomize=True, database=None
)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t: t.attend(normal(0, 1, 2, WIDTH), [9]), r"sequence is unknown \(got 9\)"),
        (lambda t: t.free(1), r"sequence is unknown \(got 1\)"),
        (lambda t: t.attend(normal(0, 1, 3, WIDTH), [0]), r"heads_of_q is no multiple of num_kv_heads = 2 \(got 3\)"),
        (lambda t: t.attend(normal(0, 1, 2, WIDTH + 1), [0]), r"q has the wrong shape \(got \(1, 2, 4\)\)"),
        (
            lambda t: t.append([0, 0], *(z.expand(2, -1, -1, -1) for z in named([1]))),
            r"sequences names one twice \(got \[0, 0\]\); expected each once a call",
        ),
        (
            lambda t: t.append([0], *(z[None, :, :, :2] for z in named([1]))),
            r"k does not fit .*\(got .* \(1, 2, 1, 2\).*\); expected .* \(1, 2, 1, 3\)",
        ),
        (lambda t: t.append([0], *(z[None].float() for z in named([1]))), "float32"),
        (
            lambda t: t.append([0], *(z[None] for z in named([1])), tokens=[[1, 2]]),
            r"tokens don't fit \(got \[2\] names\); expected 1 for each of 1 sequences",
        ),
        (lambda t: PrefixTree(2, 0), r"head_dim is too small \(got 0\); expected an int >= 1"),
    ],
)
def test_refuses(call, words: str) -> None:
    t = tree()
    first = t.add(*named([1, 2]), tokens=[1, 2])
    with pytest.raises(ValueError, match=words):
        call(t)
    check(t, {first: [1, 2]})


# The layer


def layer(**options) -> ChunkAttention:
    torch.manual_seed(0)
    return ChunkAttention(24, 6, causal=True, chunk=4, **options).double()


@torch.no_grad()
def test_rows_with_one_prompt_store_it_once() -> None:
    """In fewer bytes than the keys and values of plain attention, with the same outputs."""
    module = layer()
    x = torch.cat([tokens(1, 10).expand(3, -1, -1), tokens(3, 6, seed=5)], 1)
    y, state = module.step(x[:, :10], module.init_state(3, 16))
    outs = [y]
    for n in range(6):
        y, state = module.step(x[:, 10 + n : 11 + n], state)
        outs.append(y)
    plain = regard.Attention(24, 6, causal=True, dtype=torch.float64)
    plain.load_state_dict(module.state_dict())
    close(torch.cat(outs, 1), plain(x))
    _, cache = plain.step(x, plain.init_state(3, 16))
    assert state.nbytes < 0.7 * cache.nbytes
    assert state.tree.chunks_in_use == 2 + 3 * 2
    _, state = module.step(x[:, :10], module.init_state(3, 16))
    assert state.tree.chunks_in_use == 2 + 3


@torch.no_grad()
def test_what_no_state_holds_is_freed() -> None:
    module, x = layer(), tokens(2, 9)
    _, state = module.step(x, module.init_state(2, 40))
    in_use, held = state.tree.chunks_in_use, state.tree
    for n in range(9):
        _, state = module.step(x[:, n : n + 1], state)
    assert held.chunks_in_use == in_use + 2 * 2
    twin = copy.deepcopy(state)
    del state
    assert held.chunks_in_use == 0
    close(module.step(x[:, :1], twin)[0], module(torch.cat([x, x, x[:, :1]], 1))[:, -1:])


def test_no_row_loses_its_gradient_to_another() -> None:
    """Equal rows have gradients of their own, so nothing is shared while they are wanted."""
    module = layer()
    x = tokens(1, 9).repeat(2, 1, 1).requires_grad_()
    y, state = module.step(x[:, :8], module.init_state(2, 9))
    last, state = module.step(x[:, 8:], state)
    g = tokens(2, 9, seed=8)
    got = torch.autograd.grad((torch.cat([y, last], 1) * g).sum(), x)[0]
    close(got, torch.autograd.grad((module(x) * g).sum(), x)[0])


def test_layer_refuses() -> None:
    module, x = layer(), tokens(2, 3)
    state = module.init_state(2, 4)
    with pytest.raises(ValueError, match=r"2 new tokens exceeds capacity 4 \(got 3 held before\); .* capacity >= 5"):
        module.step(x[:, :2], module.step(x, state)[1])
    with pytest.raises(ValueError, match=r"x has another batch than the state \(got 2\); expected 3 sequences"):
        module.step(x, module.init_state(3, 4))
    with pytest.raises(TypeError, match=r"state has the wrong type \(got KVCache\); expected what init_state gives"):
        module.step(x, regard.Attention(24, 6, causal=True).init_state(2, 4))
    with pytest.raises(ValueError, match=r"chunk is too small \(got 0\); expected an int >= 1"):
        ChunkAttention(24, 6, chunk=0)
