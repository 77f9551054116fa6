"""Forgetting attention against loops, whose author read neither code nor tests, and the numbers of another library."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from naive import linear, may, softmax
from positions.naive import close
from positions.naive import rows as whole_matrix
from regard import masks
from regard.positions.forgetting import ForgetGate, Forgetting, forget_bias

VECTORS = Path(__file__).parents[1] / "vectors" / "forget_gates.npz"


def log_gate(x: Tensor, wf: Tensor, bf: Tensor) -> Tensor:
    """x (B, T, M) -> log forget gates (B, T, H)."""
    return torch.stack([torch.stack([torch.nn.functional.logsigmoid(linear(t, wf, bf)) for t in row]) for row in x])


def oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_forget: Tensor,
    window: int | None = None,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q (B, T, H, D), k (B, T, G, D), v (B, T, G, V), log_forget (B, T, H) -> out (B, T, H, V), weights (B, H, T, T).

    The bias of (i, j) is the sum of log_forget over j < t <= i, added up anew for every pair: no inf - inf. A key
    behind a gate of zero (log -inf) is left out. Keys of a window: i - window + 1 .. i.
    """
    batch, length, heads, d = q.shape
    share = heads // k.shape[2]
    outs, ws = [], []
    for b in range(batch):
        for h in range(heads):
            g = h // share
            for i in range(length):
                seen, logits = [], []
                for j in range(i + 1):
                    if not may(allowed, b, i, j) or (window is not None and j <= i - window):
                        continue
                    bias = torch.zeros((), dtype=q.dtype)
                    for t in range(j + 1, i + 1):
                        bias = bias + log_forget[b, t, h]
                    if float(bias.detach()) == -math.inf:
                        continue
                    seen.append(j)
                    logits.append((q[b, i, h] * k[b, j, g]).sum() / math.sqrt(d) + bias)
                row, y = [torch.zeros((), dtype=q.dtype)] * length, torch.zeros(v.shape[3], dtype=q.dtype)
                for w, j in zip(softmax(logits) if seen else [], seen, strict=True):
                    row[j] = w
                    y = y + w * v[b, j, g]
                outs.append(y)
                ws.append(torch.stack(row))
    return (
        torch.stack(outs).reshape(batch, heads, length, -1).transpose(1, 2),
        torch.stack(ws).reshape(batch, heads, length, length),
    )


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def built(**options: Any) -> regard.Attention:
    layer = regard.create("forgetting", **{"dim": 6, "num_heads": 2, "causal": True, **options}).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(normal(n, *p.shape))
    return layer


def attended(q: Tensor, k: Tensor, v: Tensor, log_forget: Tensor, window: int | None = None) -> Tensor:
    """The bias in `regard.attention`, as (B, H, T, T); q, k, v (B, T, heads, width)."""
    at = torch.arange(q.shape[1])
    mask = masks.causal() if window is None else masks.causal() & masks.window(window)
    bias = forget_bias(log_forget.transpose(1, 2), at, at)
    return regard.attention(*(z.transpose(1, 2) for z in (q, k, v)), bias=bias, mask=mask).transpose(1, 2)


def test_gives_the_numbers_of_flash_linear_attention() -> None:
    with np.load(VECTORS) as file:
        z = {n.removeprefix("f_"): torch.from_numpy(file[n]) for n in file}
    leaves = {n: z[n].clone().requires_grad_() for n in ("q", "k", "v", "log_forget")}
    for function in (attended, lambda *given: oracle(*given)[0]):
        out = function(*leaves.values())
        close(out.detach(), z["out"])
        grads = torch.autograd.grad((out * z["w"]).sum(), list(leaves.values()))
        for name, got in zip(leaves, grads, strict=True):
            close(got, z["g" + name])
    close(attended(*leaves.values(), window=3).detach(), z["out_window3"])


@pytest.mark.parametrize("kernel", ["auto", "eager", "chunked"])
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 1, "qk_norm": True, "output_gate": True}], ids=str)
def test_the_layer_equals_loops(kernel: str, options: dict[str, Any]) -> None:
    """With padding, in the middle too, and gradients of all there is."""
    layer = built(kernel=kernel, **options)
    x, keep = normal(7, 2, 5, 6).requires_grad_(), torch.tensor([[True] * 5, [False, True, True, False, True]])
    p = dict(layer.named_parameters())
    q, k, v = (torch.stack([torch.stack([linear(t, p[f"{n}_proj.weight"]) for t in row]) for row in x]) for n in "qkv")
    q, k, v = (z.unflatten(-1, (-1, 3)) for z in (q, k, v))
    if options:
        q, k = (
            z / torch.sqrt((z * z).mean(-1, keepdim=True) + 1e-5) * p[f"heads.{n}_weight"]
            for n, z in (("q", q), ("k", k))
        )
    hidden = torch.where(keep[..., None], log_gate(x, p["position.gate.weight"], p["position.gate.bias"]), 0.0)
    o = oracle(q, k, v, hidden, allowed=keep[:, None].expand(2, 5, 5))[0].flatten(2)
    if options:
        o = o * torch.sigmoid(x @ p["gate.proj.weight"].T)
    want = o @ p["o_proj.weight"].T
    leaves = [x, *layer.parameters()]
    got = layer(x, mask=masks.padding(keep))
    weights = normal(9, 2, 5, 6) * keep[..., None]
    close(got[keep].detach(), want[keep].detach())
    for a, b in zip(
        torch.autograd.grad((got * weights).sum(), leaves), torch.autograd.grad((want * weights).sum(), leaves)
    ):
        close(a, b)


def test_learns_to_forget_at_separators() -> None:
    """The share of ones among the tokens since the last separator, which no softmax without gates can tell."""
    torch.manual_seed(0)
    layer = regard.create("forgetting", dim=3, num_heads=1, causal=True)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(150):
        kinds = torch.multinomial(torch.tensor([0.45, 0.45, 0.1]), 32 * 24, replacement=True).view(32, 24)
        segment = (kinds == 2).cumsum(1)
        same = ((segment[:, :, None] == segment[:, None]) & torch.ones(24, 24).tril().bool()).float()
        want = (same @ (kinds == 1).float()[..., None])[..., 0] / same.sum(-1)
        loss = (layer(torch.nn.functional.one_hot(kinds, 3).float())[..., 0] - want).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.003
    zero, one, separator = layer.position.gate(torch.eye(3)).sigmoid()[:, 0].tolist()
    assert separator < 0.1 < 0.9 < min(zero, one)


def test_constant_gates_are_alibi() -> None:
    """log f = -slope, which trained biases give without weights."""
    layer, other = built(num_heads=2), regard.create("alibi", dim=6, num_heads=2, causal=True).double()
    other.load_state_dict({n: p for n, p in layer.state_dict().items() if "position" not in n}, strict=False)
    with torch.no_grad():
        layer.position.gate.weight.zero_()
        slopes = torch.tensor([2.0**-4, 2.0**-8], dtype=torch.float64)
        layer.position.gate.bias.copy_(-torch.expm1(slopes).log())  # sigmoid(b) = exp(-slope)
    x = normal(3, 2, 9, 6)
    close(layer(x).detach(), other(x).detach())


def test_open_gates_are_plain_softmax_and_closed_ones_forget_all() -> None:
    layer, x = built(), normal(3, 2, 9, 6)
    plain = regard.create("softmax", dim=6, num_heads=2, causal=True).double()
    plain.load_state_dict({n: p for n, p in layer.state_dict().items() if "position" not in n})
    assert layer.position.start_neutral()
    close(layer(x).detach(), plain(x).detach(), atol=1e-2)
    with torch.no_grad():
        layer.position.gate.bias.fill_(math.inf)
    close(layer(x).detach(), plain(x).detach())
    with torch.no_grad():
        layer.position.gate.bias.fill_(-math.inf)  # log f = -inf: nothing becomes NaN, gradients neither
    out = layer(x)
    close(out.detach(), layer.o_proj(layer.v_proj(x)).detach())
    out.sum().backward()
    assert layer.q_proj.weight.grad.isfinite().all()


def test_long_sequences_lose_no_digits() -> None:
    """Near the end of 20,000 tokens the biases of a query's neighbours are those of a short sequence, in float32."""
    log_forget = torch.full((1, 1, 20_000), -0.7)
    i, j = torch.arange(19_990, 20_000), torch.arange(20_000)
    got = forget_bias(log_forget, i, j)[0, 0, :, -10:]
    assert torch.equal(got, forget_bias(log_forget[..., :10], j[:10], j[:10])[0, 0])


@pytest.mark.parametrize("output_gate", [False, True])
def test_streams(output_gate: bool) -> None:
    layer = built(num_kv_heads=1, qk_norm=True, output_gate=output_gate)
    x, keep = normal(5, 2, 8, 6), torch.tensor([[True] * 8, [False, False, True, True, False, True, True, True]])
    state, outs = layer.init_state(2, 8), []
    for start, stop in ((0, 3), (3, 4), (4, 5), (5, 8)):
        y, state = layer.step(x[:, start:stop], state, mask=masks.padding(keep[:, :stop]))
        outs.append(y)
    close(torch.cat(outs, 1), layer(x, mask=masks.padding(keep)))
    assert state.buffers["made.position"].shape == (2, 2, 8, 1), "a number for each head and token"


def test_starts_as_the_authors_layers_do() -> None:
    gate = regard.create("forgetting", dim=64, num_heads=16, causal=True).position.gate
    assert isinstance(gate, ForgetGate)
    assert not gate.bias.any()
    assert 0.018 < gate.weight.std() < 0.022
    parts = regard.create("forgetting", dim=8, num_heads=2, causal=True)
    assert parts.heads is None
    assert parts.gate is None


def test_refusals() -> None:
    z = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"Forgetting: rows holds nothing made of the tokens \(got None\)"):
        Forgetting(8, 2).bias(whole_matrix(z, z))
    with pytest.raises(ValueError, match="does not support bidirectional"):
        regard.create("forgetting", dim=8, num_heads=2)
    with pytest.raises(TypeError, match=r"qk_norm has the wrong type \(got 1\)"):
        regard.create("forgetting", dim=8, num_heads=2, causal=True, qk_norm=1)
    with pytest.raises(ValueError, match="num_heads"):
        ForgetGate(8, 0)
