"""Based against loops (naive_based.py, whose author has read neither code nor tests), against numbers of
flash-linear-attention, and what it promises."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from linear import naive_based as naive
from regard.laws.agreement import close
from regard.linear import Based, taylor_attention
from regard.models.mixer import layers
from regard.models.window_and_based import window_and_based
from regard.spec import parse_stack

VECTORS = Path(__file__).parents[1] / "vectors" / "based_naive.npz"


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients_agree(got: Tensor, want: Tensor, leaves: list[Tensor]) -> None:
    close(got.detach(), want.detach())
    along = normal(9, *got.shape)
    for g, w in zip(*(torch.autograd.grad(z, leaves, along) for z in (got, want)), strict=True):
        close(g, w)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("sizes", [(2, 2, 6, 3, 4), (1, 1, 1, 1, 2)], ids=str)
def test_equals_the_loops(sizes: tuple[int, ...], normalise: bool) -> None:
    B, H, T, F, V = sizes
    leaves = [normal(n, B, H, T, w).requires_grad_() for n, w in enumerate((F, F, V))]
    for eps in (1e-6, 0.5):
        got = taylor_attention(*leaves, causal=True, eps=eps, normalise=normalise).out
        gradients_agree(got, naive.based(*leaves, eps=eps, normalise=normalise)[0], leaves)


def test_the_state_is_that_of_the_loops() -> None:
    """Of the loops' symmetric half; a query's features hold the other weight of a pair, so rows differ by a factor."""
    q, k, v = (normal(n, 2, 2, 6, w) for n, w in enumerate((3, 3, 4)))
    got = taylor_attention(q, k, v, causal=True)
    out, sums = naive.based_recurrent(q, k, v, feature=naive.taylor2_half)
    close(got.out, out)
    assert got.state.shape == sums.shape == (2, 2, 1 + 3 + 6, 5)
    close(got.state[:, :, :4], sums[:, :, :4])
    on = taylor_attention(q, k, v, causal=True, state=got.state)
    close(on.out, naive.based_recurrent(q, k, v, feature=naive.taylor2_half, state=sums)[0])


def test_gives_the_numbers_of_flash_linear_attention() -> None:
    with np.load(VECTORS) as file:
        z = {name[2:]: torch.from_numpy(file[name]) for name in file}
    leaves = [z[n].requires_grad_() for n in "qkv"]
    out = taylor_attention(*leaves, causal=True).out
    assert (out - z["out"]).abs().max() < 1e-10
    for g, n in zip(torch.autograd.grad(out, leaves, z["w"]), "qkv", strict=True):
        assert (g - z[f"g{n}"]).abs().max() < 1e-10


@pytest.mark.parametrize("options", [{}, {"normalise": False}, {"eps": 0.5, "feature_dim": 5, "head_dim": 3}], ids=str)
def test_the_layer(options: dict) -> None:
    layer = regard.create("based", dim=8, num_heads=2, causal=True, dtype=torch.float64, **options)
    x = normal(1, 2, 6, 8)
    q, k = (
        p(x).unflatten(-1, (2, options.get("feature_dim", 16))).transpose(1, 2) for p in (layer.q_proj, layer.k_proj)
    )
    v = layer.v_proj(x).unflatten(-1, (2, options.get("head_dim", 4))).transpose(1, 2)
    told = {n: options[n] for n in ("normalise", "eps") if n in options}
    close(layer(x), layer.o_proj(naive.based(q, k, v, **told)[0].transpose(1, 2).flatten(2)))


def test_linear_takes_its_features() -> None:
    layer = regard.create("linear", dim=8, num_heads=2, causal=True, feature="taylor", dtype=torch.float64)
    x = normal(1, 2, 6, 8)
    close(layer(x), layer.merge(naive.based(*layer.split(x, x), eps=0.0)[0]))
    assert layer.init_state(2, 6).sums.shape == (2, 2, 1 + 4 + 10, 5)
    with pytest.raises(ValueError, match="LinearAttention: feature is unknown"):
        regard.create("linear", dim=8, num_heads=2, feature="taylor3")


def test_it_is_softmax_where_scores_are_small() -> None:
    """|exp(s) - w| <= |s|^3 / 6 exp(max(s, 0)): halved scores come eight times as near."""
    q, k, v = normal(1, 1, 1, 40, 16), normal(2, 1, 1, 40, 16), normal(3, 1, 1, 40, 4)

    def off(size: float) -> float:
        z = size * q
        return float(((z @ k.mT / 4).softmax(-1) @ v - taylor_attention(z, k, v, eps=0.0).out).abs().max())

    assert 1e-6 < off(0.1) < 1e-3
    assert 6 < off(0.1) / off(0.05) < 10


def test_more_features_recall_more() -> None:
    """Each of 48 keys, drawn at random, asks for its value: interference of the others falls with their width."""

    def recalled(F: int) -> float:
        k = torch.nn.functional.normalize(normal(F, 1, 1, 48, F), dim=-1) * (40 * F**0.5) ** 0.5  # k . k / sqrt(F) = 40
        v = torch.nn.functional.normalize(normal(100, 1, 1, 48, 12), dim=-1)
        read = taylor_attention(k, k, v).out
        return float(((read @ v.mT)[0, 0].argmax(-1) == torch.arange(48)).double().mean())

    found = [recalled(F) for F in (4, 8, 16, 32)]
    assert found == sorted(found)
    assert found[0] < 0.2
    assert found[-1] > 0.95


def test_the_hybrid() -> None:
    """Layers of a window and of `based` in turn."""
    assert window_and_based() == "window(window=64)*1+based(feature_dim=16)*1"
    text = window_and_based(window=3, feature_dim=4, based=2)
    assert [s.name for s in parse_stack(text).layers(7)] == ["window", "based", "based"] * 2 + ["window"]
    torch.manual_seed(0)
    made = layers(text, dim=8, num_heads=2, depth=3, causal=True)
    first, second = made[0], made[1]
    assert first.receptive_field().dense(6)[0, 0].sum(-1).tolist() == [1, 2, 3, 3, 3, 3]
    assert second.feature_dim == 4
    assert second.receptive_field().dense(6).sum() == 21
    for wrong in ({"window": 0}, {"feature_dim": 0}, {"based": 0}, {"windows": 0}):
        with pytest.raises(ValueError, match=f"window_and_based: {next(iter(wrong))}"):
            window_and_based(**wrong)


def test_refusals() -> None:
    for options, words in (
        ({"feature_dim": 0}, "Based: feature_dim is too small"),
        ({"eps": -1.0}, "Based: eps is out of range"),
    ):
        with pytest.raises(ValueError, match=words):
            Based(8, 2, **options)
    with pytest.raises(TypeError, match="normalise"):
        Based(8, 2, normalise=1)  # type: ignore[arg-type]
