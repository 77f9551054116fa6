"""Global context against loops over pixels, and timm's numbers (B199)."""

import pytest
import torch

from laws.measured import flops
from regard.laws.agreement import close
from regard.vision import GlobalContext
from vision.gates import affine, equals_the_loops, gives_the_numbers
from vision.naive_gates import global_context
from vision.shared import filled, leaves, normal


@pytest.mark.parametrize("fuse", ["add", "scale"])
@pytest.mark.parametrize("sizes", [(3, 2), (1, 1)])
def test_equals_the_loops(sizes: tuple[int, int], fuse: str) -> None:
    layer = filled(GlobalContext(4, inner_dim=3, fuse=fuse, eps=1e-3))
    (x,) = leaves(normal(1, 2, 4, *sizes))
    mlp = layer.mlp
    want = global_context(x, *affine(layer.score, mlp.down, mlp.norm, mlp.up), form=fuse, ln_eps=1e-3)
    equals_the_loops(layer, layer(x), want, x)


@pytest.mark.parametrize(("case", "fuse"), [("gc", "scale"), ("gca", "add")])
def test_gives_timms_numbers(case: str, fuse: str) -> None:
    names = {"conv_attn": "score"}
    names |= {f"mlp_{fuse}__{n}": f"mlp.{o}" for n, o in (("fc1", "down"), ("norm", "norm"), ("fc2", "up"))}
    gives_the_numbers(GlobalContext(12, inner_dim=4, fuse=fuse, eps=1e-6), "B199", case, names)


def test_every_place_gets_the_same_at_linear_cost() -> None:
    layer, x = filled(GlobalContext(4)), normal(1, 2, 4, 5, 3)
    added = (layer(x) - x).flatten(2)
    close(added, added[..., :1].expand(added.shape))
    one, two, three = (flops(lambda n=n: layer(normal(0, 1, 4, 8, n))) for n in (8, 16, 24))
    assert three - two == two - one == 2 * 8 * 8 * 2 * 4


def test_starts_as_the_identity() -> None:
    torch.manual_seed(0)
    layer, x = GlobalContext(8).double(), normal(1, 2, 8, 3, 4)
    assert torch.equal(layer(x), x)


def test_volumes_are_maps_too() -> None:
    layer, x = filled(GlobalContext(4, fuse="scale")), normal(2, 2, 4, 2, 3, 2)
    close(layer(x).flatten(2), layer(x.flatten(2)))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"fuse is unknown \(got 'both'\)"):
        GlobalContext(8, fuse="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"eps is out of range \(got 0\)"):
        GlobalContext(8, eps=0)
