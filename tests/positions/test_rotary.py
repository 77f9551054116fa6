"""Rotary positions (2104.09864): pairs of channels turn with the position; and how to rescale them."""

import ast
import math

import pytest
import torch

import regard
from positions.naive import CASES, attention, case, check, close, vectors
from regard.positions import (
    NTK,
    DynamicNTK,
    Linear,
    Llama3,
    LongRoPE,
    Proportional,
    Rotary,
    YaRN,
    to_half_split,
    to_interleaved,
)

Z = {k: torch.as_tensor(v) if v.dtype.kind in "fi" else ast.literal_eval(str(v)) for k, v in vectors("B134").items()}


def turned(z, position, frequencies, *, factor=1.0, interleaved=False):
    """One vector, pair by pair: (a, b) turns by position * frequency."""
    D, out = len(z), z.clone()
    for pair, w in enumerate(frequencies):
        low, high = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + D // 2)
        cos, sin = factor * math.cos(position * w), factor * math.sin(position * w)
        out[low], out[high] = z[low] * cos - z[high] * sin, z[low] * sin + z[high] * cos
    return out


def plain(D, base=10000.0):
    return [base ** (-2 * a / D) for a in range(D // 2)]


def measured(part, D, length=2):
    """Frequencies and factor of a part, read off from how it turns the unit vectors of position 1."""
    unit = torch.eye(D, dtype=torch.float64)[: D // 2, None].expand(-1, length, -1)[None]
    at_one = part.rotate(unit, torch.arange(length))[0, :, 1]
    cos, sin = at_one.diagonal(), at_one[:, D // 2 :].diagonal()
    return torch.atan2(sin, cos), torch.hypot(sin, cos)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("seed", CASES)
def test_matches_the_definition(seed, interleaved):
    c = case(seed)
    B, H, T, D = c.q.shape
    G, S = c.k.shape[1:3]
    w = plain(D, 100.0)
    q = {(b, h, t): turned(c.q[b, h, t], t + S - T, w, interleaved=interleaved)
         for b in range(B) for h in range(H) for t in range(T)}  # fmt: skip
    k = {(b, g, j): turned(c.k[b, g, j], j, w, interleaved=interleaved)
         for b in range(B) for g in range(G) for j in range(S)}  # fmt: skip
    wanted = attention(c, lambda b, h, t, i, j: float(q[b, h, t] @ k[b, h // (H // G), j]) / math.sqrt(D))
    check(c, Rotary(D, base=100.0, interleaved=interleaved), wanted)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_distance_and_lengths_stay(interleaved):
    part = Rotary(8, interleaved=interleaved)
    q, k = torch.randn(2, 1, 1, 5, 8, dtype=torch.float64)
    at = torch.tensor([0, 3, 4, 90, 1000])
    here, there = (part.rotate(q, at + s) @ part.rotate(k, at + s).mT for s in (0, 12345))
    close(here, there, atol=1e-9)
    close(part.rotate(q, at).norm(dim=-1), q.norm(dim=-1))
    assert torch.equal(part.rotate(q, at)[:, :, 0], q[:, :, 0])
    assert (part.rotate(q, at) - q)[:, :, 1:].abs().amin(-1).max() > 0


def test_both_layouts_are_one_up_to_a_permutation():
    z, at = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.arange(5)
    halves, pairs = Rotary(8), Rotary(8, interleaved=True)
    assert torch.equal(to_interleaved(to_half_split(z)), z)
    assert torch.equal(to_half_split(torch.arange(6.0)), torch.tensor([0.0, 2, 4, 1, 3, 5]))
    close(halves.rotate(to_half_split(z), at), to_half_split(pairs.rotate(z, at)))


def test_half_precision_tells_far_neighbours_apart():
    z, at = torch.ones(1, 1, 2, 8), torch.tensor([65535, 65536])
    exact = Rotary(8).rotate(z.double(), at)
    for dtype in (torch.bfloat16, torch.float16):
        got = Rotary(8).rotate(z.to(dtype), at)
        assert got.dtype == dtype
        assert not torch.equal(got[:, :, 0], got[:, :, 1])
        close(got.double(), exact, atol=0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(Rotary(8).rotate(z, at).double(), exact, atol=0.02)


def test_positions_of_each_sequence():
    """Left-padded batches hand in one row of positions for each sequence."""
    part, z = Rotary(4), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    at = torch.tensor([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]])
    got = part.rotate(z, at)
    for b in range(2):
        close(got[b], part.rotate(z[b : b + 1], at[b])[0])


SCALINGS = {
    "linear": lambda s: Linear(s["factor"]),
    "dynamic": lambda s: DynamicNTK(s["factor"], s["max_position_embeddings"]),
    "yarn": lambda s: YaRN(
        s["factor"],
        s["original_max_position_embeddings"],
        **{
            n: s[n]
            for n in ("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "attention_factor")
            if n in s
        },
    ),
    "llama3": lambda s: Llama3(
        s["factor"], s["original_max_position_embeddings"], s["low_freq_factor"], s["high_freq_factor"]
    ),
    "longrope": lambda s: LongRoPE(
        s["factor"], s["original_max_position_embeddings"], tuple(s["short_factor"]), tuple(s["long_factor"])
    ),
}
NAMES = [k.removesuffix("_setting") for k in Z if k.endswith("_setting") and "kind" in Z[k]]


def scaled(setting):
    return Rotary(setting["D"], base=setting["base"], scaling=SCALINGS[setting["kind"]](setting))


@pytest.mark.parametrize("name", NAMES)
def test_frequencies_of_transformers(name):
    """Golden numbers; the sequence is 91 tokens long."""
    setting = Z[f"{name}_setting"]
    frequencies, factor = measured(scaled(setting), setting["D"], length=91)
    torch.testing.assert_close(frequencies, Z[f"{name}_inv_freq"].double(), rtol=1e-6, atol=0)
    close(factor, Z[f"{name}_attention_factor"].expand_as(factor), atol=1e-6)


@pytest.mark.parametrize("name", [n for n in NAMES if f"{n}_pos" in Z])
def test_rotated_queries_and_keys_of_transformers(name):
    part, at = scaled(Z[f"{name}_setting"]), Z[f"{name}_pos"]
    q, k = (part.rotate(Z[f"{name}_{n}"].double(), at) for n in "qk")
    close(q, Z[f"{name}_q_rot"], atol=3e-5)
    close(q @ k.mT, Z[f"{name}_qk"], atol=1e-4)


def test_static_ntk_of_the_yarn_authors():
    setting = Z["ntk_setting"]
    part = Rotary(setting["D"], base=setting["base"], scaling=NTK(setting["alpha"]))
    torch.testing.assert_close(measured(part, setting["D"])[0], Z["ntk_inv_freq"].double(), rtol=1e-6, atol=0)


def test_llama_rotary_of_transformers():
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=32, num_attention_heads=2, head_dim=16, max_position_embeddings=64)
    q, k, at = torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16), torch.randint(0, 64, (1, 9))
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, at)
    for mine, theirs in zip((q, k), llama.apply_rotary_pos_emb(q, k, cos, sin)):
        close(Rotary(16).rotate(mine, at), theirs, atol=2e-5)


def test_linear_is_interpolation():
    z, at = torch.randn(1, 1, 6, 8, dtype=torch.float64), torch.arange(6)
    turned_less = Rotary(8, scaling=Linear(4.0)).rotate(z, 4 * at)
    close(turned_less, Rotary(8).rotate(z, at))
    assert (turned_less - Rotary(8).rotate(z, 4 * at)).abs().max() > 0.1


def test_ntk_keeps_the_first_frequency_and_slows_the_last():
    frequencies, factor = measured(Rotary(16, scaling=NTK(8.0)), 16)
    close(frequencies[[0, -1]], torch.tensor([1.0, plain(16)[-1] / 8]).double(), atol=1e-7)
    assert (frequencies[:-1] > torch.tensor(plain(16)).double()[:-1] / 8).all()
    close(factor, torch.ones_like(factor))


def test_dynamic_ntk_is_plain_within_the_trained_length():
    close(
        measured(Rotary(8, scaling=DynamicNTK(4.0, 64)), 8, length=64)[0],
        torch.tensor(plain(8)).double(),
        atol=1e-6,
    )
    longer = measured(Rotary(8, scaling=DynamicNTK(4.0, 64)), 8, length=128)[0]
    base = 10000 * (4 * 128 / 64 - 3) ** (8 / 6)
    close(longer, torch.tensor(plain(8, base)).double(), atol=1e-6)


def test_yarn_keeps_fast_pairs_and_interpolates_slow_ones():
    D, s, L = 32, 4.0, 2048
    frequencies, factor = measured(Rotary(D, scaling=YaRN(s, L)), D)
    own = torch.tensor(plain(D)).double()
    low, high = (D * math.log(L / (2 * math.pi * turns)) / (2 * math.log(10000)) for turns in (32, 1))
    low, high = math.floor(low), math.ceil(high)
    close(frequencies[: low + 1], own[: low + 1], atol=1e-7)
    close(frequencies[high:], own[high:] / s, atol=1e-7)
    between = frequencies[low + 1 : high] / own[low + 1 : high]
    assert len(between) > 1
    assert (between < 1).all()
    assert (between > 1 / s).all()
    close(factor, torch.full_like(factor, 0.1 * math.log(s) + 1), atol=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match=r"Rotary: head_dim is no multiple of pair = 2 \(got 7\); expected"):
        Rotary(7)
    with pytest.raises(ValueError, match=r"Rotary: base is out of range \(got 1\); expected a finite number > 1"):
        Rotary(8, base=1)
    with pytest.raises(ValueError, match=r"YaRN: factor is out of range \(got 0.0\); expected a finite number >= 1"):
        YaRN(0.0, 64)
    with pytest.raises(TypeError, match=r"YaRN: original_max has the wrong type \(got 64.0\); expected an int >= 1"):
        YaRN(2.0, 64.0)
    with pytest.raises(ValueError, match=r"NTK: head_dim is too small \(got 2\); expected an int >= 4"):
        Rotary(2, scaling=NTK(2.0))
    with pytest.raises(
        ValueError, match=r"LongRoPE: long_factor has the wrong length \(got 3\); expected .* = 4 numbers"
    ):
        Rotary(8, scaling=LongRoPE(2.0, 64, (1.0,) * 4, (1.0,) * 3))
    z = torch.randn(1, 1, 3, 6)
    with pytest.raises(ValueError, match=r"Rotary: z has the wrong shape \(got \(1, 1, 3, 6\)\); expected .*, D = 8\)"):
        Rotary(8).rotate(z, torch.arange(3))


@pytest.mark.parametrize(
    ("name", "options", "scaling"),
    [
        ("rotary_linear", {"factor": 3.0}, Linear(3.0)),
        ("rotary_ntk", {"factor": 3.0}, NTK(3.0)),
        (
            "rotary_yarn",
            {"factor": 3.0, "original_max": 64, "mscale": 2.0, "mscale_all_dim": 0.5, "truncate": False},
            YaRN(3.0, 64, mscale=2.0, mscale_all_dim=0.5, truncate=False),
        ),
    ],
)
def test_cards_build_a_rotary_with_their_scaling(name, options, scaling):
    part = regard.create(name, dim=16, num_heads=2, base=500.0, interleaved=True, **options).position
    assert (part.head_dim, part.base, part.interleaved, part.scaling) == (8, 500.0, True, scaling)
    with pytest.raises(ValueError, match=r"'rotary' has no such option \(got 'scaling'\)"):
        regard.create("rotary", dim=16, num_heads=2, scaling=scaling)


def test_attention_uses_absolute_key_positions_when_streaming():
    layer = regard.create("rotary", dim=8, num_heads=2, causal=True).double()
    x, state, out = torch.randn(1, 5, 8, dtype=torch.float64), layer.init_state(1, 5), []
    for t in range(5):
        y, state = layer.step(x[:, t : t + 1], state)
        out.append(y)
    close(torch.cat(out, 1), layer(x))


# --- part of the channels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("D", "factor", "turning"), [(8, 0.5, 4), (10, 0.4, 4), (16, 0.25, 4), (9, 0.9, 8), (8, 1.0, 8)]
)
def test_only_the_first_channels_turn(D, factor, turning, interleaved):
    """As a rotary part of that width turns them: frequencies are over the channels that turn."""
    z, at = torch.randn(2, 3, 5, D, dtype=torch.float64), torch.tensor([0, 1, 4, 9, 70])
    got = Rotary(D, base=50.0, interleaved=interleaved, partial_rotary_factor=factor).rotate(z, at)
    w = plain(turning, 50.0)
    for b, h, t in torch.cartesian_prod(*map(torch.arange, (2, 3, 5))).tolist():
        close(got[b, h, t, :turning], turned(z[b, h, t, :turning], float(at[t]), w, interleaved=interleaved))
    assert torch.equal(got[..., turning:], z[..., turning:])


ROPE_TYPES = {
    "linear": ({"factor": 4.0}, Linear(4.0)),
    "dynamic": ({"factor": 4.0}, DynamicNTK(4.0, 64)),
    "yarn": ({"factor": 4.0, "original_max_position_embeddings": 32}, YaRN(4.0, 32)),
    "llama3": (
        {"factor": 4.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        Llama3(4.0, 32),
    ),
    "longrope": (
        {
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
        },
        LongRoPE(4.0, 32, (1.0, 1.1, 1.2, 1.3), (1.0, 2.0, 3.0, 4.0)),
    ),
    "proportional": ({"factor": 2.0}, Proportional(2.0, 0.5)),
}


@pytest.mark.parametrize("length", [20, 150])
@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_part_of_the_channels_with_every_scaling_of_transformers(kind, length):
    phi = pytest.importorskip("transformers.models.phi.modeling_phi")
    given, scaling = ROPE_TYPES[kind]
    rope = {"rope_type": kind, "rope_theta": 100.0, "partial_rotary_factor": 0.5, **given}
    config = phi.PhiConfig(hidden_size=32, num_attention_heads=2, max_position_embeddings=64, rope_parameters=rope)
    part = Rotary(16, base=100.0, scaling=scaling, partial_rotary_factor=1.0 if kind == "proportional" else 0.5)
    q, at = torch.randn(1, 2, length, 16, dtype=torch.float64), torch.arange(length)[None]
    cos, sin = phi.PhiRotaryEmbedding(config)(q, at)
    width = part.rotary_dim
    assert cos.shape[-1] == width
    first = q[..., :width]
    want = torch.cat((phi.apply_rotary_pos_emb(first, first, cos, sin)[0], q[..., width:]), -1)
    close(part.rotate(q, at), want, atol=1e-4)  # angles up to 150 in fp32


def test_parts_that_leave_no_pairs_are_refused():
    with pytest.raises(ValueError, match=r"Rotary: rotary_dim is no multiple of pair = 2 \(got 5\)"):
        Rotary(10, partial_rotary_factor=0.5)
    with pytest.raises(ValueError, match=r"Rotary: rotary_dim is too small \(got 0\); expected an int >= 2"):
        Rotary(8, partial_rotary_factor=0.1)
    with pytest.raises(ValueError, match=r"Rotary: partial_rotary_factor is out of range \(got 1.5\)"):
        Rotary(8, partial_rotary_factor=1.5)
    with pytest.raises(ValueError, match=r"NTK: head_dim is too small \(got 2\); expected an int >= 4"):
        Rotary(8, partial_rotary_factor=0.25, scaling=NTK(2.0))
