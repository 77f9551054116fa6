"""Converter against loops, whose author has read neither code nor test, and the authors' numbers (A150)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from mixers import naive_converter as naive
from regard import masks
from regard.kernels.flops import FlopCounter
from regard.laws.agreement import close
from regard.mixers.converter import Converter, UnitaryDigraphConv
from regard.mixers.givens import Rotations, digraph_fourier, givens_sweep, inverse_digraph_fourier, recurrence
from regard.mixers.kernel_polynomial import chebyshev, gibbs_damping
from regard.mixers.siren import scale_norm

VECTORS = Path(__file__).parents[1] / "vectors" / "A150.npz"
M = 9


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(dim: int = M, **options) -> Converter:
    layer = regard.create("converter", dim=dim, num_heads=1, dtype=torch.float64, **options).eval()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.6 * normal(100 + n, *p.shape))
        layer.share.fill_(0.7)
    return layer


def siren(net) -> tuple[Tensor, ...]:
    return net.inner.weight, net.inner.bias, net.norm, net.outer.weight, net.outer.bias


def complex_loops(layer: Converter, x: Tensor, **options) -> Tensor:
    conv, damping = layer.conv, layer.conv.damping
    nets = siren(conv.turns), siren(conv.spectrum)
    given = (conv.real_proj.weight, conv.imag_proj.weight, *nets, conv.coefficients)
    return naive.unitary_digraph_conv(x, *given, m=conv.permutation, damping=damping, layout=conv.angles, **options)


def loops(layer: Converter, x: Tensor, **options) -> Tensor:
    gates = (p for proj in (layer.real_gate, layer.imag_gate, layer.o_proj) for p in (proj.weight, proj.bias))
    return naive.read_out(complex_loops(layer, x, **options), x, layer.norm, *gates, layer.share, layer.out_norm)


@pytest.mark.parametrize(
    ("T", "options"),
    [
        (1, {}),
        (6, {}),
        (6, {"angles": "released", "permutation": 3}),
        (4, {"order": 4, "damping": "fejer", "permutation": 2}),
        (5, {"order": 0, "angles": "released"}),
    ],
)
def test_is_the_definition(T: int, options: dict) -> None:
    layer, x = filled(**options), normal(1, 2, T, M).requires_grad_()
    got, want = layer(x), loops(layer, x)
    close(got, want)
    of, direction = [x, *layer.parameters()], normal(2, 2, T, M)
    grads = [torch.autograd.grad((y * direction).sum(), of, allow_unused=True) for y in (got, want)]
    for mine, theirs in zip(*grads, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            close(mine, theirs)


@pytest.mark.parametrize("options", [{}, {"permutation": 2}])
def test_padding_on_either_side_is_the_definition(options: dict) -> None:
    layer, x = filled(**options), normal(1, 2, 6, M)
    keep = torch.tensor([[False, False, True, True, True, True], [True, True, True, True, False, False]])
    want = (
        loops(layer, x, keep=keep)
        if not options
        else torch.stack([loops(layer, x[b : b + 1, keep[b]])[0] for b in (0, 1)])
    )
    got = layer(x, mask=masks.padding(keep))
    close(got[keep], want[keep] if not options else want.flatten(0, 1))


@pytest.mark.parametrize("angles", ["token", "released"])
def test_hidden_tokens_are_as_if_they_were_not_there(angles: str) -> None:
    layer, x, keep = filled(angles=angles, permutation=2), normal(2, 2, 9, M), torch.ones(2, 9, dtype=torch.bool)
    keep[0, [0, 3, 4]] = keep[1, 8] = False
    got = layer(x.masked_fill(~keep[..., None], torch.nan), mask=masks.padding(keep))
    for b in range(2):
        close(got[b, keep[b]], layer(x[b : b + 1, keep[b]])[0])


def numbers(case: str) -> tuple[dict[str, Tensor], UnitaryDigraphConv]:
    """Of a case, and the layer with its parameters but for c, which each place in the batch has its own of."""
    with np.load(VECTORS) as file:
        z = {k[2:]: torch.from_numpy(file[k]) for k in file if k.startswith(f"{case}_")}
    permutation, order, _ = z["options"].tolist()
    conv = UnitaryDigraphConv(z["x"].shape[2], order=order, permutation=permutation or None, angles="released").double()
    state = {f"{ours}_proj.weight": z[f"value_linear_{ours}_weight"] for ours in ("real", "imag")}
    for ours, theirs in (("spectrum", "seq_eigenvalue"), ("turns", "givens_parameters")):
        for part, n in (("inner", 0), ("outer", 4)):
            state |= {f"{ours}.{part}.{p}": z[f"{theirs}_siren_{n}_{p}"] for p in ("weight", "bias")}
        state[f"{ours}.norm"] = z[f"{theirs}_siren_2_weight"]
    conv.load_state_dict(state | {"coefficients": z["seq_kernel_poly_cheb_coef"][0]})
    return z, conv


@pytest.mark.parametrize("case", ["b", "c"])
def test_gives_the_authors_numbers(case: str) -> None:
    """Their sweeps begun with the token that they drop, and one exchange less in the inverse."""
    z, conv = numbers(case)
    x, outs = z["x"].requires_grad_(), []
    weight = conv.imag_proj.weight
    for b, c in enumerate(z["seq_kernel_poly_cheb_coef"]):
        outs.append(torch.func.functional_call(conv, {"coefficients": c}, (x[b : b + 1],)))
    y = torch.view_as_real(torch.cat(outs))
    assert (y - torch.stack([z["y_real"], z["y_imag"]], -1)).abs().max() < 1e-10
    grads = torch.autograd.grad((y * z["w"]).sum(), [x, weight])
    for got, want in zip(grads, (z["gx"], z["g_value_imag"]), strict=True):
        assert (got - want).abs().max() < 1e-10


def test_what_was_released_is_not_unitary() -> None:
    """The upper sweep drops the last token, the lower one the first, and the inverse sweeps in the forward order."""
    z, conv = numbers("a")
    x = z["x"]
    B, T = x.shape[:2]
    lower, upper, theta, _ = conv.rotations(x)
    first = (torch.arange(T) == 0)[:, None]

    def sweeps(v: Tensor, upper: Tensor, lower: Tensor) -> Tensor:
        v = givens_sweep(v.masked_fill(first.flip(0), 0), *upper.unbind(-1), up=True)
        return givens_sweep(v.masked_fill(first, 0), *lower.unbind(-1), up=False)

    turn = torch.polar(torch.ones_like(theta), 2 * math.pi * theta)[..., None]
    phi = turn * sweeps(torch.eye(T, dtype=torch.complex128).expand(B, T, T), upper, lower)
    assert ((phi.mH @ phi) - torch.eye(T)).abs().max() > 0.99
    c, lam = z["seq_kernel_poly_cheb_coef"], conv.spectrum(x).mean(-1)
    f = torch.stack([chebyshev(lam[b], c[b], conv.damping) for b in range(B)])
    v = torch.complex(conv.real_proj(x), conv.imag_proj(x))
    filtered = torch.polar(torch.ones_like(f), f)[..., None] * (turn * sweeps(v, upper, lower))
    adjoint = torch.tensor([1, 0, 2])  # -beta, -alpha, -gamma
    y = sweeps(turn.conj() * filtered, -upper[..., adjoint], -lower[..., adjoint])
    close(torch.view_as_real(y), torch.stack([z["y_real"], z["y_imag"]], -1))


@pytest.mark.parametrize("T", [1, 2, 64, 65, 200])
def test_the_transform_is_unitary(T: int) -> None:
    lower, upper = 3 * normal(1, 2, T, 3), 3 * normal(2, 2, T, 3)
    order = torch.stack([torch.randperm(T, generator=torch.Generator().manual_seed(n)) for n in range(2)])
    made = Rotations(lower, upper, normal(3, 2, T), order)
    one = torch.eye(T, dtype=torch.complex128).expand(2, T, T)
    phi = digraph_fourier(one, made)
    assert (phi.mH @ phi - one).abs().max() < 1e-12
    assert (inverse_digraph_fourier(phi, made) - one).abs().max() < 1e-12
    x = normal(4, 2, T, 3)
    close(torch.view_as_real(digraph_fourier(x, made)), torch.view_as_real(phi @ x.to(phi.dtype)))
    if T == 65:  # a block and a token
        low, up = ([naive.givens(*a) for a in z[0, :-1]] for z in (lower, upper))
        rows = [r.to(phi.dtype) for r in x[0, order[0]]]
        want = naive.fourier(rows, low, up, [naive.turn(2 * math.pi * t) for t in made.theta[0]])
        close(torch.view_as_real(digraph_fourier(x, made)[0]), torch.view_as_real(torch.stack(want)))


def test_keeps_all_energy_at_linear_cost() -> None:
    layer, x, seen = filled(24), normal(1, 2, 150, 24), []
    layer.conv.register_forward_hook(lambda conv, given, out: seen.append(out))
    layer(x)
    assert len(seen) == 1, "the convolution is what the layer mixes tokens by"
    v = torch.complex(layer.conv.real_proj(x), layer.conv.imag_proj(x))
    norms = torch.linalg.vector_norm(v, dim=1)
    assert (torch.linalg.vector_norm(seen[0], dim=1) / norms - 1).abs().max() < 1e-12
    assert (seen[0] - v).abs().max() > 1, "for all that it mixes"
    costs = []
    for T in (512, 2048):
        with FlopCounter() as counter:
            layer(normal(2, 1, T, 24))
        costs.append(counter.get_total_flops())
    assert costs[1] < 4.05 * costs[0]
    few = normal(3, 1, 80, 24).requires_grad_()
    for t in (0, 79):
        assert torch.autograd.grad(layer(few)[0, t].sum(), few)[0][0].ne(0).any(-1).all(), "each depends on all"


def test_a_recurrence_may_forget_all() -> None:
    """Factors may be 0, which no sum of logarithms survives."""
    x, b = torch.view_as_complex(normal(1, 1, 130, 2, 2)), torch.view_as_complex(normal(2, 1, 130, 2))
    b[:, ::7] = 0
    h = [x[:, 0]]
    for t in range(1, 130):
        h.append(x[:, t] + b[:, t, None] * h[-1])
    close(torch.view_as_real(recurrence(x, b)), torch.view_as_real(torch.stack(h, 1)))


def test_damping() -> None:
    """Each falls from 1, and keeps the first order best; Jackson's as in the literature's table."""
    assert gibbs_damping("none", 3) == [1.0] * 4
    assert gibbs_damping("fejer", 3) == [1, 0.75, 0.5, 0.25]
    n = 4
    jackson = [
        ((n - k + 1) * math.cos(math.pi * k / (n + 1)) + math.sin(math.pi * k / (n + 1)) / math.tan(math.pi / (n + 1)))
        / (n + 1)
        for k in range(n)
    ]
    assert gibbs_damping("jackson", 3) == pytest.approx(jackson)
    assert gibbs_damping("lanczos", 3, 1.0)[2] == pytest.approx(2 / math.pi)
    assert gibbs_damping("lorentz", 3)[2] == pytest.approx(math.sinh(2) / math.sinh(4))
    assert gibbs_damping("vekic", 3)[2] == pytest.approx(0.5)
    assert gibbs_damping("wang", 3)[2] == pytest.approx(math.exp(-1))
    for kind in ("fejer", "jackson", "lanczos", "lorentz", "vekic", "wang"):
        g = gibbs_damping(kind, 7)
        assert g[0] == 1
        assert g == sorted(g, reverse=True)
    angle = torch.linspace(0, 3, 5, dtype=torch.float64)
    c = normal(1, 4)
    close(chebyshev(angle.cos(), c, [1.0] * 4), sum(c[k] * (k * angle).cos() for k in range(4)))


def test_starting_values_and_loss() -> None:
    torch.manual_seed(0)
    layer = regard.create("converter", dim=128, num_heads=1, order=3)
    assert layer.conv.coefficients.tolist() == [0.25, 0.5, 0.5, 0.5]
    assert float(layer.conv.real_proj.weight.detach().std()) == pytest.approx(0.5**0.5, rel=0.02)
    for net in (layer.conv.turns, layer.conv.spectrum):
        assert 0.99 * (6 / 128) ** 0.5 < float(net.inner.weight.detach().abs().max()) <= (6 / 128) ** 0.5
        assert not net.inner.bias.any()
    assert layer.real_gate.weight.shape == (512, 128)
    assert float(layer.share) == 1
    assert float(layer.kernel_loss()) == pytest.approx(math.pi * 0.25 * (1 + 4 + 9))
    assert float(regard.create("converter", dim=8, num_heads=1, damping="fejer").kernel_loss()) == 0
    assert scale_norm(torch.zeros(2, 3)).tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"order": -1}, "order is too small"),
        ({"permutation": 0}, "permutation is too small"),
        ({"angles": "all"}, "angles is unknown"),
        ({"damping": "hann"}, "kind is unknown"),
        ({"sharpness": 2.0}, "sharpness says nothing to damping 'none'"),
        ({"hidden_dim": 0}, "hidden_dim is too small"),
        ({"auxiliary_weight": -1.0}, "auxiliary_weight is out of range"),
        ({"dropout": 1.5}, "dropout"),
    ],
)
def test_refuses(wrong: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Converter(M, **wrong)
