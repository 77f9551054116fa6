"""AttentionPredictor: against the authors' numbers, against plain loops, and what only prediction finds.

The loops of naive_attention_predictor.py are by an author who saw only the paper's account, neither code nor test.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import regard
from cache import naive_attention_predictor as naive
from regard.cache.attention_predictor import AttentionPredictor, HistoryNet, pool_blocks
from regard.laws.protocols import attend
from regard.positions.rotary import Rotary

GOLD = {name: torch.from_numpy(z) for name, z in np.load(Path(__file__).parents[1] / "vectors/B183.npz").items()}
NAMES = {"near": "c1", "wide": "c2", "last": "c3"}


def network(weights=GOLD):
    net = HistoryNet().double()
    net.load_state_dict({f"{a}.{n}": weights[f"{b}{n[0]}"] for a, b in NAMES.items() for n in ("weight", "bias")})
    return net


def drawn(*, B=2, H=4, G=2, S=20, D=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, n, S, D, generator=generator, dtype=torch.float64) for n in (H, G, G))


def small(**options):
    return AttentionPredictor(
        **{"history": 6, "block": 4, "sinks": 8, "local": 8, "budget": 24, "calibrate": 3, **options}
    )


def read(policy, q, k, v, prompt):
    """What each token after a prompt reads, what came of it, the predictions, and the state at the end."""
    state, found = policy.init_state(len(k), k.shape[1], k.shape[3]), []
    _, state = policy.update(state, k[:, :, :prompt], v[:, :, :prompt], q[:, :, :prompt])
    first = state
    for t in range(prompt, k.shape[2]):
        p = policy.predict(state.parts[0].own, groups=k.shape[1])
        kept, state = policy.update(state, *(z[:, :, t : t + 1] for z in (k, v, q)))
        found.append((kept, attend(q[:, :, t : t + 1], kept)[:, :, 0], p))
    return found, first.parts[0].own.rows, state.parts[0].own.rows


def mask(kept, S):
    return torch.zeros(*kept.positions.shape[:2], S + 1, dtype=torch.bool).scatter_(2, kept.positions.long(), True)[
        ..., :S
    ]


def places(kept, S):
    """The positions read, as a mask."""
    positions = kept.positions.long()
    return mask(kept._replace(positions=positions.masked_fill(positions < 0, S)), S)


@torch.no_grad()
def test_golden_numbers():
    q, k, v, S0 = GOLD["Q"], GOLD["K"], GOLD["V"], int(GOLD["S0"])
    found, first, last = read(small(network=network()), q, k, v, S0)
    torch.testing.assert_close(first, GOLD["history0"], rtol=0, atol=1e-10)
    for t, (kept, y, p) in enumerate(found):
        torch.testing.assert_close(p, GOLD[f"pred{t}"], rtol=0, atol=1e-10)
        assert torch.equal(places(kept, S0 + t + 1), GOLD[f"keep{t}"])
        torch.testing.assert_close(y, GOLD["y"][:, :, t], rtol=0, atol=1e-10)
    torch.testing.assert_close(last, GOLD["history_end"], rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("calibrate", [None, 2])
def test_plain_loops(calibrate):
    q, k, v = drawn(G=4, S=15)
    options = {"history": 3, "block": 2, "sinks": 2, "local": 2, "budget": 8, "calibrate": calibrate}
    found, *_ = read(small(network=network(), **options), q, k, v, 12)
    loops = naive.AttentionHistoryPredictor(GOLD, **{("sink" if n == "sinks" else n): z for n, z in options.items()})
    state = loops.init_state(q[:, :, :12], k[:, :, :12])
    for t, (kept, y, p) in enumerate(found, start=13):
        want, keep, predicted, state = loops.step(state, q[:, :, t - 1 : t], k[:, :, :t], v[:, :, :t])
        torch.testing.assert_close(p, predicted, rtol=0, atol=1e-10)
        assert torch.equal(places(kept, t), keep)
        torch.testing.assert_close(y, want[:, :, 0], rtol=0, atol=1e-10)


def test_gradients_of_the_network():
    x = torch.rand(2, 4, 5, dtype=torch.float64, requires_grad=True)
    net = network()
    weights = {name: z.clone().requires_grad_() for name, z in GOLD.items() if name.startswith("c")}
    want = sum(naive.mse(naive.predictor(x[b], weights), x[b, 0]) for b in range(2)) / 2
    got = net.loss(x, x[:, 0])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    ours = torch.autograd.grad(got, [x, *net.parameters()])
    theirs = torch.autograd.grad(want, [x, *(weights[f"{b}{n}"] for b in NAMES.values() for n in "wb")])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_the_network_is_small():
    assert sum(p.numel() for p in HistoryNet().parameters()) == 4833


def test_blocks_are_pooled():
    a = torch.tensor([0.1, 0.4, -0.2, -0.3, -0.5])
    assert pool_blocks(a, 2).tolist() == pytest.approx([0.4, -0.2, 0.0])


@torch.no_grad()
def test_heads_that_share_keys_share_what_they_read():
    q, k, v = drawn(S=40)
    policy = small(network=network())
    found, *_ = read(policy, q, k, v, 37)
    repeated, *_ = read(policy, q, *(z.repeat_interleave(2, 1) for z in (k, v)), 37)
    p = repeated[0][2].unflatten(1, (2, 2)).mean(2)
    torch.testing.assert_close(found[0][2], p)
    assert torch.equal(places(found[0][0], 38), policy.choose(p, 38))


def moving(steps, *, blocks=12, every=3, start=0):
    """Pooled rows whose peak goes on by a block every few steps, while one that got much before gets nothing now."""
    rows = torch.full((steps, blocks), 0.01)
    for t in range(steps):
        rows[t, (start + t // every) % blocks] = 0.8
    return rows


def test_what_moves_is_predicted():
    torch.manual_seed(0)
    net, N = HistoryNet(), 6
    streams = [moving(40, start=s) for s in range(12)]
    x = torch.stack([z[t : t + N] for z in streams for t in range(30)])
    y = torch.stack([z[t + N] for z in streams for t in range(30)])
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        net.loss(x, y).backward()
        optimizer.step()
    policy = AttentionPredictor(history=N, block=1, sinks=0, local=1, budget=2, network=net)
    test, seen = moving(36, start=5), {"predicted": 0.0, "accumulated": 0.0}
    with torch.no_grad():
        for t in range(N, 35):
            p = {"predicted": net(test[t - N : t]), "accumulated": test[:t].sum(0)}
            for name, scores in p.items():
                keep = policy.choose(scores[None, None], 13)[0, 0, :12]
                seen[name] += float(test[t][keep].sum()) / (35 - N)
    assert seen["predicted"] > 0.6 > 2 * seen["accumulated"], seen


def test_a_layer_under_a_budget():
    """With room it is as without; under a budget a step attends to what was predicted."""
    torch.manual_seed(0)
    layer = regard.Attention(24, 4, num_kv_heads=2, causal=True, position=Rotary(6)).double()
    x = torch.randn(2, 20, 24, dtype=torch.float64)
    options = {"block": 2, "sinks": 2, "local": 2, "history": 4}
    with torch.no_grad():
        want = layer(x)
        for budget, exact in ((64, True), (1.0, True), (6, False), (0.4, False)):
            state = layer.init_state(2, 64, policy=AttentionPredictor(budget=budget, **options))
            outs, at = [], 0
            for t in (12, *[1] * 8):
                out, state = layer.step(x[:, at : at + t], state)
                outs, at = [*outs, out], at + t
            assert torch.allclose(torch.cat(outs, 1), want, rtol=0, atol=1e-10) is exact
            torch.testing.assert_close(outs[0], want[:, :12])
            assert state.nbytes > 0


def test_what_it_can_not_do():
    with pytest.raises(ValueError, match="AttentionPredictor: sinks is no multiple of block = 16"):
        AttentionPredictor(sinks=8)
    with pytest.raises(ValueError, match="AttentionPredictor: budget is less than sinks and local"):
        AttentionPredictor(budget=100)
    q, k, v = drawn()
    policy = AttentionPredictor()
    with pytest.raises(ValueError, match="AttentionPredictor: q is missing"):
        policy.update(policy.init_state(2, 2, 4), k, v)
    with pytest.raises(ValueError, match="AttentionPredictor: k does not fit the state"):
        policy.update(policy.init_state(2, 3, 4), k, v, q)
    with pytest.raises(ValueError, match="AttentionPredictor: own has no rows"):
        policy.predict(policy.begin(), groups=2)
