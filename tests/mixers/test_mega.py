"""Mega against loops over every token, the authors' numbers (B138), and what its two parts are for."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import regard
from mixers.naive_mega import naive_ema, naive_mega
from regard.laws.agreement import close, same
from regard.mixers.mega import Mega, MegaState
from regard.mixers.mega_attention import Laplace
from regard.mixers.mega_average import damped_ema

VECTORS = Path(__file__).parents[1] / "vectors" / "B138.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(seed: int, dim: int = 5, **options) -> Mega:
    options = {"qk_dim": 4, "value_dim": 6, "ema_dim": 3, **options}
    layer = Mega(dim, **options).double().eval()
    with torch.no_grad():
        for n, p in enumerate(layer.parameters()):
            p.copy_(0.7 * normal(100 * seed + n, *p.shape))
    return layer


def naive(layer: Mega, x: Tensor, keep: Tensor | None = None) -> Tensor:
    p = dict(layer.named_parameters())
    alpha, delta, beta, eta = (p["average." + name].flatten(0, 1) for name in ("alpha", "delta", "beta", "eta"))
    place = "attention.position."
    bias = p[place + "table"] if place + "table" in p else torch.stack([p[place + "a"], p[place + "b"]])
    projections = [p[f"{name}_proj.{kind}"] for name in ("v", "mixed", "o") for kind in ("weight", "bias")]
    return naive_mega(
        x,
        p["norm.weight"],
        p["norm.bias"],
        alpha,
        delta,
        beta,
        eta,
        p["omega"],
        *projections,
        p["kappa"],
        p["mu"],
        bias,
        causal=layer.causal,
        chunk=layer.chunk,
        function=layer.attention.weighting,
        keep=keep,
    )


def compare(layer: Mega, x: Tensor, keep: Tensor | None = None) -> None:
    """Outputs of real tokens, and the gradients of x and every parameter."""
    x = x.requires_grad_()
    shown = torch.ones(x.shape[:2], dtype=torch.bool) if keep is None else keep
    results = []
    for out in (layer(x, mask=keep), naive(layer, x, keep)):
        out = out[shown]
        direction = normal(7, *out.shape)
        results.append((out, torch.autograd.grad((out * direction).sum(), [x, *layer.parameters()])))
    (got, got_grads), (want, want_grads) = results
    close(got.detach(), want.detach(), "out")
    names = ["x", *(name for name, _ in layer.named_parameters())]
    for name, g, w in zip(names, got_grads, want_grads, strict=True):
        close(g, w, name)


@pytest.mark.parametrize("weighting", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("T", "chunk", "positions"), [(1, None, None), (7, None, 9), (9, 3, None), (6, 3, 3)])
def test_equals_the_loops(T: int, chunk: int | None, positions: int | None, causal: bool, weighting: str) -> None:
    layer = filled(T, causal=causal, chunk=chunk, max_positions=positions, weighting=weighting)
    compare(layer, normal(T, 2, T, 5))


@pytest.mark.parametrize("weighting", ["softmax", "laplace"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("chunk", [None, 4])
def test_equals_the_loops_with_padding(chunk: int | None, causal: bool, weighting: str) -> None:
    layer = filled(3, causal=causal, chunk=chunk, weighting=weighting)
    keep = torch.arange(8) < torch.tensor([[8], [5]])
    compare(layer, normal(4, 2, 8, 5), keep)


def test_a_short_last_chunk_is_a_sequence_cut_short() -> None:
    """Beyond the paper: 8 tokens in chunks of 3 are 9 tokens whose last one is hidden."""
    x = normal(5, 2, 9, 5)
    keep = (torch.arange(9) < 8).expand(2, 9)
    for causal in (False, True):
        for weighting in ("softmax", "laplace"):
            layer = filled(6, causal=causal, chunk=3, weighting=weighting)
            close(layer(x[:, :8]).detach(), naive(layer, x, keep)[:, :8].detach())


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case)}


@pytest.mark.parametrize(
    ("case", "weighting", "causal", "chunk"),
    [
        ("c1", "laplace", False, None),
        ("c2", "softmax", True, 3),
        ("c3", "softmax", False, None),
        ("c4", "laplace", True, None),
        ("c5", "relu2", True, 3),
    ],
)
def test_gives_the_authors_numbers(case: str, weighting: str, causal: bool, chunk: int | None) -> None:
    z = vectors(case)
    M, N = z["P_move.omega"].shape[0], z["P_move.gamma"].shape[1]
    table = z.get("P_rel_pos_bias.rel_pos_bias")
    layer = Mega(
        M,
        qk_dim=z["P_gamma"].shape[1],
        value_dim=z["P_v_proj.weight"].shape[0],
        ema_dim=N,
        causal=causal,
        chunk=chunk,
        weighting=weighting,
        max_positions=None if table is None else (len(table) + 1) // 2,
    ).double()
    state = {"omega": z["P_move.omega"], "kappa": z["P_gamma"], "mu": z["P_beta"]}
    for own, theirs in (("alpha", "delta"), ("delta", "alpha"), ("beta", "beta"), ("eta", "gamma")):
        state["average." + own] = z["P_move." + theirs].reshape(-1, M, N)
    for own, theirs in (("norm", "norm.norm"), ("v_proj",) * 2, ("mixed_proj", "mx_proj"), ("o_proj", "h_proj")):
        state |= {f"{own}.{kind}": z[f"P_{theirs}.{kind}"] for kind in ("weight", "bias")}
    if table is None:
        state |= {
            "attention.position.a": z["P_rel_pos_bias.alpha"][0],
            "attention.position.b": z["P_rel_pos_bias.beta"][0],
        }
    else:
        state["attention.position.table"] = table
    layer.load_state_dict(state)
    x, keep = z["x"].requires_grad_(), z["keep"]
    y = layer(x, mask=None if keep.all() else keep)
    close(y.detach()[keep], z["out"][keep])
    close(torch.autograd.grad((y * z["w"]).sum(), x)[0], z["gx"])  # w is 0 where keep is False


def test_damped_ema_equals_the_loops() -> None:
    x, alpha, delta, beta, eta = normal(1, 1, 70, 2), *(normal(n, 2, 3) for n in range(2, 6))
    y, h = damped_ema(x, alpha.sigmoid(), delta.sigmoid(), beta, eta)
    close(y[0], naive_ema(x[0], alpha, delta, beta, eta))
    decay = 1 - alpha.sigmoid() * delta.sigmoid()
    close(h[0], sum(decay ** (69 - t) * x[0, t, :, None] for t in range(70)))


def test_chunk_as_long_as_the_sequence_is_mega() -> None:
    whole = regard.create("mega", dim=8, num_heads=2).double()
    chunked = regard.create("mega_chunk", dim=8, num_heads=2, chunk=12).double()
    chunked.load_state_dict(whole.state_dict())
    x = normal(9, 2, 12, 8)
    same(chunked(x), whole(x))
    assert not torch.equal(chunked(normal(9, 2, 13, 8)), whole(normal(9, 2, 13, 8)))


def test_the_average_carries_order_and_chunks() -> None:
    """Without it, nothing but the bias tells the order of tokens, and chunks know nothing of one another."""
    x = normal(10, 1, 8, 5)
    turned = x.flip(1)
    layer = filled(11, chunk=4)
    with torch.no_grad():
        layer.attention.position.a.zero_()
    assert not torch.allclose(layer(turned).flip(1), layer(x))
    changed = x.clone()
    changed[:, 0, 0] += 1  # of one channel: the norm would take a shift of all away
    assert not torch.allclose(layer(changed)[:, 4:], layer(x)[:, 4:])
    with torch.no_grad():
        layer.average.eta.zero_()
    close(layer(turned).flip(1).detach(), layer(x).detach())
    same(layer(changed)[:, 4:], layer(x)[:, 4:])


def test_chunks_make_the_cost_linear() -> None:
    """Multiply-adds by torch's own count: doubled for twice the tokens in chunks, more than that without."""

    def flops(chunk: int | None, T: int) -> int:
        layer = filled(15, causal=True, chunk=chunk, weighting="laplace")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(normal(16, 1, T, 5))
        return counter.get_total_flops()

    assert flops(16, 256) < 2.1 * flops(16, 128)
    assert flops(None, 256) > 2.5 * flops(None, 128)


def test_state_stays_small_in_chunks() -> None:
    layer = filled(12, causal=True, chunk=4)
    x, state = normal(13, 2, 23, 5), layer.init_state(2, 1)
    outs = []
    for piece in x.split([1, 2, 1, 9, 0, 3, 7], 1):
        y, state = layer.step(piece, state)
        assert state.k.shape[1] < 4
        assert state.ema.shape == (2, 5, 3)
        outs.append(y)
    close(torch.cat(outs, 1).detach(), layer(x).detach())


def test_laplace_is_near_the_squared_relu() -> None:
    """What it is made for: value and slope of relu^2 where its argument is sqrt(1/2), but bounded by 1."""
    s = torch.tensor([[[[2**-0.5]]]], dtype=torch.float64, requires_grad=True)
    weight = Laplace()(s, None)
    slope = torch.autograd.grad(weight.sum(), s)[0]
    assert abs(weight.item() - 0.5) < 1e-5
    assert abs(slope.item() - 2**0.5) < 1e-5
    assert Laplace()(100 * s, None).item() == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weighting": "tanh"}, r"weighting is unknown \(got 'tanh'\)"),
        ({"qk_dim": 3}, r"width is odd \(got 3\); expected an even int"),
        ({"chunk": 0}, r"chunk is too small \(got 0\)"),
        ({"chunk": 8, "max_positions": 4}, r"max_positions is too small \(got 4\); expected an int >= 8"),
        ({"dropout": 1.5}, r"dropout is out of range \(got 1.5\)"),
    ],
)
def test_bad_options(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        filled(1, **options)


def test_bad_input() -> None:
    layer = filled(1, max_positions=4, causal=True)
    with pytest.raises(ValueError, match=r"x has the wrong shape \(got \(2, 3, 6\)\); expected \(B, T, M = 5\)"):
        layer(normal(1, 2, 3, 6))
    with pytest.raises(ValueError, match=r"x is too long \(got 5 tokens\); expected at most max_positions = 4"):
        layer(normal(1, 2, 5, 5))
    state = layer.init_state(2, 3)
    with pytest.raises(ValueError, match=r"state has capacity 3 \(got 4 tokens\); expected capacity >= 4"):
        layer.step(normal(1, 2, 4, 5), state)
    with pytest.raises(ValueError, match=r"x has another batch than the state \(got 3\); expected 2"):
        layer.step(normal(1, 3, 1, 5), state)
    with pytest.raises(TypeError, match=r"state has the wrong type \(got NoneType\); expected the MegaState"):
        layer.step(normal(1, 2, 1, 5), None)
    assert isinstance(state, MegaState)
    with pytest.raises(ValueError, match="causal=True"):
        filled(1).init_state(1, 1)


@pytest.mark.parametrize("how", ["vmap", "compile"])
def test_what_was_hidden_stays_hidden_where_nobody_may_look(how: str) -> None:
    """A step with a hidden token, then one without a mask: mapped or compiled it sees what it sees plainly."""
    torch.manual_seed(0)
    layer = Mega(8, causal=True).double().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, True]])

    def both(x: Tensor) -> Tensor:
        _, state = layer.step(x[:, :3], layer.init_state(2, 5), mask=mask)
        return layer.step(x[:, 3:], state)[0]

    with torch.no_grad():
        want = both(x)
        if how == "vmap":
            got = torch.func.vmap(both)(torch.stack([x, x.flip(0)]))[0]
        else:
            torch._dynamo.reset()
            got = torch.compile(both, backend="eager")(x)
    close(got, want)
