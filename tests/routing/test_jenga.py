"""Jenga's curve, choice and outputs against loops, the authors' numbers (A107), and exact attention.

The loops' author has read neither the code nor these tests.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from regard import masks
from regard.laws.agreement import close
from regard.routing import (
    Carve,
    TextBias,
    carve,
    carve_blocks,
    curve_neighbours,
    gilbert_order,
    kept,
    progressive,
    text_amplifier,
)  # fmt: skip
from regard.routing.jenga import jenga
from routing import naive_jenga as naive

VECTORS = Path(__file__).parents[1] / "vectors" / "A107.npz"
BOXES = [(3, 4, 6), (2, 5, 7), (4, 4, 4), (5, 3, 2)]


def heads(seed: int, T: int, *, B: int = 2, H: int = 4, G: int = 2, D: int = 3) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    sizes = ((B, H, T, D), (B, G, T, D), (B, G, T, D + 2))
    return [torch.randn(n, generator=g, dtype=torch.float64).requires_grad_() for n in sizes]


def stored(prefix: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(prefix): torch.from_numpy(np.asarray(file[k])) for k in file if k.startswith(prefix)}


@pytest.mark.parametrize("sizes", BOXES, ids=str)
def test_gives_the_authors_curves(sizes: tuple[int, int, int]) -> None:
    z = stored(f"curve_{'x'.join(map(str, sizes))}_")
    place, order = gilbert_order(*sizes)
    assert torch.equal(place, z["place"])
    assert torch.equal(order, z["order"])
    assert torch.equal(curve_neighbours(*sizes, 8), z["neighbours_block8"])


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), (1, 1, 6), (7, 1, 1), (1, 5, 2), (6, 1, 5), (2, 3, 9), (3, 7, 5), (5, 4, 5)]
)
def test_is_the_curve_of_the_loops(sizes: tuple[int, int, int]) -> None:
    place, order = gilbert_order(*sizes)
    theirs = naive.gilbert_order(*sizes)
    assert torch.equal(place, theirs[0])
    assert torch.equal(order, theirs[1])
    for block in (1, 3, 4, 100):
        assert torch.equal(curve_neighbours(*sizes, block), naive.curve_neighbours(*sizes, block))


def test_steps_go_to_neighbours() -> None:
    """Straight ones where all sides are even; odd sides leave a few diagonal ones."""
    for sizes in itertools.product((2, 3, 4, 6, 8), repeat=3):
        order = gilbert_order(*sizes)[1]
        assert order.sort().values.tolist() == list(range(math.prod(sizes)))
        steps = torch.stack(torch.unravel_index(order, sizes), 1).diff(dim=0).abs()
        assert steps.max() <= 1
        if not any(n % 2 for n in sizes):
            assert (steps.sum(1) == 1).all()


CASES: list[tuple[tuple[int, int, int], int, dict[str, Any], float]] = [
    ((2, 3, 4), 4, {"block": 4, "top_k": 2, "mass": 0.3}, 0.0),
    ((2, 4, 4), 6, {"block": 4, "top_k": 1, "mass": 0.7}, 0.9),
    ((3, 2, 4), 0, {"block": 3, "top_k": 0, "mass": 0.0}, 0.0),
    ((1, 4, 5), 3, {"block": 2, "top_k": 3, "mass": 0.9}, -0.5),
    ((3, 3, 2), 5, {"block": 4, "top_k": 1, "mass": 0.2}, 0.4),  # text begins within a block
]


@pytest.mark.parametrize(("sizes", "num_text", "options", "bias"), CASES)
def test_is_the_definition(sizes: tuple[int, int, int], num_text: int, options: dict[str, Any], bias: float) -> None:
    block, N = options["block"], math.prod(sizes)
    q, k, v = heads(num_text, N + num_text, B=1, H=2)
    near = naive.curve_neighbours(*sizes, block)
    tiles = naive.carve(q, k, num_text=num_text, neighbours=near, **options)
    got = carve_blocks(q.detach(), k.detach(), num_text=num_text, neighbours=curve_neighbours(*sizes, block), **options)
    if N % block == 0:  # else the loops' text is blocks
        assert torch.equal(got[:, :, : tiles.shape[2]], tiles)
        assert got[:, :, tiles.shape[2] :].all()
        want = naive.attend(q, k, v, tiles, num_text=num_text, block=block, amp=bias)
        out = regard.attention(q, k, v, **jenga(num_text=num_text, sizes=sizes, text_bias=bias, **options))
        close(out, want, "out")
        g = torch.randn(out.shape, dtype=torch.float64)
        for mine, theirs, name in zip(*(torch.autograd.grad((o * g).sum(), (q, k, v)) for o in (out, want)), "qkv"):
            close(mine, theirs, f"gradient of {name}")
    else:
        assert torch.equal(got[:, :, : tiles.shape[2], : tiles.shape[2]], tiles[..., : tiles.shape[2]])
        assert got[:, :, tiles.shape[2] :].all()
        assert got[..., tiles.shape[2] :].all()


@pytest.mark.parametrize(("case", "sizes"), [("a", (3, 4, 6)), ("b", (2, 5, 6))])
def test_gives_the_authors_numbers(case: str, sizes: tuple[int, int, int]) -> None:
    z = stored(f"{case}_")
    q, k, v = (z[name].requires_grad_() for name in "qkv")
    block, top_k, mass = int(z["block"]), int(z["top_k"]), float(z["p"])
    num_text = int(z["text_blocks"]) * block
    assert torch.equal(curve_neighbours(*sizes, block), z["neighbours"])
    tiles = carve_blocks(
        q.detach(), k.detach(), num_text=num_text, block=block, top_k=top_k, mass=mass, neighbours=z["neighbours"]
    )
    n = z["block_mask"].shape[2]
    assert torch.equal(tiles[:, :, :n], z["block_mask"])
    parts = jenga(block=block, top_k=top_k, mass=mass, num_text=num_text, sizes=sizes, text_bias=float(z["amp"]))
    y = regard.attention(q, k, v, **parts)
    close(y, z["y"], "y")
    grads = torch.autograd.grad((y * z["w"]).sum(), (q, v))
    for got, name in zip(grads, "qv", strict=True):
        close(got, z[f"g{name}"], f"gradient of {name}")


def smooth(sizes: tuple[int, int, int], width: int, g: torch.Generator) -> Tensor:
    """A random field (T Y X, width), even over about three tokens along each axis."""
    field = torch.randn(1, width, *sizes, generator=g)
    for _ in range(4):
        field = torch.nn.functional.avg_pool3d(torch.nn.functional.pad(field, (1,) * 6, mode="replicate"), 3, 1)
    return 2.5 * (field / field.std())[0].flatten(1).T


@pytest.mark.parametrize("seed", range(3))
def test_the_curve_finds_more(seed: int) -> None:
    sizes, block = (8, 8, 16), 32
    x = smooth(sizes, 8, torch.Generator().manual_seed(seed))[None, None]
    order = gilbert_order(*sizes)[1]
    own = torch.eye(32, dtype=torch.bool)
    mass = {}
    for name, tokens in (("rows", x), ("curve", x[:, :, order])):
        report = kept(tokens, tokens, carve(tokens, tokens, block=block, top_k=4, mass=0.0, neighbours=own))
        mass[name] = float(report.mass)
        assert report.pairs < 0.15
    assert mass["curve"] > mass["rows"] + 0.05
    # And with blocks that touch, through the part itself.
    report = kept(x[:, :, order], x[:, :, order], Carve(block=block, sizes=sizes)(x[:, :, order], x[:, :, order], None))
    assert report.pairs < 0.5
    assert report.mass.min() > 0.85


def test_blocks_along_the_curve_are_compact() -> None:
    sizes, block = (8, 16, 16), 64
    at = torch.stack(torch.unravel_index(torch.arange(math.prod(sizes)), sizes), 1)

    def diameter(places: Tensor) -> float:
        blocks = places.unflatten(0, (-1, block))
        return float((blocks[:, :, None] - blocks[:, None]).abs().sum(3).amax((1, 2)).double().mean())

    assert diameter(at[gilbert_order(*sizes)[1]]) < 0.6 * diameter(at)


def test_more_drop_keeps_less_and_more_mass_keeps_more() -> None:
    q, k, v = (z.detach() for z in heads(1, 64))

    def share(**options: Any) -> float:
        return float(carve_blocks(q, k, block=2, **options).double().mean())

    assert share(drop=0.9, mass=0.1) < share(drop=0.5, mass=0.1)
    assert share(drop=0.9, mass=0.1) < share(drop=0.9, mass=0.8)
    assert share(drop=1.0, mass=0.0) < share(top_k=20, drop=1.0, mass=0.0)
    dense = regard.attention(q, k, v)
    for options in ({"mass": 1.0}, {"drop": 0.0}, {"top_k": 32}):
        close(regard.attention(q, k, v, selector=Carve(block=2, **options)), dense)
    # What drop leaves is rounded down: 32 * (1 - 0.7625) = 7.6 blocks, and the own one.
    count = carve_blocks(q, k, block=2, drop=0.7625, mass=0.0, neighbours=torch.eye(32, dtype=torch.bool)).sum(3)
    assert (count.min(), count.max()) == (7, 8)


def test_all_mass_is_all_blocks_though_sums_are_rounded() -> None:
    g = torch.Generator().manual_seed(0)
    q, k = 2 * torch.randn(2, 1, 4, 128, 4, generator=g)
    p = (q @ k.mT / 2).softmax(3).sort(descending=True).values
    assert (p.cumsum(3)[..., :-1] > 1).any(), "else the test tells nothing"
    assert carve_blocks(q, k, block=1, drop=1.0, mass=1.0).all()


@pytest.mark.parametrize("num_text", [0, 4])
def test_padding_is_not_judged(num_text: int) -> None:
    """Image tokens are hidden at the end, or text is where there is any."""
    q, k, v = (z.detach() for z in heads(4, 24))
    selector = Carve(block=2, drop=0.7, num_text=num_text, sizes=(2, 2, 5) if num_text else None)
    T = 22 if num_text else 13
    mask = masks.padding(torch.arange(24) < torch.tensor([[24], [T]]))
    got = regard.attention(q, k, v, mask=mask, selector=selector)
    some = [z[1:, :, :T] for z in (q, k, v)]
    alone = Carve(block=2, drop=0.7, num_text=num_text - 2, sizes=(2, 2, 5)) if num_text else selector
    close(got[1:, :, :T], regard.attention(*some, selector=alone))
    assert not (got - regard.attention(q, k, v, mask=mask))[1, :, :T].abs().max() < 1e-3
    hidden = [
        torch.where(torch.arange(24)[:, None] < torch.tensor([24, T])[:, None, None, None], z, torch.nan)
        for z in (q, k, v)
    ]
    assert torch.equal(regard.attention(*hidden, mask=mask, selector=selector)[1, :, :T], got[1, :, :T])


def test_a_nan_stays_to_be_seen() -> None:
    q, k, v = (z.detach() for z in heads(7, 40))
    k[0, 0, 6] = torch.nan
    out = regard.attention(q, k, v, selector=Carve(block=2, drop=0.8))
    assert out[0, :2].isnan().all()
    assert not out[0, 2:].isnan().any()
    assert not out[1].isnan().any()


def test_a_layer_along_the_curve() -> None:
    """Tokens and their places along the curve, and back: with all kept it is the layer itself."""
    sizes = (2, 4, 4)
    torch.manual_seed(0)
    layer = regard.create("jenga", dim=8, num_heads=2, block=4, num_text=4, sizes=sizes, mass=1.0).double()
    plain = regard.create("softmax", dim=8, num_heads=2).double()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(2, 36, 8, dtype=torch.float64)
    place, order = gilbert_order(*sizes)
    out = layer(torch.cat([x[:, order], x[:, 32:]], 1))
    close(torch.cat([out[:, place], out[:, 32:]], 1), plain(x))


def test_a_bias_on_text() -> None:
    """An image query weighs text twice for each 1 of it; text queries are as before."""
    q, k, _ = (z.detach() for z in heads(3, 12, G=4))
    v = torch.eye(12, dtype=torch.float64).expand(2, 4, 12, 12)  # outputs are weights
    plain = regard.attention(q, k, v)
    biased = regard.attention(q, k, v, score_mix=TextBias(8, 2.0))
    odds = [w[:, :, :8, 8:].sum(3) / w[:, :, :8, :8].sum(3) for w in (biased, plain)]
    close(odds[0], 4 * odds[1])
    close(biased[:, :, 8:], plain[:, :, 8:])
    parts = regard.create("jenga", dim=8, num_heads=2, block=2, sizes=(2, 2, 2), num_text=4, text_bias=1.0)
    assert isinstance(parts.score_mix, TextBias)
    assert regard.create("jenga", dim=8, num_heads=2).score_mix is None


def test_rising_resolution() -> None:
    """The authors' two stages of 50 steps at 720p, and three; a stage still has the step at which it ends."""
    two = progressive((32, 45, 80), 50)
    assert [stage.steps for stage in two] == [range(26), range(26, 50)]
    assert [stage.sizes for stage in two] == [(32, 33, 60), (32, 45, 80)]
    assert [stage.drop for stage in two] == [0.75, 0.85]
    assert two[0].text_bias == pytest.approx(naive.text_amp(32 * 33 * 60, 32 * 45 * 80))
    assert two[1].text_bias == 0
    three = progressive(
        (32, 45, 80), 50, resolutions=(0.5, 0.75, 1), until=(0.3, 0.5, 1), drops=(0.75, 0.85, 0.85), scale=0.5
    )
    assert [stage.steps for stage in three] == [range(16), range(16, 26), range(26, 50)]
    assert three[0].text_bias == pytest.approx(naive.text_amp(32 * 22 * 40, 32 * 45 * 80, 0.5))
    assert [stage.text_bias for stage in three[1:]] == [0, 0]
    even = progressive((32, 45, 80), 5, resolutions=(1, 1))
    assert [(stage.steps, stage.text_bias) for stage in even] == [(range(3), 0), (range(3, 5), 0)]
    assert text_amplifier(25, 100) == pytest.approx(1)
    jenga(num_text=256, **{name: getattr(two[0], name) for name in ("sizes", "drop", "text_bias")})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"drop": 1.5}, r"Carve: drop is out of range \(got 1\.5\)"),
        ({"mass": -0.1}, r"Carve: mass is out of range \(got -0\.1\)"),
        ({"block": 0}, r"Carve: block is too small \(got 0\)"),
        ({"top_k": -1}, r"Carve: top_k is too small \(got -1\)"),
        ({"num_text": -1}, r"Carve: num_text is too small \(got -1\)"),
        ({"sizes": (2, 3)}, r"Carve: sizes are not those of a video \(got \(2, 3\)\); expected \(T, Y, X\)"),
        ({"sizes": (2, 0, 3)}, r"Carve: sizes' Y is too small \(got 0\)"),
        ({"text_bias": 1.0}, r"jenga: text_bias has no text to act on \(got 1\.0\); expected sizes and num_text"),
    ],
)
def test_refuses_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        jenga(**options)


def test_refuses_masks_lengths_and_stages() -> None:
    q, k, v = (z.detach() for z in heads(6, 8))
    for mask in (masks.causal(), masks.window(3)):
        with pytest.raises(ValueError, match=r"carve: mask is more than padding"):
            regard.attention(q, k, v, mask=mask, selector=Carve(block=4))
    with pytest.raises(
        ValueError, match=r"carve: k is of another length than q \(got 5\); expected 8, the same tokens"
    ):
        carve(q, k[:, :, 3:])
    with pytest.raises(ValueError, match=r"carve: num_text is more than all tokens \(got 9\); expected at most 8"):
        carve(q, k, num_text=9)
    with pytest.raises(ValueError, match=r"carve: neighbours are those of other blocks .*; expected bool \(4, 4\)"):
        carve(q, k, block=2, neighbours=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"Carve: q has another number of tokens \(got 8\); expected 6 of the box"):
        regard.attention(q, k, v, selector=Carve(sizes=(1, 2, 3), num_text=1))
    with pytest.raises(ValueError, match=r"gilbert_order: T is too small"):
        gilbert_order(0, 1, 1)
    with pytest.raises(ValueError, match=r"progressive: drops are for another number of stages"):
        progressive((2, 4, 4), 8, drops=(0.5,))
    with pytest.raises(ValueError, match=r"progressive: until leaves stages or steps of 8 out"):
        progressive((2, 4, 4), 8, until=(0.5, 0.5))
