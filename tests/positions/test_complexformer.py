"""ComplexFormer against loops, whose author saw a summary only (naive_complexformer.py), and EulerFormer's numbers."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from positions import naive_complexformer as naive
from regard import masks
from regard.laws.agreement import close
from regard.positions.complexformer import EulerRotary, euler_transform, phase_contrast
from regard.positions.rotary import Rotary

VECTORS = Path(__file__).parents[1] / "vectors" / "complexformer.npz"
M, H, D = 12, 2, 6


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(seed: int = 0, dim: int = M, heads: int = H, **options) -> regard.Attention:
    made = regard.create("complexformer", dim=dim, num_heads=heads, **options).double().eval()
    with torch.no_grad():
        for n, p in enumerate(made.parameters()):
            p.copy_(0.6 * normal(100 * seed + n, *p.shape))
        made.position.delta.add_(1)
    return made


def oracle(made: regard.Attention, x: Tensor, **given) -> Tensor:
    part, weights = made.position, {f"W{n}": getattr(made, f"{n}_proj").weight for n in "qkvo"}
    delta, b = (None if z is None else z[:, 0] if z.shape[1] == 1 else z for z in (part.delta, part.b))
    pairing = "interleaved" if part.interleaved else "half"
    return naive.attention(
        x, **weights, delta=delta, b=b, num_heads=made.num_heads, theta=part.base, pairing=pairing, **given
    )


def same_gradients(got: Tensor, want: Tensor, of: list[Tensor]) -> None:
    g = normal(99, *got.shape)
    for mine, theirs in zip(*(torch.autograd.grad((o * g).sum(), of) for o in (got, want)), strict=True):
        close(mine, theirs, "gradient")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("options", [{}, {"per_feature": True}, {"shift": False, "base": 50.0}], ids=str)
def test_is_the_definition(options: dict, interleaved: bool) -> None:
    made, x = layer(interleaved=interleaved, **options), normal(1, 2, 4, M).requires_grad_()
    allowed = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(3)) < 0.6
    allowed[0, 1] = False
    where = torch.tensor([[0, 1, 2, 3], [5, 6, 8, 9]])
    got = made(x, mask=allowed[:, None], positions=where)
    want = oracle(made, x, allowed=allowed, positions=where)
    close(got, want, "out")
    same_gradients(got, want, [x, *made.parameters()])


def test_attends_to_other_tokens() -> None:
    made, x, context = layer(), normal(1, 2, 3, M).requires_grad_(), normal(2, 2, 5, M).requires_grad_()
    given = {"positions": torch.arange(2, 5), "context_positions": torch.arange(5)}
    got, want = made(x, context), oracle(made, x, context=context, **given)
    close(got, want, "out")
    same_gradients(got, want, [x, context, *made.parameters()])


@pytest.mark.parametrize("case", ["a_", "b_", "c_"])
def test_gives_eulerformers_numbers(case: str) -> None:
    with np.load(VECTORS) as file:
        z = {k.removeprefix(case): torch.from_numpy(file[k]) for k in file if k.startswith(case)}
    q, k, v = (z[n].requires_grad_() for n in "qkv")
    heads, width = q.shape[1], q.shape[3]
    part = EulerRotary(width, heads, interleaved=True, shift="b" in z).double()
    named = dict(part.named_parameters())
    with torch.no_grad():
        for name, p in named.items():
            p.copy_(z[name])
    where = torch.arange(q.shape[2])
    for got, want in zip(part.turn(q, k, where, where), (z["tq"], z["tk"]), strict=True):
        assert (got - want).abs().max() < 1e-10
    out = regard.attention(q, k, v, mask=z.get("mask"), position=part)
    assert (out - z["out"]).abs().max() < 1e-10
    (out * z["w"]).sum().backward()
    for name, p in {"q": q, "k": k, "v": v}.items():
        assert (p.grad - z[f"grad_{name}"]).abs().max() < 1e-10, name
    for name, p in named.items():
        assert (p.grad - z[f"g_{name}"]).abs().max() < 1e-10, name


def test_phase_contrast_gives_eulerformers_numbers() -> None:
    with np.load(VECTORS) as file:
        z = {k.removeprefix("loss_"): torch.from_numpy(file[k]) for k in file if k.startswith("loss_")}
    q, k, w = (z[n].requires_grad_() for n in ("q", "k", "w"))
    phases = [euler_transform(t[:, None], interleaved=True)[1] for t in (q, k)]
    loss = 0.3 * sum(phase_contrast(phi, phi, w, temperature=0.7) for phi in phases)
    assert abs(loss - z["out"]) < 1e-10
    loss.backward()
    for name, p in {"q": q, "k": k, "w": w}.items():
        assert (p.grad - z[f"grad_{name}"]).abs().max() < 1e-10, name


@pytest.mark.parametrize("eps", [0.0, 0.3])
def test_phase_contrast_is_the_definition(eps: float) -> None:
    phi, other, w = normal(1, 2, 2, 4, 3), normal(2, 2, 2, 4, 3), normal(3, 3).exp()
    given = [z.requires_grad_() for z in (phi, other, w)]
    got = phase_contrast(*given, temperature=0.5, eps=eps)
    want = naive.phase_contrast(*given, temperature=0.5, eps=eps)
    close(got, want, "loss")
    same_gradients(got, want, given)


@pytest.mark.parametrize("interleaved", [False, True])
def test_transform_is_the_definition(interleaved: bool) -> None:
    z = normal(1, 1, 2, 3, D)
    z[0, 1, 2, :] = 0
    wanted = naive.euler_transform(z, "interleaved" if interleaved else "half")
    for got, want in zip(euler_transform(z, interleaved=interleaved), wanted, strict=True):
        close(got, want, "transform")


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_starts_as_rotary(interleaved: bool, kv_heads: int) -> None:
    q, k, v = normal(1, 2, H, 5, D), normal(2, 2, kv_heads, 5, D), normal(3, 2, kv_heads, 5, D)
    part = EulerRotary(D, H, num_kv_heads=kv_heads, interleaved=interleaved).double()
    rotary = Rotary(D, interleaved=interleaved)
    close(regard.attention(q, k, v, position=part), regard.attention(q, k, v, position=rotary), "out")
    assert {name: float(p.detach().unique()) for name, p in part.named_parameters()} == {"delta": 1.0, "b": 0.0}
    assert bool((EulerRotary(D, H, init=0.25).delta == 0.25).all())
    shapes = [tuple(p.shape) for p in EulerRotary(D, 4, num_kv_heads=2, per_feature=True).parameters()]
    assert shapes == [(2, 3), (4, 3)]


@torch.no_grad()
def test_without_delta_only_lengths_and_positions_count() -> None:
    """Turning the pairs of all keys changes what rotary and plain attention weigh most, and here nothing."""
    made = layer(causal=True)
    made.position.delta.zero_()
    x, turned = normal(1, 2, 6, M), []
    key = made.k_proj.weight.clone()
    for a in (0.0, 2.0):
        pairs = key.unflatten(0, (H, 2, D // 2))
        first, second = (
            pairs[:, 0] * math.cos(a) - pairs[:, 1] * math.sin(a),
            pairs[:, 0] * math.sin(a) + pairs[:, 1] * math.cos(a),
        )
        made.k_proj.weight.copy_(torch.stack([first, second], 1).flatten(0, 2))
        turned.append(made(x))
    close(turned[1], turned[0], "turned keys")
    made.position.delta.fill_(1)
    assert (made(x) - turned[0]).abs().max() > 1e-3, "with delta = 1 they count"


@torch.no_grad()
def test_distance_alone_counts() -> None:
    made, x = layer(per_feature=True, causal=True), normal(1, 2, 6, M)
    where = torch.arange(6)
    close(made(x, positions=where + 100), made(x, positions=where), "moved")
    made.position.b.add_(1)
    assert (made(x) - made(x, positions=2 * where)).abs().max() > 1e-3


@torch.no_grad()
def test_a_heads_group_reads_one_delta() -> None:
    made, full, x = (layer(dim=24, heads=4, num_kv_heads=2), layer(dim=24, heads=4), normal(1, 2, 5, 24))
    for name, p in full.named_parameters():
        source = made.get_parameter(name)
        groups = source if p.shape == source.shape else source.unflatten(0, (2, -1)).repeat_interleave(2, 0)
        p.copy_(groups.reshape(p.shape))
    close(made(x), full(x), "two heads of keys")


def test_zeros_have_no_gradient_and_tiny_ones_that_of_others() -> None:
    """Turning is as long as what it turns, so that gradients don't depend on lengths."""
    found = {}
    for size in (1.0, 1e-200, 0.0, 1e-310):
        z = (size * normal(4, 1, 1, 1, D)).requires_grad_()
        EulerRotary(D, 1, init=0.5).double().rotate(z, torch.arange(1)).sum().backward()
        found[size] = z.grad
    close(found[1e-200], found[1.0], "of tiny ones")
    assert not found[0.0].any()
    assert not found[1e-310].any()


def test_jumps_at_pi() -> None:
    """A property of the mechanism wherever delta is no whole number."""
    z = torch.tensor([[-1.0, 1e-9], [-1.0, -1e-9]], dtype=torch.float64)[None, None]
    for delta, apart in ((1.0, 2e-9), (2.0, 4e-9), (0.5, 2.0)):
        out = EulerRotary(2, 1, init=delta).double().rotate(z, torch.zeros(2, dtype=torch.long)).detach()
        assert float((out[..., 0, :] - out[..., 1, :]).norm()) == pytest.approx(apart)


def test_steps_equal_the_full_pass() -> None:
    made, x, outs = layer(causal=True, per_feature=True), normal(1, 2, 7, M), []
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[1, :2] = False
    with torch.no_grad():
        want, state = made(x, mask=masks.padding(keep)), made.init_state(2, 7)
        for part in x.split((1, 3, 1, 2), 1):
            out, state = made.step(part, state, mask=masks.padding(keep[:, : state.length + part.shape[1]]))
            outs.append(out)
    close(torch.cat(outs, 1), want, "steps")


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"dim": 6}, "head_dim"),
        ({"base": 1.0}, "base"),
        ({"init": math.nan}, "init"),
        ({"per_feature": 1}, "per_feature"),
    ],
)
def test_refuses(wrong: dict, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        layer(**wrong)


def test_refuses_what_the_loss_cannot_use() -> None:
    phi = normal(1, 1, 2, 4, 3)
    with pytest.raises(ValueError, match="temperature"):
        phase_contrast(phi, phi, temperature=0.0)
    with pytest.raises(ValueError, match="dropped"):
        phase_contrast(phi, phi[..., :2])
