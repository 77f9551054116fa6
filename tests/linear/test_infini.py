"""Infini-attention against loops (naive_infini.py, whose author has read neither code nor tests), against numbers of a
public implementation, and what it promises."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from linear import naive_infini as naive
from regard.laws.agreement import close
from regard.linear import Infini, infini_attention
from regard.linear._infini import InfiniState
from regard.positions._shared import frequencies

VECTORS = Path(__file__).parents[1] / "vectors" / "infini_segments.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_segments(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, C: int, **options: Any) -> tuple[Tensor, Any]:
    """The loops, segment after segment."""
    state, outs = None, []
    for n in range(0, q.shape[2], C):
        out, state = naive.attend(*(z[:, :, n : n + C] for z in (q, k, v)), beta, state, **options)
        outs.append(out)
    return torch.cat(outs, 2), state


def layer(dim: int = 8, heads: int = 2, **options: Any) -> Infini:
    made = regard.create("infini", dim=dim, num_heads=heads, causal=True, dtype=torch.float64, **options)
    assert isinstance(made, Infini)
    return made


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("freqs", [None, [1.0, 0.3]])
@pytest.mark.parametrize("sizes", [(2, 2, 11, 4, 3, 3), (1, 1, 6, 4, 4, 2), (1, 2, 6, 4, 5, 5)], ids=str)
def test_equals_the_loops(sizes: tuple[int, ...], freqs: list[float] | None, delta: bool) -> None:
    """Outputs and gradients of all at once, and of a state that goes on by pieces which no segment divides."""
    B, H, T, D, V, C = sizes
    w = None if freqs is None else torch.tensor(freqs, dtype=torch.float64)
    leaves = [normal(n, B, H, T, width).requires_grad_() for n, width in enumerate((D, D, V))]
    leaves.append(normal(4, H).requires_grad_())
    want, _ = by_segments(*leaves, C, delta=delta, freqs=w)
    options: dict[str, Any] = {"segment": C, "delta": delta}
    whole, _ = infini_attention(*leaves, w, **options)
    state: InfiniState | None = start(B, H, D, V)
    outs, n = [], 0
    for size in (1, 2, 7, 100):
        q, k, v = (z[:, :, n : n + size] for z in leaves[:3])
        out, state = infini_attention(q, k, v, leaves[3], w, state=state, **options)
        outs.append(out)
        n += size
    along = normal(9, *want.shape)
    for got in (whole, torch.cat(outs, 2)):
        close(got.detach(), want.detach())
        for g, x in zip(*(torch.autograd.grad(z, leaves, along, retain_graph=True) for z in (got, want)), strict=True):
            close(g, x)


def start(B: int, H: int, D: int, V: int) -> InfiniState:
    sums, count = torch.zeros(B, H, D, V + 1).double(), torch.zeros(B).long()
    return InfiniState(sums, sums, sums.new_zeros(B, H, 0, D), sums.new_zeros(B, H, 0, V), count, count.bool())


def vectors() -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {name: torch.from_numpy(file[name]) for name in file}


@pytest.mark.parametrize("delta", [False, True])
def test_gives_the_numbers_of_a_public_implementation(delta: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two segments that end where their authors end them; the frequencies are free numbers."""
    z = vectors()
    monkeypatch.setattr("regard.linear.infini.frequencies", lambda *_: z["rotary_emb.freqs"])
    ours = layer(6, 2, head_dim=4, segment=5, delta=delta, pre_norm=True)
    with torch.no_grad():
        for p, weight in zip((ours.q_proj, ours.k_proj, ours.v_proj), z["to_qkv.weight"].chunk(3), strict=True):
            p.weight.copy_(weight)
        ours.o_proj.weight.copy_(z["to_out.weight"])
        ours.norm_weight.copy_(z["norm.gamma"])
        ours.gate.copy_(z["fastweight_mem.head_gates"].flatten())
    x1, x2 = z["x1"].requires_grad_(), z["x2"].requires_grad_()
    out1, state1 = ours.step(x1, ours.init_state(2, 9))
    out2, state2 = ours.step(x2, state1)
    end = state2.closed()
    assert (ours(torch.cat([x1, x2], 1)) - torch.cat([out1, out2], 1)).abs().max() < 1e-10
    pairs = [(out1, z["out1"]), (state1.sums[..., :-1], z["memory"]), (state1.sums[..., -1], z["memory_norm"])]
    if delta:
        pairs += [
            (out2, z["delta_out2"]),
            (end.sums[..., :-1], z["delta_memory2"]),
            (end.sums[..., -1], z["delta_norm2"]),
        ]
    else:
        pairs.append((out2, z["out2"]))
        grads = torch.autograd.grad((out2 * z["w"]).sum(), [x1, x2, ours.gate])
        pairs += zip(grads, (z["gx1"], z["gx2"], z["ghead_gates"]), strict=True)
    for got, want in pairs:
        assert (got - want).abs().max() < 1e-10


@pytest.mark.parametrize(
    "options",
    [{}, {"delta": True, "rotary_base": 20.0, "gate_init": -0.5}, {"rotary_base": None, "pre_norm": True}],
    ids=str,
)
def test_the_layer(options: dict[str, Any]) -> None:
    ours, x = layer(segment=3, **{"gate_init": 0.3, **options}), normal(1, 2, 8, 8)
    base = options.get("rotary_base", 10000.0)
    w = None if base is None else frequencies(4, base, x.device)
    normed = x / x.norm(dim=-1, keepdim=True) * 8**0.5 if "pre_norm" in options else x
    q, k, v = (p(normed).unflatten(-1, (2, 4)).transpose(1, 2) for p in (ours.q_proj, ours.k_proj, ours.v_proj))
    want, _ = by_segments(q, k, v, ours.gate, 3, delta=options.get("delta", False), freqs=w)
    close(ours(x), ours.o_proj(want.transpose(1, 2).flatten(2)))


def test_segments_can_end_early() -> None:
    """`closed` after each of three segments of the caller's lengths, padded to the longest."""
    ours, x = layer(segment=6, gate_init=0.2), normal(1, 2, 15, 8)
    lengths, n, state, outs = torch.tensor([[4, 6, 5], [6, 2, 3]]), [0, 0], ours.init_state(2, 15), []
    for s in range(3):
        part = torch.zeros(2, 6, 8, dtype=torch.float64)
        real = torch.arange(6) < lengths[:, s, None]
        for b in range(2):
            part[b, : lengths[b, s]] = x[b, n[b] : n[b] + lengths[b, s]]
            n[b] += int(lengths[b, s])
        out, state = ours.step(part, state, mask=real)
        state = state.closed()
        outs.append((out, real))
    for b in range(2):
        q, k, v = ours.split(x[b : b + 1, : n[b]], x)
        past, at = None, 0
        for s in range(3):
            end = at + int(lengths[b, s])
            w = frequencies(4, 10000.0, x.device)
            want, past = naive.attend(*(z[:, :, at:end] for z in (q, k, v)), ours.gate, past, freqs=w)
            close(outs[s][0][b][outs[s][1][b]], ours.merge(want)[0])
            at = end
        close(state.sums[b, ..., :-1], past[0][0])


def test_a_fact_of_segments_ago() -> None:
    """Its key asks three segments later; what is there tells the value only where the gate lets the memory speak."""
    C, told = 4, []
    for gate in (-20.0, 20.0):
        ours, x = layer(segment=C, gate_init=gate), normal(1, 1, 4 * C, 8)
        other = x.clone()
        other[:, 1] = 2 * x[:, 1]
        told.append(float((ours(x) - ours(other))[:, 3 * C :].abs().max().detach()))
        state, sizes = ours.init_state(1, 100), []
        for piece in x.repeat(1, 2, 1).split(C, 1):
            _, state = ours.step(piece, state)
            sizes.append(sum(z.numel() for z in state))
        assert len(set(sizes)) == 1, "the state has one size from the first segment on"
    assert told[0] > 1e-3
    assert told[1] < 1e-6


def test_delta_writes_what_is_new_alone() -> None:
    """A segment that comes again, of one key and value, adds nothing to M; without delta it adds itself."""
    k, v = normal(1, 1, 1, 1, 4).expand(1, 1, 6, 4), normal(2, 1, 1, 1, 4).expand(1, 1, 6, 4)
    gate = torch.zeros(1).double()
    for delta in (True, False):
        first, second = (
            infini_attention(
                k[:, :, :n], k[:, :, :n], v[:, :, :n], gate, segment=3, delta=delta, state=start(1, 1, 4, 4)
            )[1]
            for n in (3, 6)
        )
        ratio = float(second.sums[..., :-1].norm() / first.sums[..., :-1].norm())
        assert ratio == pytest.approx(1 if delta else 2)
        close(second.sums[..., -1], 2 * first.sums[..., -1])


def test_starting_values_and_refusals() -> None:
    ours = regard.create("infini", dim=8, num_heads=2, causal=True)
    assert ours.gate.tolist() == [10, 10]
    assert (ours.segment, ours.delta, ours.norm_weight, ours.q_proj.bias) == (2048, False, None, None)
    assert torch.equal(Infini(8, 2, causal=True, pre_norm=True).norm_weight, torch.ones(8))
    for options, words in (
        ({"segment": 0}, "Infini: segment is too small"),
        ({"rotary_base": 1.0}, "Infini: rotary_base is out of range"),
        ({"head_dim": 3}, "Infini: head_dim is no multiple of pair = 2"),
        ({"causal": False}, "Infini: causal is off"),
    ):
        with pytest.raises(ValueError, match=words):
            Infini(8, 2, **{"causal": True, **options})
    for option in ("delta", "pre_norm"):
        with pytest.raises(TypeError, match=option):
            Infini(8, 2, causal=True, **{option: 1})
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="infini_attention: gate"):
        infini_attention(x, x, x, torch.zeros(3))
    with pytest.raises(ValueError, match="infini_attention: segment"):
        infini_attention(x, x, x, torch.zeros(2), segment=0)
