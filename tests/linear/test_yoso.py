"""YOSO against third-party numbers, and loops whose author has read neither code nor test; what sampling estimates."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from linear.naive_yoso import yoso_e, yoso_sampled
from regard.laws.agreement import close, same
from regard.linear import YOSO, yoso_attention
from regard.linear._hashes import Codes, dense_codes, fast_codes, hadamard, random_flips, random_planes, table_sum
from regard.linear.yoso import collision
from regard.masks import padding

VECTORS = Path(__file__).parents[1] / "vectors" / "A090.npz"


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k[2:]: torch.from_numpy(np.asarray(file[k])) for k in file if k.startswith(case + "_")}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def agree(got: Tensor, want: Tensor, given: list[Tensor]) -> None:
    close(got.detach(), want.detach())
    direction = torch.randn_like(want)
    for g, w in zip(*(torch.autograd.grad(z, given, direction) for z in (got, want)), strict=True):
        close(g, w)


def heads_of(case: dict[str, Tensor]) -> tuple[YOSO, list[Tensor]]:
    q, k, v = (case[n].clone().requires_grad_() for n in "qkv")
    kernel = case.get("conv")
    (_, H, _, D), width = q.shape, None if kernel is None else kernel.shape[2]
    layer = YOSO(H * D, H, form="expected", hash_length=int(case["tau"]), conv_width=width).double()
    if kernel is not None:
        layer.conv.weight.data.copy_(kernel)
    return layer, [q, k, v]


@pytest.mark.parametrize("case", "ab")
def test_gives_the_authors_numbers(case: str) -> None:
    z = vectors(case)
    layer, given = heads_of(z)
    keep = z["keep"].bool() if "keep" in z else None
    out = layer.mixed(*given, keep, alone=True)
    close(out.detach(), z["y"])
    for g, n in zip(torch.autograd.grad((out * z["w"]).sum(), given), "qkv", strict=True):
        close(g, z["g" + n])


def test_gives_transformers_numbers() -> None:
    z = vectors("c")
    layer = YOSO(15, 3, bias=True, form="expected", hash_length=int(z["tau"])).double()
    with torch.no_grad():
        for n in "qkv":
            getattr(layer, f"{n}_proj").weight.copy_(z["W" + n])
            getattr(layer, f"{n}_proj").bias.copy_(z["b" + n])
        layer.o_proj.weight.copy_(torch.eye(15))
        layer.o_proj.bias.zero_()
    x = z["x"].clone().requires_grad_()
    out = layer(x)
    close(out.detach(), z["y"])
    close(torch.autograd.grad((out * z["w"]).sum(), x)[0], z["gx"])


KEEP = torch.tensor([[True] * 5, [False, True, True, False, True]])


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("conv", [None, 3])
def test_equals_the_loops(hidden: bool, conv: int | None) -> None:
    layer = YOSO(6, 2, form="expected", hash_length=4, conv_width=conv).double()
    given, keep = [normal(n, 2, 2, 5, 3) for n in (1, 2, 3)], KEEP if hidden else None
    kernel = [layer.conv.weight] if layer.conv is not None else []
    want, _ = yoso_e(*given, 4, keep=keep, kernel=kernel[0] if kernel else None)
    agree(layer.mixed(*given, keep, alone=True), want, [*given, *kernel])


@pytest.mark.parametrize("hidden", [False, True])
def test_sampling_equals_the_loops(hidden: bool) -> None:
    q, k, v = (normal(n, 2, 2, 5, 3) for n in (1, 2, 3))
    planes, keep = normal(4, 2, 2, 6, 2, 3).detach(), KEEP if hidden else None
    layer = YOSO(6, 2, hash_length=2, num_hashes=6, fast_hash=False, draws="kept").double()
    layer.hashes = planes
    want, _ = yoso_sampled(q, k, v, planes, keep=keep)
    got = layer.mixed(q, k, v, keep, alone=True)
    agree(got, want, [v])


def sums(length: int, count: int, gradient: str, given: list[Tensor]) -> tuple[Tensor, ...]:
    """Gradients of random sums, and the weights that hashes give, as a matrix."""
    q, k, v = given
    planes = normal(4, 1, 2, count, length, q.shape[-1]).detach()
    options = {"length": length, "hashes": planes, "gradient": gradient}
    codes = Codes(dense_codes(q, planes), dense_codes(k, planes), length)
    w = (codes.queries[:, :, :, None] == codes.keys[:, :, None]).double().mean(-1)
    return w, *torch.autograd.grad((yoso_attention(*given, **options) * normal(5, *v.shape)).sum(), given)


@pytest.mark.parametrize("gradient", ["hashed", "exact"])
def test_the_sampled_gradient_is_the_formula(gradient: str) -> None:
    """(tau / 2) ((G V^T) * W) K and so on, with W by the same hashes or the expectation; then the two norms'."""
    tau, given = 3, [normal(n, 1, 2, 5, 3) for n in (1, 2, 3)]
    w, *got = sums(tau, 7, gradient, given)
    unit = [torch.nn.functional.normalize(z, dim=-1) for z in given[:2]]
    v = given[2].detach()
    y = (w @ v).requires_grad_()
    (G,) = torch.autograd.grad((torch.nn.functional.normalize(y, dim=-1) * normal(5, *v.shape)).sum(), y)
    if gradient == "exact":
        w = (1 - torch.arccos(unit[0] @ unit[1].mT) / math.pi).detach() ** tau
    inner = tau / 2 * (G @ v.mT) * w
    want = [torch.autograd.grad(u, z, d)[0] for u, z, d in
            zip(unit, given, (inner @ unit[1], inner.mT @ unit[0]), strict=False)]  # fmt: skip
    for g, w_ in zip(got, [*want, w.mT @ G], strict=True):
        close(g, w_.detach())


def test_the_error_falls_as_the_root_of_the_hashes() -> None:
    """Of the sums before their norms are taken out, as of the layer's outputs."""
    x = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    plain = YOSO(16, 2, form="expected", hash_length=4)
    for fast in (False, True):
        off = []
        for m in (8, 128, 2048):
            layer = YOSO(16, 2, hash_length=4, num_hashes=m, fast_hash=fast)
            layer.load_state_dict(plain.state_dict())
            with torch.no_grad():
                off.append(float((layer(x) - plain(x)).norm() / plain(x).norm()))
        assert off[0] > 0.1
        assert off[0] > 2 * off[1] > 4 * off[2]  # about 4 and 16 times by the square root


@torch.no_grad()
def test_both_kinds_of_hashes_collide_as_often_as_they_should() -> None:
    x, (length, count), g = normal(1, 1, 1, 6, 8), (3, 8000), torch.Generator().manual_seed(2)
    x = torch.nn.functional.normalize(x, dim=-1)
    want = collision(x @ x.mT, length)
    for codes in (dense_codes(x, random_planes(1, 1, 8, count, length, generator=g)),
                  fast_codes(x, random_flips(1, 1, 8, count, length, generator=g), length, count)):  # fmt: skip
        assert codes.shape == (1, 1, 6, count)
        assert codes.max() == 2**length - 1
        together = (codes[:, :, :, None] == codes[:, :, None]).double().mean(-1)
        assert (together - want).abs().max() < 0.03


def test_the_transform_is_hadamards() -> None:
    x, h = normal(1, 3, 8).detach(), torch.ones(1, 1).double()
    for _ in range(3):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    close(hadamard(x), x @ h)


def test_the_slope_is_finite_where_query_and_key_agree() -> None:
    """The true one is not; the bound is below it."""
    x = torch.tensor([-0.9, 0.0, 0.5, 0.999, 1.0, 1.0 + 1e-9], dtype=torch.float64).requires_grad_()
    w = collision(x, 9)
    close(w.detach()[-2:], torch.ones(2).double())
    (slope,) = torch.autograd.grad(w.sum(), x)
    close(slope, 4.5 * w.detach())
    true = torch.autograd.grad(((1 - torch.arccos(x[:4]) / math.pi) ** 9).sum(), x)[0][:4]
    assert (slope[:4] <= true).all()
    q = normal(1, 1, 1, 4, 3)
    layer = YOSO(6, 2, form="expected").double()
    with torch.no_grad():
        layer.k_proj.load_state_dict(layer.q_proj.state_dict())
        layer.o_proj.weight.copy_(torch.eye(6))
    out = layer(torch.cat([q, q], -1)[0])
    close(out.unflatten(-1, (2, 3)).norm(dim=-1).detach(), torch.ones(1, 4, 2).double())
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), [q, *layer.q_proj.parameters()]))


@torch.no_grad()
def test_expected_rows_have_norm_one() -> None:
    layer = regard.create("yoso_e", dim=12, num_heads=3, hash_length=3, dtype=torch.float64)
    layer.o_proj.load_state_dict({"weight": torch.eye(12)})
    x = normal(1, 2, 7, 12)
    close(layer(x).unflatten(-1, (3, 4)).norm(dim=-1), torch.ones(2, 7, 3).double())
    assert {n for n, _ in layer.named_buffers()} == set()


@torch.no_grad()
def test_hidden_tokens_are_no_queries_and_nothing_may_collide() -> None:
    layer = YOSO(6, 2, form="expected").double()
    x = normal(1, 2, 5, 6)
    out = layer(x, mask=padding(KEEP))
    assert (out[1, [0, 3]] == 0).all()
    assert (out[1, [1, 2, 4]] != 0).any(-1).all()
    same(layer(x, mask=padding(torch.zeros_like(KEEP))), torch.zeros_like(out))
    codes = Codes(torch.zeros(1, 1, 2, 3).long(), torch.ones(1, 1, 4, 3).long(), 1)
    same(table_sum(codes, torch.ones(1, 1, 4, 2)), torch.zeros(1, 1, 2, 2))
    layer = YOSO(6, 2, draws="fresh", num_hashes=2).double()
    assert layer(x[:0]).shape == (0, 5, 6)
    assert layer(x[:, :0]).shape == (2, 0, 6)
    assert not torch.equal(layer(x), layer(x))


def test_kept_hashes_are_kept() -> None:
    for fast in (False, True):
        layer = YOSO(6, 2, fast_hash=fast, num_hashes=7, draws="kept")
        before, x = layer.hashes.clone(), normal(1, 2, 5, 6).float()
        same(layer(x), layer(x))
        layer.redraw(torch.Generator().manual_seed(1))
        first = layer.hashes.clone()
        layer.redraw(torch.Generator().manual_seed(1))
        same(layer.hashes, first)
        assert not torch.equal(before, first)


def test_refusals() -> None:
    for wrong in ({"form": "exact"}, {"gradient": "lsh"}, {"draws": "once"}, {"hash_length": 17}, {"num_hashes": 0},
                  {"fast_hash": 1}, {"conv_width": 4}):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=rf"YOSO: {next(iter(wrong))} .* \(got .*\); expected "):
            YOSO(8, 2, **wrong)
    with pytest.raises(ValueError, match=r"YOSO: context has no tokens beside the queries"):
        YOSO(8, 2, conv_width=3)(torch.zeros(1, 2, 8), torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match="causal"):
        regard.create("yoso", dim=8, num_heads=2, causal=True)
    with pytest.raises(ValueError, match="yoso_attention: gradient"):
        yoso_attention(*(torch.zeros(1, 1, 2, 4) for _ in "qkv"), gradient="none")
    with pytest.raises(ValueError, match=r"yoso_attention: hashes has the wrong shape .* tau = 9, D = 4"):
        yoso_attention(*(torch.zeros(1, 1, 2, 4) for _ in "qkv"), hashes=torch.zeros(1, 1, 3, 9, 5))
