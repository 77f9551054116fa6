"""SwiftFormer's additive attention against the authors' numbers (A026), and what it promises."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from linear.naive_efficient_additive import additive
from regard import masks
from regard.laws.agreement import close
from regard.linear import EfficientAdditive, global_query
from regard.linear.efficient_additive import unit

VECTORS = Path(__file__).parents[1] / "vectors" / "A026.npz"
THEIRS = {"to_query": "q_proj", "to_key": "k_proj", "Proj": "mix_proj", "final": "o_proj"}


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {name.removeprefix(f"{case}_"): torch.from_numpy(file[name]) for name in file if name.startswith(case)}


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def built(**options) -> EfficientAdditive:
    torch.manual_seed(2)
    return regard.create("efficient_additive", dim=6, num_heads=2, dtype=torch.float64, **options)


def given(case: str, **options) -> EfficientAdditive:
    """The layer with their parameters."""
    layer, theirs = built(**options), vectors(f"{case}_p")
    state = {f"{THEIRS[name.split('.')[0]]}.{name.split('.')[1]}": p for name, p in theirs.items() if "." in name}
    state["direction"] = theirs["w_g"][:, 0]
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize(("weights", "form"), [("norm", "l2"), ("softmax", "softmax"), ("sum", "ones")])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_loops(weights: str, form: str, padded: bool):
    """The loops' author has read neither code nor test; gradients of input and w included."""
    layer, x = built(weights=weights, expansion=2), normal(2, 5, 6).requires_grad_()
    keep = torch.tensor([[True, False, True, True, False], [True] * 5]) if padded else None
    projections = (layer.q_proj, layer.k_proj, layer.mix_proj, layer.o_proj)
    q, k, p, f = ((z.weight, z.bias) for z in projections)
    want, _ = additive(x, *q, *k, layer.direction[:, None], *p, *f, heads=2, form=form, keep=keep)
    got = layer(x, mask=keep)
    close(got.detach(), want.detach())
    leaves = (x, layer.q_proj.weight, layer.o_proj.bias) + ((layer.direction,) if form != "ones" else ())
    for g, w in zip(*(torch.autograd.grad(z, leaves, normal(*got.shape, seed=5)) for z in (got, want)), strict=True):
        close(g, w)


def test_authors_numbers():
    z = vectors("one")
    x = z["x"].requires_grad_()
    out = given("one")(x)
    close(out.detach(), z["out"])
    close(torch.autograd.grad(out, x, z["w"])[0], z["gx"])


def test_authors_numbers_of_another_width():
    """Queries and keys twice as wide as the output, which is not as wide as the input."""
    z, p = vectors("two"), vectors("two_p")
    x = z["x"].requires_grad_()
    q, k = (unit(F.linear(x, p[f"to_{n}.weight"], p[f"to_{n}.bias"])) for n in ("query", "key"))
    g = global_query(q, p["w_g"][:, 0], scale=3**-0.5)
    out = F.linear(F.linear(g * k, p["Proj.weight"], p["Proj.bias"]) + q, p["final.weight"], p["final.bias"])
    close(out.detach(), z["out"])
    close(torch.autograd.grad(out, x, z["w"])[0], z["gx"])


def test_first_release():
    """A softmax of one number is 1: all queries weigh the same."""
    close(given("one", weights="sum")(vectors("one")["x"]), vectors("hfdefect")["out"])


@torch.no_grad()
def test_only_the_direction_of_w_counts():
    """The claim: with norms, scaling w changes nothing, and turning it round turns what is added to the query."""
    layer, x = built(bias=False), normal(2, 7, 6)
    out, own = layer(x), layer.o_proj(unit(layer.q_proj(x)))
    layer.direction *= 2
    close(layer(x), out)
    layer.direction *= -1
    close(layer(x) - own, own - out)
    assert (out - own).abs().max() > 0.01
    soft = built(weights="softmax")
    before = soft(x)
    soft.direction *= 2
    assert (soft(x) - before).abs().max() > 1e-4


@torch.no_grad()
def test_no_square_matrix():
    T, sizes = 512, []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
            return out

    layer, x = EfficientAdditive(8), torch.randn(1, T, 8)
    with Watch():
        layer(x, mask=torch.arange(T)[None] < 500)
    assert max(sizes) <= 8 * T


@torch.no_grad()
@pytest.mark.parametrize("weights", ["norm", "softmax", "sum"])
def test_hidden_tokens_are_not_there(weights: str):
    layer, x = built(weights=weights, expansion=2), normal(1, 7, 6)
    close(layer(x, mask=masks.padding(torch.arange(7)[None] < 4))[:, :4], layer(x[:, :4]))


def test_starts_as_the_authors_code():
    """w standard normal, linear layers as torch's."""
    torch.manual_seed(0)
    layer = regard.create("efficient_additive", dim=64, num_heads=2, expansion=8)
    assert layer.direction.shape == (512,)
    assert abs(float(layer.direction.std()) - 1) < 0.1
    assert layer.q_proj.weight.shape == (512, 64)
    assert float(layer.q_proj.weight.abs().max()) <= 1 / 8
    assert layer.mix_proj.bias is not None


def test_refusals():
    with pytest.raises(ValueError, match=r"expansion is too small \(got 0\); expected an int >= 1"):
        EfficientAdditive(8, expansion=0)
    with pytest.raises(
        ValueError, match=r"weights is unknown \(got 'mean'\); expected one of 'norm', 'softmax', 'sum'"
    ):
        EfficientAdditive(8, weights="mean")
    with pytest.raises(ValueError, match="causal"):
        regard.create("efficient_additive", dim=8, num_heads=2, causal=True)
    with pytest.raises(ValueError, match=r"direction is missing \(got None\); expected \(P = 6,\)"):
        global_query(normal(1, 2, 6), None)
    with pytest.raises(ValueError, match="direction has the wrong shape"):
        global_query(normal(1, 2, 6), normal(5))
