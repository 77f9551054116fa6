"""Threshold relative attention against loops over every entry, written from the equations alone, and the authors'
numbers (B084), whose norm and root of D are float32."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from positions.naive import close
from regard import masks

VECTORS = Path(__file__).parents[1] / "vectors" / "B084.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def normed(z: Tensor) -> Tensor:
    return z / ((z * z).sum(-1, keepdim=True) / z.shape[-1] + 1e-6).sqrt()


def oracle(q: Tensor, k: Tensor, v: Tensor, delta: Tensor, keep: Tensor, parts: str = "both") -> Tensor:
    """q, k, v (B, H, T, D) with their norms; delta (B, H, T) = log sigmoid of the query; keep (B, T) = real keys."""
    B, H, T, D = q.shape
    out = torch.zeros(B, H, T, v.shape[-1], dtype=q.dtype)
    for b, h, i in np.ndindex(B, H, T):
        keys = [j for j in range(i + 1) if keep[b, j]]
        s = {j: float(q[b, h, i] @ k[b, h, j]) / math.sqrt(D) for j in keys}
        alive = keys if parts == "distance" else [j for j in keys if s[j] > 0]
        e = {}
        for j in alive:
            c = 0 if parts == "threshold" else sum(1 for other in alive if j <= other <= i)
            e[j] = math.exp(s[j] + float(delta[b, h, i]) * c)
        for j in alive:
            out[b, h, i] += e[j] / sum(e.values()) * v[b, h, j]
    return out


class InFloat32(nn.Module):
    """The norm as the authors' notebook computes it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (z * torch.rsqrt(z.pow(2).mean(-1, keepdim=True) + 1e-6) for z in (q.float(), k.float()))
        return q.to(v.dtype), k.to(v.dtype), v


@pytest.mark.parametrize("case", ["main", "empty_rows"])
@pytest.mark.parametrize("single", [True, False])
def test_gives_the_authors_numbers(case: str, single: bool) -> None:
    with np.load(VECTORS) as file:
        z = {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case + "_")}
    (H, M), D = z["w_delta"].shape, z["w_q"].shape[0] // len(z["w_delta"])
    layer = regard.create("tra", dim=M, num_heads=H, causal=True).double()
    if single:
        layer.heads.forward = InFloat32().forward
        layer.scale = 1 / float(torch.tensor(float(D)).sqrt())
    own = {f"{n}_proj.weight": z[f"w_{n}"] for n in "qkvo"}
    own |= {"position.proj.weight": z["w_delta"], "position.proj.bias": z["b_delta"]}
    layer.load_state_dict(own)
    x = z["x"].clone().requires_grad_()
    out = layer(x) + z["b_o"]
    (out * z["w"]).sum().backward()
    atol = 1e-10 if single else 1e-5  # the norm's own last digits
    close(out.detach(), z["out"], atol=atol)
    close(x.grad, z["grad_x"], atol=atol)
    close(layer.position.proj.weight.grad, z["grad_w_delta"], atol=atol)
    close(layer.q_proj.weight.grad, z["grad_w_q"], atol=atol)
    q, k, v = ((z["x"] @ z[f"w_{n}"].T).unflatten(-1, (H, D)).transpose(1, 2) for n in "qkv")
    q, k, _ = InFloat32()(q, k, v)
    delta = nn.functional.logsigmoid(z["x"] @ z["w_delta"].T + z["b_delta"]).mT
    loops = oracle(q, k, v, delta, torch.ones(x.shape[:2], dtype=torch.bool))
    close(loops.transpose(1, 2).flatten(2) @ z["w_o"].T + z["b_o"], z["out"], atol=1e-6)  # its root of D is not float32


def randomised(**options: object) -> nn.Module:
    layer = regard.create("tra", dim=12, num_heads=4, num_kv_heads=2, causal=True, **options).double()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.7 * normal(n, *p.shape))
    return layer


@pytest.mark.parametrize("parts", ["both", "threshold", "distance"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_layer_and_its_steps_equal_the_formula(parts: str, padded: bool) -> None:
    layer, x = randomised(parts=parts), normal(20, 2, 8, 12)
    keep = torch.ones(2, 8, dtype=torch.bool)
    if padded:
        keep[0, :2] = keep[1, 3] = keep[1, 7] = False
    mask = masks.padding(keep) if padded else None
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    q, k, v = (proj(x).detach().unflatten(-1, (-1, 3)).transpose(1, 2) for proj in projections)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    p = {n: value.detach() for n, value in layer.named_parameters()}
    delta = torch.zeros(2, 4, 8)
    if parts != "threshold":
        delta = -torch.log(1 + torch.exp(-(x @ p["position.proj.weight"].T + p["position.proj.bias"]))).mT
    want = oracle(normed(q), normed(k), v, delta, keep, parts).transpose(1, 2).flatten(2) @ p["o_proj.weight"].T
    close(layer(x, mask=mask).detach(), want)
    state, outs = layer.init_state(2, 8), []
    for piece in x.split([1, 3, 1, 3], 1):
        out, state = layer.step(piece, state, mask=mask)
        outs.append(out.detach())
    close(torch.cat(outs, 1), want)


def test_keys_that_do_not_matter_change_nothing() -> None:
    """However many stand between a query and what it looks for, even what distance does stays as it was."""
    layer = regard.create("tra", dim=6, num_heads=1, causal=True).double()
    with torch.no_grad():
        for p in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
            p.weight.copy_(torch.eye(6))
    near = 0.5 * normal(3, 1, 5, 6)
    near[..., 0] = 3.0
    other = normal(4, 1, 50, 6) * 0.2
    other[..., 0] = -2.0
    short = layer(near).detach()[:, -1]
    long = layer(torch.cat([near[:, :2], other, near[:, 2:4], other, near[:, 4:]], 1)).detach()[:, -1]
    close(long, short, atol=1e-14)
    with torch.no_grad():
        layer.position.proj.bias.sub_(2.0)
    assert (layer(near).detach()[:, -1] - short).abs().max() > 1e-3, "distance counts"


def test_rows_without_a_key_are_zero_with_no_gradient() -> None:
    layer = randomised()
    with torch.no_grad():
        one = normal(6, 3, 12)
        layer.q_proj.weight.copy_(one.repeat(4, 1))
        layer.k_proj.weight.copy_(-one.repeat(2, 1))
    x = normal(5, 1, 1, 12).requires_grad_()
    out = layer(x)
    assert not out.any()
    out.sum().backward()
    assert not x.grad.any()
