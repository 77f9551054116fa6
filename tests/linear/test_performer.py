"""FAVOR+ against loops and third-party numbers (B111); what the random features estimate, and how well."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from linear.naive_performer import naive_features_attention, naive_performer, naive_performer_relu, naive_relu_features
from linear.naive_performer import naive_softmax_attention as exact_attention
from regard.kernels.linear_scan import linear_scan
from regard.laws.agreement import close, same
from regard.laws.subject import of, tokens
from regard.linear import Performer, performer_attention, random_directions
from regard.linear._shared import feature_attention
from regard.linear.performer import PerformerState, project, relu_features, softmax_features

VECTORS = Path(__file__).parents[1] / "vectors" / "B111.npz"


def vectors() -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k: torch.from_numpy(file[k]) for k in file}


def normal(seed: int, *shape: int, size: float = 1.0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return (size * torch.randn(*shape, dtype=torch.float64, generator=g)).requires_grad_()


def gradients_agree(got: Tensor, want: Tensor, given: tuple[Tensor, ...]) -> None:
    close(got.detach(), want.detach())
    direction = torch.randn_like(want)
    for g, w in zip(torch.autograd.grad((got * direction).sum(), given), torch.autograd.grad(want, given, direction)):
        close(g, w)


SIZES = pytest.mark.parametrize(
    "sizes", [(2, 3, 7, 9, 4, 5, 11), (1, 1, 1, 1, 1, 2, 1), (2, 2, 6, 3, 3, 1, 5)], ids=str
)


@SIZES
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_equals_the_loops(sizes: tuple[int, ...], causal: bool, kernel: str) -> None:
    """Without eps the maxima cancel, running or not."""
    B, H, T, S, D, V, r = sizes
    S = T if causal else S
    given, omega = (normal(1, B, H, T, D), normal(2, B, H, S, D), normal(3, B, H, S, V)), normal(4, r, D).detach()
    got, _ = performer_attention(*given, omega, causal=causal, kernel=kernel, eps=0.0)
    naive = naive_performer if kernel == "softmax" else naive_performer_relu
    gradients_agree(got, naive(*given, omega, causal=causal), given)


@SIZES
def test_stabilised_as_published(sizes: tuple[int, ...]) -> None:
    """With eps the maxima count: a query's own, and one for all keys of a head."""
    B, H, T, S, D, V, r = sizes
    given, omega = (normal(1, B, H, T, D), normal(2, B, H, S, D), normal(3, B, H, S, V)), normal(4, r, D).detach()
    got, _ = performer_attention(*given, omega, eps=1e-2)
    gradients_agree(got, naive_performer(*given, omega, eps=1e-2), given)


def test_gives_the_published_codes_numbers() -> None:
    z = vectors()

    def check(case: str, out: Tensor, given: tuple[Tensor, ...]) -> None:
        close(out.detach(), z[f"{case}_out"])
        for g, n in zip(torch.autograd.grad((out * z["w"]).sum(), given), "qkv"):
            close(g, z[f"{case}_g{n}"])

    def given(S: int = 9) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (z[n][:, :, :S].clone().requires_grad_() for n in "qkv")
        return q, k, v

    omega = z["Omega"]
    qkv = q, k, v = given()  # its gradients leave the maxima out, which counts beside eps
    z_q, z_k = project(q, omega), project(k, omega)
    phi_q = softmax_features(q, z_q, z_q.detach().amax(-1, keepdim=True), 1e-4)
    phi_k = softmax_features(k, z_k, z_k.detach().amax((2, 3), keepdim=True), 1e-4)
    check("a", feature_attention(phi_q, phi_k, v, causal=False)[0], qkv)
    close(performer_attention(*qkv, omega, eps=1e-4)[0].detach(), z["a_out"])
    qkv = given()
    check("c", performer_attention(*qkv, omega, kernel="relu")[0], qkv)
    close(relu_features(qkv[0], omega).detach(), z["c_phi_q"])
    qkv = q, k, v = given()  # ReLU of the projections themselves
    phi = [relu_features(x, None) for x in (q, k)]
    close(phi[0].detach(), naive_relu_features(q).detach())
    check("d", naive_features_attention(*phi, v), qkv)
    qkv = q, k, v = given(7)  # causal: their maximum runs over all keys, and the sum of keys gets 1e-6
    z_q, z_k = project(q, omega), project(k, omega)
    phi_q = softmax_features(q, z_q, z_q.detach().amax(-1, keepdim=True), 1e-4)
    phi_k = softmax_features(k, z_k, z_k.detach().amax((2, 3), keepdim=True), 1e-4)
    mixed, _ = linear_scan(phi_q, phi_k, torch.cat([v, torch.ones_like(v[..., :1])], -1))
    check("b", mixed[..., :-1] / (mixed[..., -1:] + 1e-6 * phi_q.sum(-1, keepdim=True)), qkv)


def estimates(orthogonal: bool, draws: int, q: Tensor, k: Tensor, r: int) -> Tensor:
    """phi(q) . phi(k) for many draws of r directions."""
    g = torch.Generator().manual_seed(3)
    drawn = [random_directions(r, len(q), orthogonal=orthogonal, generator=g) for _ in range(draws)]
    omega = torch.stack(drawn).double()
    scaled = torch.stack([q, k]) * len(q) ** -0.25
    features = (omega @ scaled.mT - 0.5 * scaled.square().sum(-1)).exp()  # draws x r x 2
    return (features[..., 0] * features[..., 1]).mean(1)


def test_unbiased_of_rank_r_and_orthogonal_directions_vary_less() -> None:
    """The claim: means within 4 standard errors of exp(q . k / sqrt(D)), and a lower variance than independent rows.

    All that from r features of a token, so that weights have rank r.

    LAPACK's Q as it comes, without R's signs, fails the first: it is 15 standard errors off here.
    """
    D, r, draws = 8, 16, 6000
    q, k = normal(1, D, size=0.7).detach(), normal(2, D, size=0.7).detach()
    truth = (q @ k / D**0.5).exp()
    variances = []
    for orthogonal in (False, True):
        found = estimates(orthogonal, draws, q, k, r)
        assert (found.mean() - truth).abs() < 4 * found.std() / draws**0.5
        variances.append(found.var())
    assert variances[1] < 0.85 * variances[0]
    q, k, values = normal(1, 1, 1, 12, D).detach(), normal(2, 1, 1, 12, D).detach(), torch.eye(12).double()[None, None]
    weights = performer_attention(q, k, values, random_directions(4, D), eps=0.0)[0]
    assert torch.linalg.matrix_rank(weights) == 4


def test_more_features_come_closer_to_softmax() -> None:
    q, k, v = (normal(n, 1, 2, 12, 4).detach() for n in (1, 2, 3))
    for causal in (False, True):
        exact = exact_attention(q, k, v, causal=causal)
        off = []
        for r in (16, 256, 4096):
            g = torch.Generator().manual_seed(5)
            directions = random_directions(r, 4, generator=g)
            off.append((performer_attention(q, k, v, directions, causal=causal)[0] - exact).abs().mean())
        assert off[0] > 2 * off[1] > 4 * off[2]  # about 4 and 16 times by the square root
        assert off[2] < 0.04


def test_directions() -> None:
    """Orthogonal within blocks, lengths as of Gaussian rows, each row uniform on the sphere."""
    g = torch.Generator().manual_seed(0)
    w = random_directions(11, 4, generator=g)
    assert w.shape == (11, 4)
    for block in (w[:4], w[4:8], w[8:]):
        gram = block @ block.mT
        assert (gram - gram.diagonal().diag()).abs().max() < 1e-4
    assert (w[:4] @ w[4:8].mT).abs().max() > 0.1
    many = torch.cat([random_directions(8, 8, generator=g) for _ in range(800)])
    assert many.square().sum(1).mean() == pytest.approx(8, rel=0.03)
    assert many.mean(0).abs().max() < 4 / len(many) ** 0.5
    firsts = many.view(800, 8, 8)[:, 0, 0]  # LAPACK's own sign makes this one lean to one side
    assert firsts.mean().abs() < 4 / 800**0.5


def test_causal_outputs_do_not_depend_on_later_keys() -> None:
    """Bit for bit, even where a later key has the largest exponent by far, and eps is large."""
    q, k, v = (normal(n, 1, 2, 9, 4).detach() for n in (1, 2, 3))
    omega = normal(4, 7, 4).detach()
    want, _ = performer_attention(q, k, v, omega, causal=True, eps=1e-2)
    k[:, :, 6:] *= 8
    got, _ = performer_attention(q, k, v, omega, causal=True, eps=1e-2)
    same(got[:, :, :6], want[:, :, :6])


def test_large_exponents_in_single_precision() -> None:
    """Keys whose exponents rise to hundreds: exp of them as they are would be inf."""
    q, k, v = (normal(n, 1, 2, 40, 4, size=s).detach() for n, s in ((1, 3.0), (2, 3.0), (3, 1.0)))
    k[:, :, 20:] *= 12
    omega = 4 * normal(4, 16, 4).detach()
    assert project(k, omega).max() > 200
    for causal in (False, True):
        want, _ = performer_attention(q, k, v, omega, causal=causal)
        low = [z.float().requires_grad_() for z in (q, k, v)]
        got, _ = performer_attention(*low, omega, causal=causal)
        assert (got - want).abs().max() < 1e-3
        assert all(g.isfinite().all() for g in torch.autograd.grad(got.square().sum(), low))


def test_hidden_keys_do_not_move_the_maximum() -> None:
    q, k, v = (normal(n, 1, 2, 6, 4).detach() for n in (1, 2, 3))
    keep = torch.tensor([[False, True, True, False, True, False]])
    grown = torch.where(keep[:, None, :, None], k, 50 * k)
    omega = normal(4, 7, 4).detach()
    for causal in (False, True):
        want, _ = performer_attention(q, k, v, omega, causal=causal, keep=keep, eps=1e-2)
        same(performer_attention(q, grown, v, omega, causal=causal, keep=keep, eps=1e-2)[0], want)
        if causal:
            same(want[:, :, 0], torch.zeros_like(want[:, :, 0]), "a row that sees nothing")


@torch.no_grad()
def test_the_state_does_not_grow() -> None:
    module = of("performer").build(causal=True)
    states = [module.step(tokens(1, n), module.init_state(1, 1))[1] for n in (1, 300)]
    assert isinstance(states[0], PerformerState)
    assert [[t.untyped_storage().nbytes() for t in s] for s in states] == [[8 * 6 * 8 * 5, 8 * 6]] * 2


def test_redraw() -> None:
    module = Performer(16, 2)
    assert module.directions.shape == (round(8 * np.log(8)), 8)
    before = module.directions.clone()
    module.redraw(torch.Generator().manual_seed(1))
    first = module.directions.clone()
    module.redraw(torch.Generator().manual_seed(1))
    same(module.directions, first)
    assert not torch.equal(before, first)


def test_directions_stay_in_single_precision() -> None:
    module = Performer(8, 2)
    before = module.directions.clone()
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        same(module.to(dtype).directions, before)


def test_refusals() -> None:
    for option, value in (("kernel", "exp"), ("num_features", 0), ("eps", -1.0), ("eps", float("nan"))):
        with pytest.raises(ValueError, match=option):
            Performer(8, 2, **{option: value})
    with pytest.raises(ValueError, match=r"directions has the wrong shape \(got \(4, 7\)\); expected \(r, D = 4\)"):
        performer_attention(*(torch.zeros(1, 1, 2, 4) for _ in "qkv"), torch.zeros(4, 7))
    with pytest.raises(ValueError, match="kernel"):
        regard.create("performer", dim=8, num_heads=2, kernel="cosine")
