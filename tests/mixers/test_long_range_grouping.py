"""Long-range grouping attention against loops, whose author saw the equations only, and the authors' numbers."""

import pytest
import torch
from torch import Tensor, nn

import regard
from mixers import naive_long_range_grouping as naive
from regard import masks
from regard.laws.agreement import close
from regard.mixers.long_range_grouping import LongRangeGroupingAttention, grouping_attention
from vision.shared import filled, gradients, leaves, normal, vectors


def made(dim: int = 4, heads: int = 2, **options) -> LongRangeGroupingAttention:
    return filled(regard.create("long_range_grouping", dim=dim, num_heads=heads, **options))


def oracle(layer: LongRangeGroupingAttention, x: Tensor) -> Tensor:
    given = [getattr(getattr(layer, f"{n}_proj"), kind) for n in "qkvo" for kind in ("weight", "bias")]
    conv = (None, None) if layer.conv is None else (layer.conv.weight, layer.conv.bias)
    own = {"grid": layer.size, "heads": layer.num_heads, "stride": layer.stride, "grouped": layer.views == "joined"}
    return naive.lga(x.unflatten(1, (-1, layer.size[0] * layer.size[1])), *given, *conv, **own).flatten(1, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"size": (4, 2), "stride": 2},
        {"size": (3, 6), "stride": 3, "signature": False},
        {"size": (2, 4), "stride": 1},
        {"size": (2, 4), "stride": 2, "views": "apart"},
    ],
)
def test_is_the_definition(options: dict) -> None:
    layer = made(**options)
    (x,) = leaves(normal(1, 1, 2 * layer.size[0] * layer.size[1], 4))
    got, want = layer(x), oracle(layer, x)
    close(got, want)
    inputs = [x, *layer.parameters()]
    for g, w in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        close(g, w)


@pytest.mark.parametrize(("case", "views", "stride"), [("a", 2, 7), ("b", 3, 2)])
def test_gives_the_authors_numbers(case: str, views: int, stride: int) -> None:
    z = vectors("A079", case)
    layer = regard.create("long_range_grouping", dim=4, num_heads=2, stride=stride).double()
    state = {f"{n}_proj.{kind}": z[f"{letter}{n}"] for n in "qkvo" for kind, letter in (("weight", "W"), ("bias", "b"))}
    layer.load_state_dict(state | {"conv.weight": z["Wc"], "conv.bias": z["bc"]})
    (x,) = leaves(z["x"].unflatten(0, (-1, views)).flatten(1, 2))
    out = layer(x)
    (out * z["w"].view_as(out)).sum().backward()
    found = {"out": out, "grad_x": x.grad, "grad_Wk": layer.k_proj.weight.grad, "grad_Wc": layer.conv.weight.grad}
    for name, got in found.items():
        assert (got - z[name].view_as(got)).abs().max() < 1e-10, name


@pytest.mark.parametrize("views", ["joined", "apart"])
def test_hidden_tokens_and_those_that_are_missing_are_none(views: str) -> None:
    layer = made(size=(4, 2), stride=2, views=views)
    x = normal(1, 2, 24, 4)
    keep = torch.ones(2, 24, dtype=torch.bool)
    keep[0, 19:] = False
    keep[1, 8:16] = False
    hurt = x.masked_fill(~keep[..., None], torch.nan)
    for mask in (keep, masks.padding(keep)):
        got = layer(hurt, mask=mask)
        close(got[:1, :19], layer(x[:1, :19]))
        close(got[1:, keep[1]], layer(x[1:, keep[1]]))


def test_a_token_reaches_its_residues_and_its_neighbours() -> None:
    layer, x = made(size=(6, 6), stride=3), normal(1, 1, 72, 4)
    other = x.clone()
    y0, x0 = 1, 4
    other[:, y0 * 6 + x0] += 1
    moved = ((layer(other) - layer(x))[0].abs().amax(-1) > 1e-9).view(2, 6, 6)
    for view in range(2):
        for i in range(6):
            for j in range(6):
                like = (i - y0) % 3 == 0 and (j - x0) % 3 == 0
                near = view == 0 and abs(i - y0) <= 1 and abs(j - x0) <= 1
                assert moved[view, i, j] == (like or near), (view, i, j)


def test_views_have_no_order_and_may_be_any_number() -> None:
    layer, x = made(size=(2, 4), stride=2), normal(1, 2, 5, 8, 4)
    order = torch.tensor([3, 0, 4, 1, 2])
    close(layer(x[:, order].flatten(1, 2)), layer(x.flatten(1, 2)).view_as(x)[:, order].flatten(1, 2))
    alone = made(size=(2, 4), stride=2, views="apart")
    close(alone(x.flatten(1, 2)).view_as(x)[:, 2], alone(x[:, 2]))


def test_learns_what_another_view_shows() -> None:
    """One view shows a sign at each place, the other is asked for it: at chance where views are apart."""
    right = {}
    for views in ("joined", "apart"):
        torch.manual_seed(0)
        layer = regard.create("long_range_grouping", dim=8, num_heads=2, size=(2, 2), stride=2, views=views)
        read = nn.Linear(8, 1)
        optimiser = torch.optim.Adam([*layer.parameters(), *read.parameters()], lr=0.02)
        for _ in range(120):
            x, signs = shown(64)
            loss = nn.functional.soft_margin_loss(read(layer(x))[:, 4:, 0], signs)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        x, signs = shown(500)
        right[views] = float((read(layer(x))[:, 4:, 0].sign() == signs).float().mean())
    assert right["joined"] > 0.95
    assert right["apart"] < 0.6


def shown(batch: int) -> tuple[Tensor, Tensor]:
    """Two views of four places, and what the first one shows."""
    x, signs = torch.randn(batch, 2, 4, 8), torch.randint(2, (batch, 4)) * 2.0 - 1
    x[:, 0, :, 0], x[:, 1, :, 0] = signs, 0
    x[:, 0, :, 1], x[:, 1, :, 1] = 1, -1
    return x.flatten(1, 2), signs


def test_starting_values() -> None:
    layer = regard.create("long_range_grouping", dim=16, num_heads=4)
    assert (layer.size, layer.stride, layer.views) == ((14, 14), 7, "joined")
    assert layer.conv.weight.shape == (16, 1, 3, 3)
    for proj in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
        assert 0.9 / 4 < float(proj.weight.detach().abs().max()) <= 1 / 4
        assert proj.bias.any()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"stride": 3}, "size is no multiple of stride = 3"),
        ({"size": 14}, "size is no pair"),
        ({"views": "mixed"}, "views is unknown"),
        ({"heads": 3}, "num_heads"),
        ({"dropout": 2.0}, "dropout is out of range"),
    ],
)
def test_refuses(wrong: dict, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        made(**wrong)


def test_the_function_refuses() -> None:
    q = normal(0, 1, 2, 8, 3)
    with pytest.raises(ValueError, match="T is no multiple of view = 6"):
        grouping_attention(q, q, q, size=(2, 3), stride=1)
    with pytest.raises(ValueError, match="k has other heads or tokens than q"):
        grouping_attention(q, q[:, :, :4], q[:, :, :4], size=(2, 2), stride=2)
