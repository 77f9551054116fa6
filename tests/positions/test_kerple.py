"""KERPLE (2205.09921): learned kernels of the distance that stay conditionally positive definite."""

import math

import pytest
import torch

import regard
from positions.naive import CASES, attention, case, check, close, rows, run, vectors
from regard import masks
from regard.positions import Alibi, Kerple, KerplePower

FORMS = {
    "log": (Kerple, lambda r1, r2, d: -r1 * math.log(1 + r2 * d)),
    "power": (KerplePower, lambda r1, r2, d: -r1 * d**r2 if d else 0.0),
}


def with_values(cls, r1, r2):
    part = cls(len(r1)).double()
    with torch.no_grad():
        part.r1.copy_(torch.as_tensor(r1))
        part.r2.copy_(torch.as_tensor(r2))
    return part


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", CASES)
def test_matches_the_definition(seed, form):
    c = case(seed)
    H, D = c.q.shape[1], c.q.shape[-1]
    cls, formula = FORMS[form]
    r1, r2 = torch.rand(2, H, dtype=torch.float64) + 0.1
    wanted = attention(
        c,
        lambda b, h, t, i, j: c.dot(b, h, t, j) / math.sqrt(D) + formula(float(r1[h]), float(r2[h]), abs(i - j)),
    )
    check(c, with_values(cls, r1, r2), wanted)


@pytest.mark.parametrize("name", ["log", "power", "logclamp", "powerclamp"])
def test_authors_code(name):
    """Outputs and gradients of the released classes; the clamp cases start outside the allowed range."""
    z = {k: torch.tensor(v) for k, v in vectors("A089").items()}
    cls = FORMS[name.removesuffix("clamp")][0]
    names = {"r1": "bias_p", "r2": "bias_a"} if cls is Kerple else {"r1": "bias_a", "r2": "bias_p"}
    part = with_values(cls, z[f"{name}_{names['r1']}"], z[f"{name}_{names['r2']}"])
    q, k, v = (z[n].clone().requires_grad_() for n in "qkv")
    out = regard.attention(q, k, v, mask=masks.causal(), position=part)
    close(out, z[f"{name}_out"])
    (out * z["w"]).sum().backward()
    for n, given in zip("qkv", (q, k, v)):
        close(given.grad, z[f"{name}_grad_{n}"])
    for mine, theirs in names.items():
        close(getattr(part, mine).grad, z[f"{name}_grad_{theirs}"])
    decode = torch.zeros(1, 3, 1, 4, dtype=torch.float64)
    close(part.bias(rows(decode, torch.zeros(1, 3, 7, 4, dtype=torch.float64))), z[f"{name}_decode_bias"])


def kernel_matrix(cls, r1, r2, n=64):
    at = torch.zeros(1, 1, n, 2, dtype=torch.float64)
    positions = torch.randperm(500, generator=torch.Generator().manual_seed(0))[:n]
    return with_values(cls, [r1], [r2]).bias(rows(at, at, i=positions, j=positions))[0, 0].detach()


def smallest_centred_eigenvalue(matrix):
    n = len(matrix)
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    return float(torch.linalg.eigvalsh(centre @ matrix @ centre)[0])


@pytest.mark.parametrize(("cls", "r1", "r2"), [(Kerple, 0.7, 0.3), (Kerple, 2.0, 5.0), (KerplePower, 0.5, 0.4)])
def test_kernels_are_conditionally_positive_definite(cls, r1, r2):
    matrix = kernel_matrix(cls, r1, r2)
    assert smallest_centred_eigenvalue(matrix) > -1e-9
    assert matrix.max() - matrix.min() > 0.01, "nor is it the same at all distances"


def test_a_power_above_two_is_not_conditionally_positive_definite():
    """So the check above can fail, and the class has to keep its exponent at 2 or below."""
    distances = -kernel_matrix(KerplePower, 1.0, 1.0)
    assert smallest_centred_eigenvalue(-(distances**3)) < -1
    close(kernel_matrix(KerplePower, 1.0, 3.0), kernel_matrix(KerplePower, 1.0, 2.0))


def test_power_one_is_alibi():
    c = case(1)
    H = c.q.shape[1]
    at = torch.zeros(1, H, 2, 2, dtype=torch.float64)
    slopes = -Alibi(H).bias(rows(at, at))[0, :, 1, 0]
    close(run(c, with_values(KerplePower, slopes.clamp(min=0.01), torch.ones(H))), run(c, Alibi(H)), atol=1e-2)
    steep = slopes > 0.01  # smaller slopes are projected up to 0.01
    assert steep.any()
    close(
        run(c, with_values(KerplePower, slopes, torch.ones(H)))[:, steep],
        run(c, Alibi(H))[:, steep],
    )


def test_log_flattens_with_distance():
    at = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    bias = with_values(Kerple, [0.8], [1.0]).bias(
        rows(at, at.expand(1, 1, 2, 2), i=torch.tensor([200_000]), j=torch.tensor([0, 100_000]))
    )[0, 0, 0]
    close(bias[1] - bias[0], torch.tensor(0.8 * math.log(2)), atol=1e-5)


@pytest.mark.parametrize("cls", [Kerple, KerplePower])
def test_starts_inside_the_allowed_range(cls):
    part = cls(500)
    top = {Kerple: (2, 1), KerplePower: (1, 2)}[cls]
    for value, bound in zip((part.r1, part.r2), top):
        assert 0 <= value.min() < 0.2 * bound
        assert 0.8 * bound < value.max() <= bound
