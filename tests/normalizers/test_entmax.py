"""Sparsemax and alpha-entmax against bisection in Python floats, vectors (B152) and the entmax package."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from regard.normalizers import AdaptiveEntmax, Entmax, Softmax, Sparsemax
from regard.normalizers.entmax import _pull_back, entmax, entmax15, sparsemax

VECTORS = Path(__file__).parents[1] / "vectors" / "B152.npz"


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(case): torch.from_numpy(file[k]) for k in file if k.startswith(case)}


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    assert (got - want).abs().max() <= tolerance * (1 + want.abs().max())


# --- the definition, row by row


def row_weights(z: list[float], alpha: float) -> list[float]:
    """p_s = max((alpha-1) z_s - tau, 0)^(1/(alpha-1)), tau found by halving until floats run out."""
    power = 1 / (alpha - 1)
    u = [(alpha - 1) * value for value in z]
    low, high = max(u) - 1, max(u)  # the sum of p is >= 1 at low and 0 at high
    for _ in range(200):
        tau = (low + high) / 2
        if sum(max(value - tau, 0.0) ** power for value in u) >= 1:
            low = tau
        else:
            high = tau
    return [max(value - low, 0.0) ** power for value in u]


def oracle(scores: Tensor, alpha: Tensor | float, allowed: Tensor | None = None) -> Tensor:
    """Every row by itself; masked keys are left out of the row, an empty row is all 0."""
    alphas = torch.as_tensor(alpha, dtype=torch.float64).expand(scores.shape[:-1])
    keep = torch.ones(scores.shape, dtype=torch.bool) if allowed is None else allowed.expand(scores.shape)
    p = torch.zeros_like(scores)
    for row in np.ndindex(*scores.shape[:-1]):
        keys = [s for s in range(scores.shape[-1]) if keep[row][s]]
        if keys:
            weights = row_weights([float(scores[row][s]) for s in keys], float(alphas[row]))
            for s, weight in zip(keys, weights, strict=True):
                p[row][s] = weight
    return p


def oracle_gradients(p: Tensor, dp: Tensor, alpha: float) -> tuple[Tensor, float]:
    """One row: d(sum p dp) by z and by alpha, from the implicit function theorem."""
    g = [float(v) ** (2 - alpha) if v > 0 else 0.0 for v in p]
    total = sum(g)
    h = [v / total for v in g]
    mean = sum(a * float(b) for a, b in zip(h, dp, strict=True))
    dz = torch.tensor([a * (float(b) - mean) for a, b in zip(g, dp, strict=True)], dtype=torch.float64)
    e = [float(v) * math.log(v) if v > 0 else 0.0 for v in p]
    dalpha = sum(
        float(d) * ((float(v) - hs) / (alpha - 1) ** 2 - (es - hs * sum(e)) / (alpha - 1))
        for v, d, hs, es in zip(p, dp, h, e, strict=True)
    )
    return dz, dalpha


def random_case(seed: int) -> tuple[Tensor, Tensor | None]:
    """Scores (B, H, T, S) of many sizes, and a mask: none, causal, random (some rows empty), per key."""
    generator = torch.Generator().manual_seed(seed)
    B, H, T, S = (int(torch.randint(1, n, (), generator=generator)) for n in (3, 4, 6, 9))
    scores = torch.randn(B, H, T, S, generator=generator, dtype=torch.float64) * (0.3, 1.0, 5.0)[seed % 3]
    match seed % 4:
        case 0:
            allowed = None
        case 1:
            allowed = torch.ones(T, S, dtype=torch.bool).tril(S - T)[None, None]
        case 2:
            allowed = torch.rand(B, H, T, S, generator=generator) < 0.6
        case _:
            allowed = torch.rand(B, 1, 1, S, generator=generator).expand(B, 1, T, S) < 0.7
    return scores, allowed


# --- the definition equals what the authors' code gave


def test_oracle_gives_the_authors_numbers() -> None:
    for case, mask in (("c1_", None), ("c2_", vectors("c2_")["mask"][:, None])):
        z = vectors(case)
        close(oracle(z["scores"], z["alpha"][None, :, None], mask), z["p"])
        for row in np.ndindex(*z["p"].shape[:-1]):
            b, h, t = row
            dp = z["v"][b, h] @ z["w"][b, h, t]
            dz, _ = oracle_gradients(z["p"][row], dp, float(z["alpha"][h]))
            close(dz, z["grad_scores"][row])
    z = vectors("c3_")
    close(oracle(z["x"], 1.5), z["entmax15"])
    close(oracle(z["x"], 2.0), z["sparsemax"])


# --- the module equals both


@pytest.mark.parametrize("seed", range(24))
def test_equals_the_definition(seed: int) -> None:
    scores, allowed = random_case(seed)
    alpha = (1.5, 2.0, 1.05, 1.3, 1.8)[seed % 5]
    close(Entmax(alpha=alpha)(scores, allowed), oracle(scores, alpha, allowed))
    close(Sparsemax()(scores, allowed), oracle(scores, 2.0, allowed))
    adaptive = AdaptiveEntmax(scores.shape[1]).double()
    alphas = (1 + torch.sigmoid(adaptive.pre_alpha.detach())).clamp(1.01, 2.0)
    close(adaptive(scores, allowed).detach(), oracle(scores, alphas[None, :, None], allowed))


@pytest.mark.parametrize("seed", range(24))
def test_gradients_equal_the_formula(seed: int) -> None:
    scores, allowed = random_case(seed)
    adaptive = AdaptiveEntmax(scores.shape[1]).double()
    z = scores.clone().requires_grad_()
    dp = torch.randn(scores.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    adaptive(z, allowed).backward(dp)
    keep = torch.ones(scores.shape, dtype=torch.bool) if allowed is None else allowed.expand(scores.shape)
    a = adaptive.pre_alpha.detach()
    alphas = 1 + torch.sigmoid(a)
    p = oracle(scores, alphas[None, :, None], allowed)
    want_z, want_a = torch.zeros_like(scores), torch.zeros_like(a)
    for row in np.ndindex(*scores.shape[:-1]):
        keys = keep[row].nonzero().flatten()
        if len(keys):
            dz, dalpha = oracle_gradients(p[row][keys], dp[row][keys], float(alphas[row[1]]))
            want_z[row][keys] = dz
            want_a[row[1]] += dalpha
    slope = torch.sigmoid(a) * torch.sigmoid(-a)
    assert z.grad is not None
    close(z.grad, want_z, 1e-9)
    close(adaptive.pre_alpha.grad, want_a * slope, 1e-8)


@pytest.mark.parametrize("case", ["c1_", "c2_"])
def test_adaptive_entmax_gives_the_authors_numbers(case: str) -> None:
    z = vectors(case)
    q, k, v = (z[name].clone().requires_grad_() for name in "qkv")
    adaptive = AdaptiveEntmax(3).double()
    with torch.no_grad():
        adaptive.pre_alpha.copy_(z["a"])
    mask = z["mask"][:, None] if "mask" in z else None
    p = adaptive(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), mask)
    out = p @ v
    (out * z["w"]).sum().backward()
    close(p.detach(), z["p"])
    close(out.detach(), z["out"])
    for got, name in ((q.grad, "q"), (k.grad, "k"), (v.grad, "v"), (adaptive.pre_alpha.grad, "a")):
        close(got, z["grad_" + name])


@pytest.mark.parametrize(("function", "name"), [(entmax15, "entmax15"), (sparsemax, "sparsemax")])
def test_sorting_forms_give_the_authors_numbers(function, name: str) -> None:
    z = vectors("c3_")
    x = z["x"].clone().requires_grad_()
    p = function(x)
    (p * z["w"]).sum().backward()
    close(p.detach(), z[name])
    close(x.grad, z[name + "_grad"])


@pytest.mark.parametrize("alpha", [1.001, 1.01, 1.2, 1.5, 1.9, 2.0, 2.25, 3.0])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_equals_the_entmax_package(alpha: float, dim: int) -> None:
    package = pytest.importorskip("entmax")
    x = torch.randn(4, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(int(100 * alpha))) * 3
    close(entmax(x, alpha, dim=dim), package.entmax_bisect(x, alpha, dim=dim, n_iter=60))
    close(entmax15(x, dim=dim), package.entmax15(x, dim=dim))
    close(sparsemax(x, dim=dim), package.sparsemax(x, dim=dim))


# --- beyond [1, 2]


@pytest.mark.parametrize("alpha", [1.0005, 2.001, 2.5, 3.0, 4.0])
@pytest.mark.parametrize("seed", range(4))
def test_any_alpha_equals_the_definition(alpha: float, seed: int) -> None:
    scores, allowed = random_case(seed)
    close(Entmax(alpha=alpha)(scores, allowed), oracle(scores, alpha, allowed))
    close(entmax(scores, torch.tensor(alpha), allowed=allowed), oracle(scores, float(torch.tensor(alpha)), allowed))


def test_a_tensor_may_hold_any_alphas() -> None:
    scores = torch.randn(2, 5, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    alpha = torch.tensor([1.0, 1.001, 1.5, 2.0, 3.0], dtype=torch.float64)[:, None]
    p = entmax(scores, alpha)
    close(p[:, 0], scores[:, 0].softmax(-1))
    close(p[:, 1:], oracle(scores[:, 1:], alpha[1:, 0]))
    for dim, turned in ((0, scores.movedim(-1, 0)), (1, scores.movedim(-1, 1))):
        close(entmax(turned, alpha[:, 0], dim).movedim(dim, -1), p)


def test_gradients_at_any_alpha() -> None:
    generator = torch.Generator().manual_seed(6)
    scores = 0.5 * torch.randn(2, 4, 6, dtype=torch.float64, generator=generator)
    alpha = torch.tensor([1.001, 1.7, 2.3, 3.0], dtype=torch.float64)[:, None]
    assert torch.autograd.gradcheck(entmax, (scores.requires_grad_(), alpha.requires_grad_()))
    assert torch.autograd.gradgradcheck(entmax, (scores, alpha))


def test_the_gradient_on_an_alpha_of_one_is_the_limit() -> None:
    scores = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    weights = torch.arange(6.0, dtype=torch.float64)
    one = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
    (entmax(scores, one) * weights).sum().backward()
    h = 1e-5
    ahead, twice = ((entmax(scores, 1 + n * h) * weights).sum(-1, keepdim=True) for n in (1, 2))
    slope = (4 * ahead - twice - 3 * (scores.softmax(-1) * weights).sum(-1, keepdim=True)) / (2 * h)
    close(one.grad, slope, 1e-7)


def test_one_small_weight_does_not_hide_the_gradient_of_others() -> None:
    """For alpha = 4 the least weight's own slope is 1e8 times the others', which single precision can't subtract."""
    p = torch.tensor([[0.5, 0.3, 0.2 - 1e-4, 1e-4]])
    dp = torch.tensor([[1.0, -2.0, 3.0, 5.0]])
    exact = _pull_back(dp.double(), p.double(), 4.0)
    assert (_pull_back(dp, p, 4.0) - exact).abs().max() < 1e-5 * exact.abs().max()
    g = p.double() ** -2
    naive = g * (dp.double() - (g * dp).sum() / g.sum())
    close(exact, naive, 1e-6)


@pytest.mark.parametrize("alpha", [1.0001, 1.3, 2.5, 3.0])
def test_long_rows_in_single_precision(alpha: float) -> None:
    generator = torch.Generator().manual_seed(9)
    for scores in (torch.zeros(1, 50_000), torch.randn(2, 50_000, generator=generator)):
        p = entmax(scores, alpha)
        close(p, entmax(scores.double(), alpha).float(), 1e-6)
        close(p.sum(-1), torch.ones(len(scores)), 1e-5)


@pytest.mark.parametrize("value", [0.99, 0.0, -2.0, float("nan"), float("inf")])
def test_a_tensor_alpha_below_one_is_refused_or_nan(value: float) -> None:
    scores = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    for grad in (False, True):
        alpha = torch.tensor([[1.5], [value]], requires_grad=grad)
        with pytest.raises(
            ValueError, match=r"entmax: alpha is out of range \(got .*\); expected finite numbers >= 1$"
        ):
            entmax(scores, alpha)
    p = torch.func.vmap(entmax)(scores, alpha.detach())
    close(p[0], entmax(scores[0], 1.5), 1e-6)
    assert p[1].isnan().all()


def test_a_tensor_alpha_must_broadcast() -> None:
    with pytest.raises(
        ValueError, match=r"entmax: alpha has the wrong shape \(got \(3, 1\)\); expected what broadcasts"
    ):
        entmax(torch.zeros(2, 5), torch.full((3, 1), 1.5))
    scores = torch.randn(4, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    alpha = 1 + torch.rand(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    expected = oracle(scores.movedim(0, -1), alpha).movedim(-1, 0)
    close(entmax(scores, alpha, dim=0), expected)  # an axis is missing in front


def test_alpha_near_one_is_softmax_and_two_is_sparsemax() -> None:
    x = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    close(entmax(x, 2.0), sparsemax(x))
    close(entmax(x, 1.5), entmax15(x))
    assert (entmax(x, 1.001) - x.softmax(-1)).abs().max() < 1e-3
    close(Entmax(alpha=1.0)(x[None, None], None), x.softmax(-1)[None, None])


# --- the claim: exact zeros, and a head chooses how many


def test_weights_are_exactly_zero_where_softmax_has_none() -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, -2.0], dtype=torch.float64)[None, None, None]
    assert (Softmax()(scores, None) > 0).all()
    assert (Entmax(alpha=1.5)(scores, None) > 0).flatten().tolist() == [True, True, False, False]
    assert Sparsemax()(scores, None).flatten().tolist() == [1.0, 0.0, 0.0, 0.0]


def test_a_larger_alpha_leaves_fewer_keys() -> None:
    scores = torch.randn(1, 3, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    adaptive = AdaptiveEntmax(3).double()
    with torch.no_grad():
        adaptive.pre_alpha.copy_(torch.tensor([-4.0, 0.0, 4.0]))
    p = adaptive(scores[:, :1].expand(1, 3, 5, 16), None)
    few, some, many = ((p[:, h] == 0).sum() for h in range(3))
    assert few < some < many


# --- masks

EVERY = [Softmax(), Sparsemax(), Entmax(alpha=1.5), Entmax(alpha=1.3), AdaptiveEntmax(2).double()]


@pytest.mark.parametrize("normalizer", EVERY, ids=lambda n: repr(n)[:24])
def test_masked_keys_are_exact_zeros_and_cannot_poison(normalizer) -> None:
    scores = torch.randn(2, 2, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    allowed = torch.ones(2, 1, 3, 6, dtype=torch.bool)
    allowed[..., 4:] = False
    allowed[1, :, 2] = False  # an empty row
    poisoned = scores.masked_fill(~allowed, float("nan")).requires_grad_()
    p = normalizer(poisoned, allowed)
    assert torch.equal(p[..., 4:], torch.zeros_like(p[..., 4:]))
    assert torch.equal(p[1, :, 2], torch.zeros_like(p[1, :, 2]))
    close(p[0].sum(-1).detach(), torch.ones(2, 3, dtype=torch.float64))
    assert torch.equal(p, normalizer(scores, allowed))
    (p * scores).sum().backward()
    assert torch.isfinite(poisoned.grad).all()
    assert (poisoned.grad.masked_select(~allowed) == 0).all()


def test_alpha_is_kept_between_101_and_2() -> None:
    adaptive = AdaptiveEntmax(2).double()
    with torch.no_grad():
        adaptive.pre_alpha.copy_(torch.tensor([-9.0, 40.0]))
    scores = torch.randn(1, 2, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    p = adaptive(scores, None)
    (p * scores).sum().backward()
    close(p.detach(), oracle(scores, torch.tensor([1.01, 2.0])[None, :, None]), 1e-8)
    assert not adaptive.pre_alpha.grad.any()


def test_gradcheck() -> None:
    scores = torch.randn(1, 2, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    adaptive = AdaptiveEntmax(2).double()

    def weights(z: Tensor, a: Tensor) -> Tensor:
        return torch.func.functional_call(adaptive, {"pre_alpha": a}, (z, None))

    a = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(weights, (scores.requires_grad_(), a))


@pytest.mark.parametrize("alpha", [0.5, -1.0, float("nan"), float("inf")])
def test_refuses_alpha_outside_its_range(alpha: float) -> None:
    for who, make in (("Entmax", lambda: Entmax(alpha=alpha)), ("entmax", lambda: entmax(torch.zeros(1, 2), alpha))):
        words = rf"^{who}: alpha is out of range \(got {alpha}\); expected a finite number >= 1$"
        with pytest.raises(ValueError, match=words):
            make()


def test_refuses_what_is_no_number_and_no_scores() -> None:
    with pytest.raises(TypeError, match=r"Entmax: alpha has the wrong type \(got '1.5'\); expected a finite number"):
        Entmax(alpha="1.5")
    with pytest.raises(TypeError, match=r"entmax: alpha has the wrong type \(got str\); expected a Tensor .* or float"):
        entmax(torch.zeros(1, 2), "1.5")
    with pytest.raises(TypeError, match=r"entmax: scores has the wrong dtype \(got torch.int64\); expected floating"):
        entmax(torch.zeros(1, 2, dtype=torch.int64), 1.5)
    with pytest.raises(ValueError, match=r"entmax: alpha varies along the normalised axis \(got \(1, 2\)\); expected"):
        entmax(torch.zeros(1, 2), torch.full((1, 2), 1.5))
    for heads in (0, -1):
        with pytest.raises(
            ValueError, match=rf"AdaptiveEntmax: num_heads is too small \(got {heads}\); expected an int"
        ):
            AdaptiveEntmax(heads)
    words = r"AdaptiveEntmax: scores has the wrong shape \(got \(2, 3, 4, 5\)\); expected \(B, H = 2, t, S\)"
    with pytest.raises(ValueError, match=words):
        AdaptiveEntmax(2)(torch.zeros(2, 3, 4, 5))
    words = (
        r"Entmax: allowed has the wrong shape \(got \(2, 2, 4, 4\)\); expected \(1 or B = 2, 1 or H = 3, t = 4, S = 5\)"
    )
    with pytest.raises(ValueError, match=words):
        Entmax()(torch.zeros(2, 3, 4, 5), torch.ones(2, 2, 4, 4, dtype=torch.bool))


def test_starts_close_to_softmax_in_a_trained_model() -> None:
    adaptive = AdaptiveEntmax(3).double()
    assert adaptive.start_neutral()
    z = torch.randn(1, 3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert (adaptive(z) - z.softmax(-1)).abs().max() < 0.02
    adaptive(z).square().sum().backward()
    assert (adaptive.pre_alpha.grad != 0).all(), "it can still learn"


@pytest.mark.parametrize("name", ["entmax", "sparsemax", "adaptive_entmax"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_layer_puts_it_in_the_place_of_softmax(name: str, causal: bool) -> None:
    M, H, G, D = 12, 4, 2, 3
    layer = regard.create(name, dim=M, num_heads=H, num_kv_heads=G, causal=causal).double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    p = {key: value.detach() for key, value in layer.state_dict().items()}
    x = torch.randn(2, 5, M, dtype=torch.float64, generator=g)
    q, k, v = ((x @ p[f"{n}_proj.weight"].T).unflatten(-1, (-1, D)).transpose(1, 2) for n in "qkv")
    k, v = k.repeat_interleave(H // G, 1), v.repeat_interleave(H // G, 1)
    allowed = torch.ones(5, 5, dtype=torch.bool)
    allowed = (allowed.tril() if causal else allowed)[None, None]
    alphas = {"entmax": torch.tensor(1.5), "sparsemax": torch.tensor(2.0)}
    if name == "adaptive_entmax":
        alphas[name] = (1 + torch.sigmoid(p["normalizer.pre_alpha"])).clamp(1.01, 2)[None, :, None]
    weights = oracle(q @ k.transpose(-1, -2) / math.sqrt(D), alphas[name], allowed)
    close(layer(x).detach(), (weights @ v).transpose(1, 2).flatten(2) @ p["o_proj.weight"].T)
