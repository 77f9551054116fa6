"""Threshold relative attention against loops, whose author saw the equations alone, and the authors' numbers (B084)."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from positions.naive import close
from positions.naive import rows as whole_matrix
from regard import masks
from regard.positions.tra import SurvivorsSoftmax, ThresholdRelative, UnitRMS, surviving_distances, threshold_relative
from regard.stages import HeadMap

VECTORS = Path(__file__).parents[1] / "vectors" / "B084.npz"


def linear(vector: Tensor, W: Tensor, bias: Tensor | None = None) -> Tensor:
    out = torch.stack([sum(W[o, m] * vector[m] for m in range(W.shape[1])) for o in range(W.shape[0])])
    return out if bias is None else out + bias


def rms(vector: Tensor, eps: float = 1e-6) -> Tensor:
    return vector / torch.sqrt(sum(c * c for c in vector) / vector.shape[0] + eps)


def heads(x: Tensor, W: Tensor, H: int) -> list[list[list[Tensor]]]:
    """x[b][t] projected and cut: [b][h][t] vectors of D."""
    D = W.shape[0] // H
    full = [[linear(x[b, t], W) for t in range(x.shape[1])] for b in range(x.shape[0])]
    return [[[full[b][t][h * D : (h + 1) * D] for t in range(x.shape[1])] for h in range(H)] for b in range(x.shape[0])]


def softmax_alive(logits: list[Tensor], alive: list[bool]) -> list[Tensor]:
    live = [a for a, on in zip(logits, alive, strict=True) if on]
    if not live:
        return [a.new_zeros(()) for a in logits]
    top = max(float(a.detach()) for a in live)
    total = sum(torch.exp(a - top) for a in live)
    return [torch.exp(a - top) / total if on else a.new_zeros(()) for a, on in zip(logits, alive, strict=True)]


def weights(
    x: Tensor,
    W_q: Tensor,
    W_k: Tensor,
    W_delta: Tensor,
    b_delta: Tensor,
    allowed: Tensor,
    variant: str = "tra",
    threshold: float = 0.0,
) -> Tensor:
    """p[b][h][i][j]; variant "tra", "threshold_only" or "distance_only"; allowed (B, T, T)."""
    B, T, M = x.shape
    H = W_delta.shape[0]
    D = W_q.shape[0] // H
    q, k = heads(x, W_q, H), heads(x, W_k, H)
    out = torch.zeros(B, H, T, T, dtype=x.dtype)
    for b, h, i in np.ndindex(B, H, T):
        qi, ks = rms(q[b][h][i]), [rms(c) for c in k[b][h]]
        s = [sum(qi[d] * ks[j][d] for d in range(D)) / math.sqrt(D) for j in range(T)]
        seen = [bool(allowed[b, i, j]) for j in range(T)]
        alive = seen
        if variant != "distance_only":
            alive = [seen[j] and bool(s[j].detach() > threshold) for j in range(T)]
        rate = torch.nn.functional.logsigmoid(sum(W_delta[h, m] * x[b, i, m] for m in range(M)) + b_delta[h])
        logits = []
        for j in range(T):
            distance = sum(1 for n in range(j, T) if alive[n])
            logits.append(s[j] if variant == "threshold_only" else s[j] + rate * distance)
        out[b, h, i] = torch.stack(softmax_alive(logits, alive))
    return out


def oracle(x: Tensor, p: dict[str, Tensor], H: int, allowed: Tensor, variant: str = "tra", **more: Any) -> Tensor:
    """concat_h(p v) W_o^T + b_o."""
    W_delta = p.get("position.rate_proj.weight", torch.zeros(H, x.shape[2], dtype=x.dtype))
    b_delta = p.get("position.rate_proj.bias", torch.zeros(H, dtype=x.dtype))
    v = heads(x, p["v_proj.weight"], H)
    a = weights(x, p["q_proj.weight"], p["k_proj.weight"], W_delta, b_delta, allowed, variant, **more)
    out = []
    for b, i in np.ndindex(*x.shape[:2]):
        mixed = torch.cat([sum(a[b, h, i, j] * v[b][h][j] for j in range(x.shape[1])) for h in range(H)])
        out.append(linear(mixed, p["o_proj.weight"], p.get("o_proj.bias")))
    return torch.stack(out).view(x.shape)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def built(seed: int = 0, **options: Any) -> regard.Attention:
    layer = regard.create("tra", **{"dim": 6, "num_heads": 2, "causal": True, **options}).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(normal(100 * seed + n, *p.shape))
    return layer


def repeated(layer: regard.Attention) -> dict[str, Tensor]:
    """Parameters, with a row of keys and values for each query head."""
    found = dict(layer.named_parameters())
    for name in ("k_proj.weight", "v_proj.weight"):
        split = found[name].unflatten(0, (layer.num_kv_heads, -1))
        found[name] = split.repeat_interleave(layer.num_heads // layer.num_kv_heads, 0).flatten(0, 1)
    return found


VARIANTS = {
    "tra": {},
    "threshold_only": {"decay": False},
    "distance_only": {"threshold": None},
    "higher": {"threshold": 0.3},
}


@pytest.mark.parametrize("kernel", ["auto", "eager", "chunked"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_loops(name: str, causal: bool, kernel: str) -> None:
    """With padding, two query heads to a key head, and gradients of all there is."""
    layer = built(causal=causal, num_kv_heads=1, kernel=kernel, **VARIANTS[name])
    x, keep = normal(7, 2, 5, 6).requires_grad_(), torch.tensor([[True] * 5, [False, True, True, False, True]])
    allowed = keep[:, None].expand(2, 5, 5)
    allowed = allowed.tril() if causal else allowed
    more = {"threshold": 0.3} if name == "higher" else {}
    want = oracle(
        x, repeated(layer), 2, allowed, name if name in ("threshold_only", "distance_only") else "tra", **more
    )
    got = layer(x, mask=masks.padding(keep))
    close(got.detach(), want.detach())
    leaves, w = [x, *layer.parameters()], normal(8, 2, 5, 6)
    for ours, theirs in zip(
        torch.autograd.grad((got * w).sum(), leaves), torch.autograd.grad((want * w).sum(), leaves), strict=True
    ):
        close(ours, theirs)


class Float32RMS(HeadMap):
    """As the notebook computes it, whatever the inputs are; vector by vector, so that float32 rounds alike."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.normed(q), self.normed(k), v

    def normed(self, z: Tensor) -> Tensor:
        found = []
        for vector in z.flatten(0, 2).float():
            found.append(vector * torch.rsqrt(vector.pow(2).mean(-1, keepdim=True) + 1e-6))
        return torch.stack(found).view(z.shape).to(z.dtype)


@pytest.mark.parametrize("case", ["main", "empty_rows"])
@pytest.mark.parametrize("float32", [True, False])
def test_gives_the_authors_numbers(case: str, float32: bool) -> None:
    """Their norm and sqrt(D) are of float32; with such a norm in its place, ours are the same to 1e-10."""
    with np.load(VECTORS) as file:
        z = {k.removeprefix(f"{case}_"): torch.from_numpy(file[k]) for k in file if k.startswith(f"{case}_")}
    H, M = z["w_delta"].shape
    layer = regard.create("tra", dim=M, num_heads=H, causal=True).double()
    named = {f"{n}_proj.weight": z[f"w_{n}"] for n in "qkvo"}
    layer.load_state_dict(named | {"position.rate_proj.weight": z["w_delta"], "position.rate_proj.bias": z["b_delta"]})
    layer.o_proj.bias = torch.nn.Parameter(z["b_o"])
    if float32:
        layer.heads, layer.scale = Float32RMS(), 1 / float(torch.tensor(float(M // H)).sqrt())
    x = z["x"].requires_grad_()
    out = layer(x)
    given = [x, layer.position.rate_proj.weight, layer.q_proj.weight]
    found = [out.detach(), *torch.autograd.grad((out * z["w"]).sum(), given)]
    for got, name in zip(found, ("out", "grad_x", "grad_w_delta", "grad_w_q"), strict=True):
        close(got, z[name], atol=1e-10 if float32 else 1e-6)


def test_weight_falls_with_the_count_of_what_stays() -> None:
    """sigma^c exp(s) / sum, key by key, for a row whose scores are given."""
    scores = torch.tensor([[[[1.0, -2.0, 0.5, 0.0, 2.0, 0.25]]]], dtype=torch.float64)
    rate = torch.tensor([[[[-0.7]]]], dtype=torch.float64)
    got = (scores + threshold_relative(scores, rate)).softmax(-1)[0, 0, 0]
    raw = [math.exp(1.0 - 0.7 * 4), 0, math.exp(0.5 - 0.7 * 3), 0, math.exp(2.0 - 0.7 * 2), math.exp(0.25 - 0.7)]
    close(got, torch.tensor(raw, dtype=torch.float64) / sum(raw))
    assert surviving_distances(scores > 0, torch.float64).tolist() == [[[[4, 3, 3, 2, 2, 1]]]]


def test_a_score_at_the_threshold_is_removed_and_nan_is_not() -> None:
    scores = torch.tensor([0.0, 0.5, 0.25, math.nan])
    for threshold, gone in ((0.0, [True, False, False, False]), (0.25, [True, False, True, False])):
        added = threshold_relative(scores.view(1, 1, 1, 4), None, threshold=threshold)
        assert (added == -math.inf).flatten().tolist() == gone


def test_a_row_without_survivors_is_zero_with_zero_gradient() -> None:
    layer = built()
    with torch.no_grad():
        layer.k_proj.weight.copy_(-layer.q_proj.weight)
    x = normal(3, 1, 1, 6).requires_grad_()
    out = layer(x)
    grads = torch.autograd.grad(out.sum(), [x, *layer.parameters()])
    assert torch.equal(out, torch.zeros_like(out))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_irrelevant_tokens_in_between_change_nothing() -> None:
    """A query of positive channels has scores below 0 with tokens of negative ones; only ten of the others stay."""
    layer = regard.create("tra", dim=8, num_heads=2, causal=True).double()
    with torch.no_grad():
        layer.q_proj.weight.copy_(torch.eye(8))
        layer.k_proj.weight.copy_(torch.eye(8))
    few = normal(1, 1, 10, 8).abs()
    want = layer(few)[:, -1]
    for n in (1, 7, 300):
        among = torch.cat(
            [few[:, :4], -normal(n, 1, n, 8).abs(), few[:, 4:8], -normal(2, 1, n, 8).abs(), few[:, 8:]], 1
        )
        close(layer(among)[:, -1].detach(), want.detach(), atol=1e-12)
    apart = torch.cat([few[:, :4], few[:, 4:5], few[:, 4:]], 1)
    assert (layer(apart)[:, -1] - want).abs().max() > 1e-4, "what stays does count"


def test_distance_goes_by_what_stays() -> None:
    """Equal keys: each survivor in between takes a constant share of the weight, whatever the query's place."""
    layer = regard.create("tra", dim=2, num_heads=1, causal=True).double()
    with torch.no_grad():
        for proj in (layer.q_proj, layer.k_proj):
            proj.weight.copy_(torch.eye(2))
        layer.position.rate_proj.weight.zero_()
        layer.position.rate_proj.bias.fill_(0.3)
    x = torch.tensor([[[1.0, 1.0], [-1.0, -1.0], [1.0, 1.0], [1.0, 1.0]]], dtype=torch.float64)
    q, k, _ = layer.heads(*(x[:, None] for _ in range(3)))
    made = layer.position.prepare(regard.stages.Tokens(x, x, torch.arange(4), layer.q_proj, layer.k_proj, layer.v_proj))
    rate = made.query[0, 0, -1, 0]
    close(rate, torch.tensor(0.3, dtype=torch.float64).sigmoid().log())
    added = threshold_relative(q @ k.mT, made.query)[0, 0, -1]
    close(added[[0, 2, 3]], rate * torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    assert added[1] == -math.inf


@pytest.mark.parametrize("name", VARIANTS)
def test_streams(name: str) -> None:
    layer = built(num_kv_heads=1, **VARIANTS[name])
    x, keep = normal(5, 2, 8, 6), torch.tensor([[True] * 8, [False, False, True, True, False, True, True, True]])
    state, outs = layer.init_state(2, 8), []
    for start, stop in ((0, 3), (3, 4), (4, 5), (5, 8)):
        y, state = layer.step(x[:, start:stop], state, mask=masks.padding(keep[:, :stop]))
        outs.append(y)
    close(torch.cat(outs, 1), layer(x, mask=masks.padding(keep)))


def test_hidden_keys_are_not_counted() -> None:
    layer, x, keep = built(), normal(6, 1, 6, 6), torch.tensor([[True, True, False, True, False, True]])
    out = layer(x, mask=masks.padding(keep))
    changed = x.masked_fill(~keep[..., None], math.nan)
    assert torch.equal(out[keep], layer(changed, mask=masks.padding(keep))[keep])
    close(out[keep], layer(x[:, keep[0]])[0])


def test_starts_as_torchs_linear_layers_do() -> None:
    layer = regard.create("tra", dim=64, num_heads=16)
    rate = layer.position.rate_proj
    assert isinstance(rate, torch.nn.Linear)
    assert rate.weight.shape == (16, 64)
    assert rate.bias is not None
    for p in (rate.weight, rate.bias):
        assert p.abs().max() <= 1 / 8
        assert p.abs().max() > 1 / 16
    before = rate.weight.clone()
    layer.position.reset_parameters()
    assert not torch.equal(before, rate.weight)
    assert not list(layer.heads.parameters())
    bare = regard.create("tra", dim=8, num_heads=2, decay=False)
    assert {name for name, _ in bare.named_parameters()} == {f"{n}_proj.weight" for n in "qkvo"}


def test_parts_alone() -> None:
    """What is added without a decay; softmax of nothing but -inf; the norm."""
    q, k, v = (normal(n, 1, 2, 5, 4) for n in range(3))
    added = ThresholdRelative(8, 2, decay=False).bias(whole_matrix(q, k))
    assert torch.equal(added, torch.where(q @ k.mT / 2 > 0, 0.0, -math.inf).double())
    none = torch.full((1, 1, 2, 3), -math.inf)
    assert torch.equal(SurvivorsSoftmax()(none), torch.zeros_like(none))
    q, _, _ = UnitRMS()(q, k, v)
    close(q.square().mean(-1), torch.ones(1, 2, 5, dtype=torch.float64), atol=1e-4)


def test_refusals() -> None:
    z = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"ThresholdRelative: rows holds nothing made of the tokens \(got None\)"):
        ThresholdRelative(8, 2).bias(whole_matrix(z, z))
    with pytest.raises(ValueError, match=r"threshold is out of range \(got nan\); expected a finite number"):
        regard.create("tra", dim=8, num_heads=2, threshold=math.nan)
    with pytest.raises(TypeError, match=r"decay has the wrong type \(got 1\)"):
        regard.create("tra", dim=8, num_heads=2, decay=1)
    with pytest.raises(ValueError, match="dim"):
        ThresholdRelative(0, 2)
