"""ShiftViT's shift against loops over pixels, and the authors' numbers (B047)."""

import pytest
import torch
import torch.nn.functional as F

from regard.laws.agreement import close, same
from regard.vision.shift import Shift, shift
from vision.naive_shift import naive_shift, naive_shift_block
from vision.shared import gradients, leaves, normal, vectors


@pytest.mark.parametrize(
    ("C", "Y", "X", "n_div"), [(4, 3, 3, 4), (13, 4, 5, 6), (9, 1, 4, 4), (12, 5, 1, 12), (8, 1, 1, 5)]
)
def test_equals_the_loops(C: int, Y: int, X: int, n_div: int) -> None:
    (x,) = leaves(normal(0, 2, C, Y, X))
    got, want = shift(x, n_div=n_div), naive_shift(x, n_div)
    same(got, want)
    same(gradients(got, [x])[0], gradients(want, [x])[0])


@pytest.mark.parametrize("case", ["c1", "c2"])
def test_gives_the_authors_numbers(case: str) -> None:
    z = vectors("B047", case)
    (x,) = leaves(z["x"])
    n_div = int(z["n_div"])
    moved = shift(x, n_div=n_div)
    same(moved, z["shift"])
    same(torch.autograd.grad((moved * z["w"]).sum(), x)[0], z["gx_shift"])
    names = ("norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias")
    p = [z["P_" + name] for name in names]
    moved = shift(x, n_div=n_div)
    normed = F.group_norm(moved, 1, p[0], p[1])
    block = moved + F.conv2d(F.gelu(F.conv2d(normed, p[2], p[3])), p[4], p[5])
    close(block, z["out"])
    close(torch.autograd.grad((block * z["w"]).sum(), x)[0], z["gx"])
    pointwise = [w[..., 0, 0] if w.ndim == 4 else w for w in p]
    close(naive_shift_block(z["x"], n_div, *pointwise), z["out"])


def test_costs_nothing_and_only_moves() -> None:
    layer = Shift(12, n_div=4)
    assert not list(layer.parameters())
    x = normal(1, 1, 12, 4, 5)
    y = layer(x)
    assert set(y.flatten().tolist()) <= {*x.flatten().tolist(), 0.0}
    back = torch.cat([y[:, 3:6], y[:, :3], y[:, 9:], y[:, 6:9]], 1)  # left goes right, up goes down
    back = shift(back, n_div=4)
    back = torch.cat([back[:, 3:6], back[:, :3], back[:, 9:], back[:, 6:9]], 1)
    same(back[..., 1:-1, 1:-1], x[..., 1:-1, 1:-1])


def test_layers_see_as_far_as_there_are_of_them() -> None:
    """With channels mixed in between, l layers see |dy| + |dx| <= l."""
    (x,) = leaves(normal(2, 1, 8, 9, 9))
    layer, mix = Shift(8, n_div=6), normal(3, 8, 8, 1, 1)
    y, far = x, (torch.arange(9) - 4).abs()
    for layers in (1, 2, 3):
        y = F.conv2d(layer(y), mix)
        seen = torch.autograd.grad(y[0, :, 4, 4].sum(), x, retain_graph=True)[0].ne(0).any(1)[0]
        same(seen, far[:, None] + far <= layers)


def test_bad_input() -> None:
    for n_div in (3, 13):
        with pytest.raises(ValueError, match="n_div"):
            Shift(12, n_div=n_div)
    with pytest.raises(ValueError, match=r"x has the wrong shape .* expected \(B, C = 12, Y, X\)"):
        Shift(12)(normal(0, 2, 12, 5))
