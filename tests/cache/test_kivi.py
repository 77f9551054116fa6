"""KIVI: against plain loops by the author of the reference, who had read its authors' code; bytes; and what each way of
grouping costs."""

import math

import pytest
import torch

import regard
from regard.cache.kivi import KIVI
from regard.cache.quantised import Form, Quantised, packed, quantise, unpacked
from regard.kinds import Kept
from regard.laws.protocols import attend


def naive_group(numbers, bits):
    """z = min, s = (max - min) / (2^b - 1), Q = round((x - z) / s), x' = Q s + z. A group of equals is exact."""
    low, step = min(numbers), (max(numbers) - min(numbers)) / (2**bits - 1)
    return [low + step * (round((x - low) / step) if step else 0) for x in numbers]


def naive_kivi(k, v, bits, group, residual):
    """What one head reads after a prompt or steps of n tokens: lists of n lists."""
    n, D, V = len(k), len(k[0]), len(v[0])
    keys, values = [list(row) for row in k], [list(row) for row in v]
    for start in range(0, n // residual * residual, group):
        for d in range(D):
            column = naive_group([k[start + i][d] for i in range(group)], bits)
            for i in range(group):
                keys[start + i][d] = column[i]
    for t in range(n - residual):
        for start in range(0, V, group):
            values[t][start : start + group] = naive_group(v[t][start : start + group], bits)
    return keys, values


def naive(k, v, bits, group, residual):
    """All heads."""
    out = [torch.empty_like(k), torch.empty_like(v)]
    for b in range(k.shape[0]):
        for g in range(k.shape[1]):
            found = naive_kivi(k[b, g].tolist(), v[b, g].tolist(), bits, group, residual)
            for z, rows in zip(out, found, strict=True):
                z[b, g] = z.new_tensor(rows).view_as(z[b, g])
    return out


def drawn(n, *, B=2, H=4, G=2, D=6, V=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((H, D), (G, D), (G, V))
    return tuple(torch.randn(B, h, n, d, generator=generator, dtype=torch.float64) for h, d in sizes)


def started(policy, k, v):
    return policy.init_state(*k.shape[:2], k.shape[3], value_dim=v.shape[3])


def told(policy, k, v, sizes, **options):
    """The state after pieces of these sizes."""
    state, at = started(policy, k, v), 0
    for t in sizes:
        _, state = policy.update(state, k[:, :, at : at + t], v[:, :, at : at + t], **options)
        at += t
    return state


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("group", "residual"), [(4, 8), (3, 3), (2, 6), (1, 2)])
def test_plain_loops(bits, group, residual):
    _, k, v = drawn(21)
    policy = KIVI(bits=bits, group=group, residual=residual)
    for n in (1, residual - 1, residual, residual + 1, 21):
        want = naive(k[:, :, :n], v[:, :, :n], bits, group, residual)
        for sizes in ([n], [1] * n, [n // 2, n - n // 2]):
            read = told(policy, k, v, [t for t in sizes if t]).store.read()
            torch.testing.assert_close(read.k, want[0], rtol=0, atol=1e-12)
            torch.testing.assert_close(read.v, want[1], rtol=0, atol=1e-12)
            assert torch.equal(read.positions.long(), torch.arange(n).expand(2, 2, -1))


def test_a_step_attends_before_it_quantises():
    _, k, v = drawn(9)
    policy = KIVI(bits=2, group=4, residual=4)
    state = told(policy, k, v, [7])
    kept, state = policy.update(state, k[:, :, 7:8], v[:, :, 7:8])
    want = naive(k[:, :, :7], v[:, :, :7], 2, 4, 4)
    torch.testing.assert_close(kept.k, torch.cat([want[0], k[:, :, 7:8]], 2))
    torch.testing.assert_close(kept.v, torch.cat([want[1], v[:, :, 7:8]], 2))
    assert not torch.equal(state.store.read().k[:, :, 4:8], k[:, :, 4:8]), "the block is whole, and quantised"


def test_padded_rows_are_as_alone():
    _, k, v = drawn(24, B=3)
    pads, policy = (0, 3, 7), KIVI(bits=2, group=3, residual=3)
    keep = torch.stack([torch.arange(24) >= p for p in pads])
    state, at = started(policy, k, v), 0
    for t in (9, 5, *[1] * 10):
        piece = slice(at, at + t)
        kept, state = policy.update(state, k[:, :, piece], v[:, :, piece], keep=keep[:, piece])
        at += t
    read = state.store.read()
    for row, p in enumerate(pads):
        want = naive(k[row : row + 1, :, p:], v[row : row + 1, :, p:], 2, 3, 3)
        real = read.positions[row, 0] >= 0
        assert int(real.sum()) == 24 - p
        torch.testing.assert_close(read.k[row][:, real], want[0][0])
        torch.testing.assert_close(read.v[row][:, real], want[1][0])
        last = kept.positions[row, 0] >= 0
        torch.testing.assert_close(kept.k[row][:, last][:, -1], k[row, :, -1])
    again = policy.reorder(state, torch.tensor([2, 0])).store.read()
    assert all(torch.equal(a, b[[2, 0]]) for a, b in zip(again[:3], read[:3], strict=True))


def test_padding_within_steps():
    """Rows that end go on as they were, while others take tokens."""
    _, k, v = drawn(16, B=2)
    policy = KIVI(bits=2, group=3, residual=3)
    keep = torch.ones(2, 16, dtype=torch.bool)
    keep[1, 9:13] = False
    state, at = started(policy, k, v), 0
    for t in (6, *[1] * 10):
        _, state = policy.update(state, *(z[:, :, at : at + t] for z in (k, v)), keep=keep[:, at : at + t])
        at += t
    read = state.store.read()
    want = naive(k[1:][:, :, keep[1]], v[1:][:, :, keep[1]], 2, 3, 3)
    torch.testing.assert_close(read.k[1:, :, -12:], want[0])
    torch.testing.assert_close(read.v[1:, :, -12:], want[1])
    assert (read.positions[1, :, :-12] < 0).all()


def test_a_loud_channel_is_quantised_alone():
    """Where one channel of keys is large, as in trained models, attention in 2 bits stays near the exact one; with
    groups along channels it doesn't. And memory is that of the bits."""
    q, k, v = drawn(256, D=32, V=32, seed=1)
    k[..., 3] = 30.0 + k[..., 3]
    q[..., 3] = 0.0
    policy = KIVI(bits=2, group=32, residual=32)
    state = told(policy, k, v, [256])
    read, exact = state.store.read(), Kept(k, v, torch.arange(256).expand(2, 2, -1))
    form = Form(2, 32, 32)
    by_token = read._replace(k=form.read_values(form.values(k), 32))
    want = attend(q, exact)
    off = {
        n: float((attend(q, z) - want).norm() / want.norm()) for n, z in {"channel": read, "token": by_token}.items()
    }
    assert off["channel"] < 0.5 * off["token"], off
    newest = Kept(*(z[:, :, -32:] for z in exact[:3]))
    assert off["channel"] < 0.5 * float((attend(q, newest) - want).norm() / want.norm()), "as small a window loses more"
    for dtype in (torch.float32, torch.float64):
        held = told(policy, k.to(dtype), v.to(dtype), [256])
        size, tokens = torch.finfo(dtype).bits // 8, 2 * 2 * 256
        keys = tokens * 32 // 4 + 2 * tokens * size  # codes; a scale and a low for 32 tokens of each of 32 channels
        values = (tokens - 4 * 32) * (32 // 4 + 2 * size) + 4 * 32 * 32 * size
        assert held.nbytes == keys + values + 4 * tokens, "codes, scales, the residual, positions"
    assert held.nbytes < 0.3 * (k.nbytes + v.nbytes)


@pytest.mark.parametrize("name", ["snapkv", "tova", "adakv", "h2o"])
def test_under_another_policy(name):
    """The same keys stay, in few bits; with a long residual bit for bit."""
    q, k, v = drawn(40)
    plain = regard.create(name, budget=12, **({"window": 4} if name in ("snapkv", "adakv") else {}))
    for form, near in ((KIVI(residual=64), 0.0), (KIVI(bits=8, group=4, residual=4), 0.05)):
        other, found = form.under(plain), []
        assert other.makes is not plain.makes
        for policy in (plain, other):
            state = policy.init_state(2, 2, 6, value_dim=10)
            _, state = policy.update(state, k[:, :, :30], v[:, :, :30], q[:, :, :30])
            kept, _ = policy.update(state, k[:, :, 30:31], v[:, :, 30:31], q[:, :, 30:31])
            found.append(kept)
        one, two = found
        n = one.positions.shape[2]
        assert torch.equal(one.positions.long(), two.positions.long()[:, :, -n:])
        real = (one.positions >= 0)[..., None]
        for a, b in ((one.k, two.k), (one.v, two.v)):
            torch.testing.assert_close(b[:, :, -n:] * real, a * real, rtol=0, atol=near)


def test_packing():
    for bits in (2, 4, 8):
        levels = torch.randint(0, 2**bits, (3, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
        codes = packed(levels, bits)
        assert codes.dtype == torch.uint8
        assert codes.shape == (3, math.ceil(7 * bits / 8))
        assert torch.equal(unpacked(codes, bits, 7), levels)
    assert packed(torch.tensor([[1, 2, 3, 0]], dtype=torch.uint8), 2).tolist() == [[1 + 2 * 4 + 3 * 16]]
    half = torch.tensor([[1.0, 1.001, 1.002, 300.0]], dtype=torch.bfloat16)
    assert quantise(half, 1, 8)[1].dtype == torch.bfloat16


def test_empty_and_wrong():
    for B in (0, 2):
        _, k, v = drawn(5, B=B)
        assert told(KIVI(group=2, residual=2), k, v, [5]).store.read().k.shape == (B, 2, 5, 6)
        keep = torch.ones(B, 5, dtype=torch.bool)
        assert told(KIVI(group=2, residual=2), k, v, [5], keep=keep).store.read().k.shape[0] == B
    nothing = Quantised.of(Form(2, 2, 2))(Kept(k[:, :, :0], v[:, :, :0], torch.zeros(2, 2, 0), full=True), 0)
    assert nothing.read().k.shape == (2, 2, 0, 6)
    with pytest.raises(ValueError, match="KIVI: residual is no multiple of the group"):
        KIVI(group=3, residual=4)
    with pytest.raises(ValueError, match="KIVI: bits"):
        KIVI(bits=3)
