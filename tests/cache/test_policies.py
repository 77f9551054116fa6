"""Policies that score keys: against kvpress's numbers, against plain loops, and what each keeps.

The loops of naive_evict.py are by an author who saw only the papers' account, neither code nor test.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import regard
from cache import naive_evict as naive
from regard.cache.adakv import AdaKV
from regard.cache.evict import Evicting, keep_best
from regard.cache.expected_attention import ExpectedAttention
from regard.cache.h2o import H2O
from regard.cache.key_norm import KeyNorm
from regard.cache.keydiff import KeyDiff
from regard.cache.pyramidkv import PyramidKV
from regard.cache.snapkv import SnapKV
from regard.cache.streaming_llm import StreamingLLM
from regard.cache.tova import TOVA
from regard.laws.protocols import attend
from regard.positions.rotary import Rotary

GOLD = {name: torch.from_numpy(z) for name, z in np.load(Path(__file__).parents[1] / "vectors/S-evict.npz").items()}
POLICIES = {
    "snapkv": lambda budget: SnapKV(budget=budget, window=4, kernel=3, every=1),
    "h2o": lambda budget: H2O(budget=budget, by="mean", recent=0.0, every=1),
    "tova": lambda budget: TOVA(budget=budget, every=1),
    "knorm": lambda budget: KeyNorm(budget=budget, every=1),
    "keydiff": lambda budget: KeyDiff(budget=budget, every=1),
    "streaming": lambda budget: StreamingLLM(budget=budget, sinks=2, every=1),
    "expected": lambda budget: ExpectedAttention(budget=budget, sinks=2, future=5, every=1),
}


def drawn(*, B=2, H=4, G=2, S=13, D=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, n, S, D, generator=generator, dtype=torch.float64) for n in (H, G, G))


def turned(z, at):
    """Rotation by the frequencies of the golden numbers' host."""
    angle = at[..., None] * torch.atan2(GOLD["sin"], GOLD["cos"])[0, 1]
    cos, sin = (f(angle)[:, None] if angle.dim() == 3 else f(angle) for f in (torch.cos, torch.sin))
    half = z.shape[-1] // 2
    return z * cos + torch.cat([-z[..., half:], z[..., :half]], -1) * sin


def judged(policy, q, k, v, turn=None):
    """The scores of a prompt, and the positions kept."""
    found, judge = [], policy.judge

    def listening(asked):
        found.append(judge(asked))
        return found[-1]

    policy.judge = listening
    _, state = policy.update(policy.init_state(*k.shape[:2], k.shape[3]), k, v, q, turn=turn)
    return found[0][0], state.store.read().positions.long()


@pytest.mark.parametrize("name", POLICIES)
def test_golden_numbers(name):
    scores, kept = judged(POLICIES[name](0.5), GOLD["q"], GOLD["k"], GOLD["v"], turned)
    torch.testing.assert_close(scores, GOLD[f"{name}_scores"], rtol=0, atol=1e-10)
    assert torch.equal(kept, GOLD[f"{name}_kept"])


@pytest.mark.parametrize("name", POLICIES)
def test_plain_loops(name):
    q, k, v = drawn(H=6, G=3, D=6)
    raw, position = drawn(H=6, G=3, D=6, seed=1)[0], Rotary(6)
    if name == "expected":
        q = position.rotate(raw, torch.arange(13))
    weights = naive.causal_weights(q, k)
    cos, sin = naive.rope_tables(range(13, 18), 6)
    want = {
        "snapkv": lambda: naive.snapkv(weights, 3, 4, 3),
        "h2o": lambda: naive.h2o(weights, 3),
        "tova": lambda: naive.tova(weights, 3),
        "knorm": lambda: naive.key_norm(k),
        "keydiff": lambda: naive.keydiff(k),
        "streaming": lambda: naive.streaming(2, 3, 13, 0.5, 2),
        "expected": lambda: naive.expected(raw, k, v, cos, sin, 2),
    }[name]()
    scores, kept = judged(POLICIES[name](0.5), q, k, v, position.rotate)
    # Frequencies of rotary positions are rounded to float32.
    torch.testing.assert_close(scores, want, rtol=0, atol=1e-5 if name == "expected" else 1e-10)
    if name != "streaming":  # equal scores: the newest stay here, the oldest there
        assert torch.equal(kept, naive.keep(want, 6))


@pytest.mark.parametrize("kind", ["streaming", "tova", "h2o"])
def test_the_same_keys_stay_step_by_step(kind):
    q, k, v = drawn()
    options = {"streaming": {"sinks": 2}, "tova": {}, "h2o": {}}[kind]
    policy = {"streaming": StreamingLLM, "tova": TOVA, "h2o": H2O}[kind](budget=6, every=1, **options)
    _, alive = naive.evicting_stream(q, k, v, 6, kind, 2)
    state = policy.init_state(2, 2, 4)
    for t in range(13):
        kept, state = policy.update(state, *(z[:, :, t : t + 1] for z in (k, v, q)))
    assert kept.positions.tolist() == alive


@pytest.mark.parametrize("name", POLICIES)
def test_a_step_attends_to_what_a_prompt_left_and_to_itself(name):
    q, k, v = drawn(S=16)
    policy = POLICIES[name](0.5)
    state = policy.init_state(2, 2, 4)
    _, state = policy.update(state, k[:, :, :12], v[:, :, :12], q[:, :, :12])
    left = state.store.read().positions.long()
    want = naive.evicting_prefill(q[:, :, :13], k[:, :, :13], v[:, :, :13], 12, left)[:, :, 12:]
    roomy = policy.with_budget(64)  # from here on nothing is dropped
    kept, _ = roomy.update(state, k[:, :, 12:13], v[:, :, 12:13], q[:, :, 12:13])
    torch.testing.assert_close(attend(q[:, :, 12:13], kept), want)


def test_heads_share_a_budget():
    q, k, v = drawn(S=40, seed=3)
    k[:, 0] *= 0.01  # the first key head looks everywhere, the second at few
    policy = AdaKV(budget=10, window=2, kernel=1, every=1)
    _, state = policy.update(policy.init_state(2, 2, 4), k, v, q)
    counts = (state.store.read().positions >= 0).sum(-1)
    assert (counts.sum(1) == 20).all()
    assert (counts[:, 0] != counts[:, 1]).all()
    assert len(state.store.k) == 40, "keys of two rows, end to end: none for places that are empty"
    scores = naive.h2o(naive.causal_weights(q[:, :, :12], k[:, :, :12]), 2)
    places = keep_best(scores, 6, floor=0.2)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    for b, g in np.ndindex(2, 2):
        chosen[b, g, places[b, g][places[b, g] >= 0]] = True
    assert torch.equal(chosen, naive.adakv(scores, 0.5))


def test_a_pyramid_of_budgets():
    policy = PyramidKV(budget=500)
    budgets = [policy.at_layer(n, 4).budget for n in range(4)]
    want = naive.pyramid_budgets(2000, 0.75, 4, window=1)
    assert all(0 <= b - own <= 1 for b, own in zip(want, budgets, strict=True))
    assert budgets == sorted(budgets, reverse=True)
    assert 1996 <= sum(budgets) <= 2000
    assert PyramidKV(budget=500, beta=1).at_layer(3, 4).budget == 500


def needle(at=20, S=60):
    """Keys of which only the last queries ask for one, in the middle."""
    q, k, v = drawn(S=S, D=8, seed=5)
    q, k = 0.1 * q, 0.1 * k
    k[:, :, at, 0] = 5.0
    q[:, :, -4:, 0] = 8.0
    return q, k, v, at


@pytest.mark.parametrize("name", ["snapkv", "tova"])
def test_a_needle_survives_where_queries_ask_for_it(name):
    q, k, v, at = needle()
    for policy, survives in ((POLICIES[name](0.2), True), (POLICIES["streaming"](0.2), False)):
        _, kept = judged(policy, q, k, v)
        assert bool((kept == at).any(-1).all()) is survives
        first = kept == 0
        assert bool(first.any(-1).all()) or survives, "StreamingLLM keeps the first"


def test_heavy_hitters_stay():
    q, k, v, at = needle()
    q[..., 0], q[:, :, -4:, 0] = 8.0, 0.0
    _, kept = judged(H2O(budget=0.2), q, k, v)
    assert bool((kept == at).any(-1).all()), "what all but the last asked for"
    assert not bool((judged(StreamingLLM(budget=0.2, sinks=0), q, k, v)[1] == at).any())


def test_small_keys_stay():
    q, k, v = drawn()
    k[:, :, 5] *= 1e-3
    assert bool((judged(KeyNorm(budget=2), q, k, v)[1] == 5).any(-1).all())
    assert not bool((judged(StreamingLLM(budget=2, sinks=0), q, k, v)[1] == 5).any())


def test_keys_that_differ_stay():
    q, k, v = drawn()
    k[:] = k[:, :, :1] + 0.01 * k
    k[:, :, 5] *= -1
    assert bool((judged(KeyDiff(budget=2), q, k, v)[1] == 5).any(-1).all())
    assert not bool((judged(StreamingLLM(budget=2, sinks=0), q, k, v)[1] == 5).any())


def test_what_is_expected_stays():
    q, k, v, at = needle()
    q[..., 0] = 3.0
    assert bool((judged(ExpectedAttention(budget=0.2, sinks=1), q, k, v)[1] == at).any(-1).all())
    assert not bool((judged(StreamingLLM(budget=0.2, sinks=1), q, k, v)[1] == at).any())


def test_errors_by_what_is_asked():
    """At equal budget what reads attention loses least, and what reads keys less than chance."""

    class Chance(Evicting):
        def judge(self, asked):
            return torch.rand(asked.k.shape[:3], generator=torch.Generator().manual_seed(0)), None

    # Keys of small norm lie where queries look, as in trained models.
    q, k, v = drawn(B=4, S=80, D=8, seed=7)
    aim = torch.randn(8, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    strong = torch.rand(4, 2, 80, 1, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    q, k = q * 0.5 + 2 * aim, k * (1.5 - strong) + strong.square() * aim
    off = {}
    for name, policy in {"tova": TOVA(budget=16), "norm": KeyNorm(budget=16), "chance": Chance(budget=16)}.items():
        state = policy.update(policy.init_state(4, 2, 8), k[:, :, :79], v[:, :, :79], q[:, :, :79])[1]
        kept = state.store.read()
        exact = attend(q[:, :, 79:], kept._replace(k=k, v=v, positions=torch.arange(80).expand(4, 2, -1)))
        off[name] = float((attend(q[:, :, 79:], kept) - exact).square().mean())
    assert off["tova"] < off["norm"] < off["chance"], off


@pytest.mark.parametrize("name", ["snapkv", "h2o", "adakv", "expected_attention"])
def test_a_layer_under_a_budget(name):
    """With room it is as without; under a budget a step attends to what is kept, at its place in the text."""
    torch.manual_seed(0)
    layer = regard.Attention(24, 4, num_kv_heads=2, causal=True, position=Rotary(6)).double()
    x = torch.randn(2, 20, 24, dtype=torch.float64)
    with torch.no_grad():
        want = layer(x)
        for budget, exact in ((64, True), (1.0, True), (6, False)):
            state = layer.init_state(2, 64, policy=regard.create(name, budget=budget))
            outs, at = [], 0
            for t in (12, *[1] * 8):
                out, state = layer.step(x[:, at : at + t], state)
                outs, at = [*outs, out], at + t
            assert torch.allclose(torch.cat(outs, 1), want, rtol=0, atol=1e-10) is exact
            torch.testing.assert_close(outs[0], want[:, :12])
        kept = state.held.store.read()
        k = layer.position.rotate(layer.k_proj(x).view(2, 20, 2, 6).transpose(1, 2), torch.arange(20))
        places = kept.positions.long().clamp(min=0)[..., None].expand(-1, -1, -1, 6)
        real = kept.positions >= 0
        torch.testing.assert_close(kept.k[real], k.gather(2, places)[real])


def test_padding_in_a_layer():
    torch.manual_seed(0)
    layer = regard.Attention(24, 4, causal=True, position=Rotary(6)).double()
    x = torch.randn(2, 16, 24, dtype=torch.float64)
    keep = torch.ones(2, 16, dtype=torch.bool)
    keep[1, :5] = False

    def run(x, mask):
        state, outs, at = layer.init_state(len(x), 64, policy=TOVA(budget=6, every=1)), [], 0
        for t in (x.shape[1] - 6, *[1] * 6):
            out, state = layer.step(x[:, at : at + t], state, mask=mask)
            outs, at = [*outs, out], at + t
        return torch.cat(outs, 1)[:, -7:]

    with torch.no_grad():
        both = run(x, regard.masks.padding(keep))
        torch.testing.assert_close(both[:1], run(x[:1], None))
        torch.testing.assert_close(both[1:], run(x[1:, 5:], None))


def test_what_it_can_not_do():
    layer = regard.Attention(24, 4, causal=True, position=regard.create("alibi", dim=24, num_heads=4).position)
    with pytest.raises(ValueError, match="policy drops keys that the layer counts on"):
        layer.init_state(1, 8, policy=TOVA())
    with pytest.raises(TypeError, match="policy has the wrong type"):
        regard.Attention(24, 4, causal=True).init_state(1, 8, policy="tova")
    with pytest.raises(ValueError, match="TOVA: budget is out of range"):
        TOVA(budget=1.5)
    with pytest.raises(ValueError, match="SnapKV: kernel is even"):
        SnapKV(kernel=4)
    q, k, v = drawn()
    with pytest.raises(ValueError, match="TOVA: q is missing"):
        TOVA().update(TOVA().init_state(2, 2, 4), k, v)
    with pytest.raises(ValueError, match="TOVA: k does not fit the state"):
        TOVA().update(TOVA().init_state(2, 3, 4), k, v, q)
