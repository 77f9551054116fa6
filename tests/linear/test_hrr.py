"""Hrrformer against explicit circular sums (by somebody who saw the equations only) and the authors' numbers (B176)."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from linear import naive_hrr as naive
from regard.laws.agreement import close, same
from regard.laws.subject import of, tokens
from regard.linear import Hrrformer, hrr_attention
from regard.linear.hrr import bound, response, unbound

VECTORS = Path(__file__).parents[1] / "vectors" / "B176.npz"


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(case): torch.from_numpy(file[k]) for k in file if k.startswith(case)}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def compare(got: Tensor, want: Tensor, given: tuple[Tensor, ...]) -> None:
    """Values and gradients."""
    close(got.detach(), want.detach())
    direction = torch.randn(want.shape, dtype=want.dtype, generator=torch.Generator().manual_seed(9))
    ours, theirs = (torch.autograd.grad((z * direction).sum(), given) for z in (got, want))
    for g, w in zip(ours, theirs):
        close(g, w)


SIZES = [(2, 2, 5, 4), (1, 3, 7, 5), (1, 1, 1, 3), (2, 1, 4, 2)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_circular_sums(sizes: tuple[int, ...], causal: bool) -> None:
    given = tuple(normal(n, *sizes) for n in (1, 2, 3))
    want = naive.core_causal(*given) if causal else naive.core(*given)
    compare(hrr_attention(*given, causal=causal)[0], want, given)


def test_hidden_tokens_are_bound_to_nothing_and_get_nothing() -> None:
    given = tuple(normal(n, 3, 2, 5, 4) for n in (1, 2, 3))
    keep = torch.tensor([[True] * 5, [True, False, True, True, False], [False] * 5])
    want = naive.core(*given, keep, mask_form="exact", keep_in_beta=True, guard=True)
    compare(hrr_attention(*given, keep=keep)[0], want, given)


@pytest.mark.parametrize("hidden", [(), (0,), (1, 3), (0, 1, 2)])
def test_hidden_tokens_when_causal(hidden: tuple[int, ...]) -> None:
    """What remains is as by itself."""
    given = tuple(normal(n, 1, 2, 6, 3) for n in (1, 2, 3))
    keep = torch.tensor([[t not in hidden for t in range(6)]])
    out, state = hrr_attention(*given, causal=True, keep=keep)
    alone = tuple(z[:, :, keep[0]] for z in given)
    want, after = hrr_attention(*alone, causal=True)
    close(out[:, :, keep[0]], want)
    close(state.spectrum, after.spectrum)
    close(state.total, after.total)
    assert not out[:, :, ~keep[0]].any()


def test_core_gives_the_authors_numbers() -> None:
    z = vectors("c_")
    given = tuple(z[n].clone().requires_grad_() for n in "qkv")
    q, k, v = given
    spectrum = bound(k, v).sum(2, keepdim=True)
    close(torch.fft.irfft(spectrum, n=5).detach(), z["beta"])
    close(unbound(spectrum, q).detach(), z["vhat"])
    close(response(unbound(spectrum, q), v).detach(), z["cos"])
    out, _ = hrr_attention(q, k, v)
    close(out.detach(), z["out"])
    for g, n in zip(torch.autograd.grad((out * z["w"]).sum(), given), "qkv"):
        close(g, z["g" + n])


@pytest.mark.parametrize("case", ["a_", "b_"])
def test_layer_gives_the_authors_numbers(case: str) -> None:
    """With their mask hidden tokens are bound like all others, which the layer does not do but its pieces can."""
    z = vectors(case)
    H, M = int(z["heads"]), z["x"].shape[2]
    layer = Hrrformer(M, H).double()
    with torch.no_grad():
        for name in "qkvo":
            getattr(layer, f"{name}_proj").weight.copy_(z[f"W{name}"])
    if case == "a_":
        close(layer(z["x"]).detach(), z["y"])
        return
    keep = z["keep"].bool()
    weights = [z[f"W{name}"] for name in "qkvo"]
    ours = naive.hrrformer(z["x"], *weights, H, keep, mask_form="exact", keep_in_beta=True)
    close(layer(z["x"], mask=keep).detach(), ours)
    q, k, v = layer.split(z["x"], z["x"])
    a = response(unbound(bound(k, v).sum(2, keepdim=True), q), v)
    w = a.masked_fill(~keep[:, None], -torch.inf).softmax(-1)
    close(layer.merge(w[..., None] * v).detach(), z["y"])
    assert not keep.all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_layer_equals_the_loops(bias: bool, causal: bool) -> None:
    layer, x = of("hrrformer").build(bias=bias, causal=causal), tokens(1, 5)
    if bias:
        with torch.no_grad():
            for p in layer.parameters():
                p.normal_(generator=torch.Generator().manual_seed(p.numel()))
    projections = [getattr(layer, f"{n}_proj") for n in "qkvo"]
    biases = {f"b_{n}": p.bias for n, p in zip("qkvo", projections)}
    want = naive.hrrformer(x, *[p.weight for p in projections], 6, causal=causal, **biases)
    close(layer(x).detach(), want.detach())


def test_streams_in_any_pieces() -> None:
    q, k, v = (normal(n, 2, 2, 9, 5).detach() for n in (1, 2, 3))
    want, end = hrr_attention(q, k, v, causal=True)
    for sizes in ((1,) * 9, (4, 5), (2, 7)):
        state, outs = None, []
        for q_, k_, v_ in zip(*(z.split(sizes, 2) for z in (q, k, v))):
            out, state = hrr_attention(q_, k_, v_, causal=True, state=state)
            outs.append(out)
        close(torch.cat(outs, 2), want)
        assert state is not None
        close(state.spectrum, end.spectrum)
        close(state.total, end.total)


@torch.no_grad()
def test_the_state_does_not_grow() -> None:
    """Of a head: D // 2 + 1 complex numbers and one sum."""
    layer = of("hrrformer").build(causal=True)
    states = [layer.step(tokens(1, n), layer.init_state(1, 1))[1] for n in (1, 300)]
    assert [[t.untyped_storage().nbytes() for t in s] for s in states] == [[8 * 6 * 3 * 2, 8 * 6]] * 2


@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_binding_is_convolution_and_unbinding_correlation(width: int) -> None:
    k, v, q = (normal(n, width).detach() for n in (1, 2, 3))
    close(torch.fft.irfft(bound(k, v), n=width), naive.bind(k, v))
    close(unbound(torch.fft.rfft(v), q), naive.correlate(v, q))
    close(unbound(torch.fft.rfft(v), q), naive.unbind(v, q))


def test_what_is_bound_is_found_again() -> None:
    """Keys whose spectra have modulus 1 are undone exactly by the approximate inverse; other pairs are noise."""
    D, pairs = 512, 8
    k, v = (normal(n, pairs, D).detach() / math.sqrt(D) for n in (1, 2))
    spectrum = torch.fft.rfft(k)
    k = torch.fft.irfft(spectrum / spectrum.abs(), n=D)
    close(unbound(bound(k[0], v[0]), k[0]), v[0])
    found = unbound(bound(k, v).sum(0), k)
    cosines = torch.stack([response(found, v.roll(n, 0)) for n in range(pairs)])
    assert 0.3 < cosines[0].mean() < 0.4
    assert cosines[1:].abs().max() < 0.15 < cosines[0].min()


@torch.no_grad()
def test_a_token_keeps_its_own_value_weighed_by_how_well_it_is_found() -> None:
    """The claim. Half of the queries are their own tokens' keys."""
    D, T = 256, 8
    q, k, v = (normal(n, 1, 1, T, D).detach() for n in (1, 2, 3))
    q[:, :, :4] = k[:, :, :4]
    out, _ = hrr_attention(q, k, v)
    weights = (out * v).sum(-1) / v.square().sum(-1)
    close(out, weights[..., None] * v)
    close(weights.sum(-1), torch.ones(1, 1, dtype=torch.float64))
    assert weights.max() < math.e**2 * weights.min()
    assert weights[..., :4].min() > 1.1 * weights[..., 4:].max()


def test_values_of_nothing_get_nothing_and_no_gradient() -> None:
    q, k, v = (normal(n, 1, 1, 4, 4).detach() for n in (1, 2, 3))
    v[:, :, 1] = 0
    given = [z.requires_grad_() for z in (q, k, v)]
    out, _ = hrr_attention(*given, causal=True)
    assert not out[:, :, 1].any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), given))
    zero = torch.zeros(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    out, _ = hrr_attention(q, zero, v)
    close(out.detach(), v.detach() / 4)
    assert not torch.autograd.grad(out.sum(), zero)[0].any()


def test_nothing_gives_nothing() -> None:
    for shape in ((0, 2, 3, 4), (2, 2, 0, 4)):
        out, state = hrr_attention(*torch.zeros(3, *shape), causal=True)
        assert out.shape == shape
        assert not state.total.any()


def test_starting_values() -> None:
    """LeCun's normal as flax draws it: variance 1 / M, none beyond 2 / 0.88 deviations; biases 0."""
    torch.manual_seed(0)
    layer = regard.create("hrrformer", dim=256, num_heads=4, bias=True)
    for p in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
        assert abs(p.weight.var().item() * 256 - 1) < 0.03
        assert 2.2 < p.weight.abs().max().item() * 16 < 2.274
        assert not p.bias.any()
    assert regard.create("hrrformer", dim=24, num_heads=6).q_proj.bias is None


def test_hidden_tokens_get_no_gradients() -> None:
    given = tuple(normal(n, 1, 2, 6, 3) for n in (1, 2, 3))
    keep = torch.tensor([[True, True, False, True, False, True]])
    for causal in (False, True):
        out, _ = hrr_attention(*given, causal=causal, keep=keep)
        for g in torch.autograd.grad(out.square().sum(), given):
            same(g[:, :, ~keep[0]], torch.zeros_like(g[:, :, ~keep[0]]))


def test_refusals() -> None:
    z = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"k has the wrong shape \(got \(1, 2, 4, 4\)\)"):
        hrr_attention(z, torch.zeros(1, 2, 4, 4), z)
    with pytest.raises(ValueError, match="v has the wrong shape"):
        hrr_attention(z, z, torch.zeros(1, 2, 3, 5))
    with pytest.raises(ValueError, match="gqa"):
        regard.create("hrrformer", dim=8, num_heads=4, num_kv_heads=2)
    with pytest.raises(ValueError, match=r"weighs the value of its own token|context is not taken"):
        of("hrrformer").build()(tokens(1, 3), tokens(1, 4))
