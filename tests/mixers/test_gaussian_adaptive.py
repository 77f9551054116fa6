"""GAAM against loops over lines, whose author read neither code nor test, and the authors' numbers (B040)."""

import math

import pytest
import torch
from torch import Tensor

import regard
from mixers import naive_gaussian_adaptive as naive
from regard import masks
from regard.laws.agreement import close, same
from regard.mixers.gaussian_adaptive import GaussianAdaptiveAttention, GaussianBlock, GaussianGate, gaussian_weights
from vision.shared import filled, gradients, leaves, normal, vectors


def gaam(dim: int = 8, heads: int = 2, **options) -> GaussianAdaptiveAttention:
    layer = GaussianAdaptiveAttention(dim, heads, **options).double()
    with torch.no_grad():
        layer.offsets.copy_(0.4 * normal(1, *layer.offsets.shape))
        layer.widths.copy_((0.5 * normal(2, *layer.widths.shape)).exp())
    return layer


def same_gradients(got: Tensor, want: Tensor, inputs: list[Tensor]) -> None:
    for ours, theirs in zip(gradients(got, inputs), gradients(want, inputs), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize(
    ("heads", "gaussians", "options"),
    [(1, 1, {}), (2, 3, {}), (3, 2, {"combine": "sum"}), (2, 2, {"padding_value": 0.0})],
)
def test_equals_the_loops(axis: int, heads: int, gaussians: int, options: dict) -> None:
    layer, x = gaam(7, heads, axis=axis, num_gaussians=gaussians, **options), normal(3, 2, 8, 7)
    x[:, 5:] *= 0.0 if "padding_value" in options else 1.0
    (x,) = leaves(x)
    how = {"padding_value": options.get("padding_value"), "mixture": "combine" in options}
    want, weights = naive.gaam(x, axis, layer.offsets, layer.widths, **how)
    got = layer(x)
    close(layer.weights(x), weights)
    close(got, want)
    same_gradients(got, want, [x, *layer.parameters()])


@pytest.mark.parametrize("combine", ["product", "sum"])
def test_one_head_with_hidden_entries_equals_the_loops(combine: str) -> None:
    (x,) = leaves(normal(1, 2, 5, 6))
    keep = normal(2, 2, 5, 6) > 0
    keep[0, 0], keep[0, 1] = False, torch.arange(6) == 2  # a line of nothing, and one of a single entry
    offsets, widths = leaves(0.3 * normal(3, 2), 1 + normal(4, 2).abs())
    got = gaussian_weights(x, 2, offsets, widths, keep=keep, combine=combine)
    how = {"keep": keep, "mixture": combine == "sum"}
    want = naive.gaussian_weights(x, 2, offsets[None], widths[None], **how)
    close(got, want)
    assert (got[~keep] == 0).all()
    same_gradients(got, want, [x, offsets, widths])


@pytest.mark.parametrize("case", ["a", "b", "c"])
def test_gives_the_authors_numbers(case: str) -> None:
    """c has padding, and a line in which every density falls below the least sum."""
    z = vectors("B040", case)
    axis, heads, gaussians = z["options"].tolist()
    padding = 0.0 if case == "c" else None
    layer = GaussianGate(heads, axis=axis, num_gaussians=gaussians, padding_value=padding).double()
    layer.load_state_dict({"offsets": z["mean_offsets"], "widths": z["c"]})
    (x,) = leaves(z["x"])
    close(layer.weights(x), z["weights"])
    y = layer(x)
    close(y, z["y"])
    (y * z["w"]).sum().backward()
    for got, want in ((x.grad, "gx"), (layer.offsets.grad, "g_mean_offsets"), (layer.widths.grad, "g_c")):
        close(got, z[want])


def test_the_block_gives_the_authors_numbers() -> None:
    z = vectors("B040", "d")
    block = GaussianBlock([GaussianGate(2, axis=1, num_gaussians=2), GaussianGate(2)]).double()
    names = {"offsets": "mean_offsets", "widths": "c"}
    block.load_state_dict({f"layers.{i}.{n}": z[f"{t}_{i}"] for i in (0, 1) for n, t in names.items()})
    (x,) = leaves(z["x"])
    y = block(x)
    close(y, z["y"])
    close(torch.autograd.grad((y * z["w"]).sum(), x)[0], z["gx"])


@pytest.mark.parametrize(("axis", "n"), [(-1, 11), (1, 9)])
def test_weights_sum_to_one_and_follow_shifts(axis: int, n: int) -> None:
    """Within each head; and 2 K H parameters, whatever the width."""
    layer, x = gaam(11, 3, axis=axis, num_gaussians=5), 5 * normal(1, 2, 9, 11)
    with torch.no_grad():
        layer.widths.add_(1)  # else a product of five leaves less than the least sum
    w = layer(x) / x
    assert w.min() >= 0
    for part in w.split([n // 3, n // 3, n - 2 * (n // 3)], axis):
        close(part.sum(axis), torch.ones_like(part.sum(axis)))
    close(layer(x + 3) / (x + 3), w)
    assert (layer(3 * x) / (3 * x) - w).abs().max() > 1e-3, "offsets are in units of x"
    assert sum(p.numel() for p in layer.parameters()) == 2 * 5 * 3


def test_a_product_of_gaussians_is_one() -> None:
    """And a sum is none."""
    x, offsets, widths = normal(1, 3, 10), 0.3 * normal(2, 3), 1 + normal(3, 3).abs()
    d, c = naive.merged(offsets, widths)
    close(gaussian_weights(x, -1, offsets, widths), gaussian_weights(x, -1, d[None], c[None]))
    mixture = gaussian_weights(x, -1, offsets, widths, combine="sum")
    assert (mixture - gaussian_weights(x, -1, d[None], c[None])).abs().max() > 1e-3


def test_starts_as_the_authors_do() -> None:
    torch.manual_seed(0)
    gate = GaussianGate(400, num_gaussians=10)
    assert (gate.offsets == 0).all()
    assert abs(gate.widths.log().mean()) < 0.05
    assert abs(gate.widths.log().std() - 1) < 0.05


@pytest.mark.parametrize("axis", [-1, 1])
def test_hidden_tokens_are_left_out(axis: int) -> None:
    """A row is what its real tokens are by themselves, heads of tokens too; hidden ones give 0."""
    layer, x = gaam(8, 2, axis=axis), normal(1, 4, 9, 8)
    keep = torch.ones(4, 9, dtype=torch.bool)
    keep[0, 6:] = keep[1, :2] = keep[2, 3:5] = keep[2, 8] = keep[3] = False
    hurt = x.masked_fill(~keep[..., None], torch.nan)
    for mask in (keep, masks.padding(keep), keep[:, None, None]):
        got = layer(hurt, mask=mask)
        for b in range(3):
            close(got[b, keep[b]], layer(x[b : b + 1, keep[b]])[0], f"row {b}")
    assert (layer(x, mask=keep)[~keep] == 0).all()
    found = [gradients(layer(z, mask=keep), list(layer.parameters())) for z in (x, hurt)]
    for a, b in zip(*found, strict=True):
        same(a, b)


def test_documents_that_are_packed() -> None:
    layer, x = gaam(6, 2, axis=1), normal(1, 1, 11, 6)
    got = layer(x, mask=masks.packed(torch.tensor([0, 5, 11])))
    close(got, torch.cat([layer(x[:, :5]), layer(x[:, 5:])], 1))


@pytest.mark.parametrize("axis", [-1, 1])
def test_nan_is_seen(axis: int) -> None:
    layer, x = gaam(8, 1, axis=axis), normal(1, 2, 5, 8)
    x[0, 2, 3] = torch.nan
    lost = layer(x).isnan().all(-1)
    want = torch.zeros(2, 5, dtype=torch.bool)
    want[0, slice(2, 3) if axis == -1 else slice(None)] = True
    same(lost, want)


def test_maps_and_lines() -> None:
    """Any shape; heads cut the axis that is weighed."""
    gate = filled(GaussianGate(2, axis=1))
    x = normal(1, 2, 5, 3, 4)
    close(gate(x), naive.gaam(x, 1, gate.offsets, gate.widths)[0])
    changed = x.clone()
    changed[:, 0] += 1  # of the first head
    same(gate(changed)[:, 2:], gate(x)[:, 2:])


def test_densities_that_vanish() -> None:
    """In float32 a far offset leaves nothing of a density; its logarithm still knows the nearest."""
    x = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    far = gaussian_weights(x, -1, torch.tensor([60.0]), torch.tensor([1.0]), eps=1e-30)
    assert far.isfinite().all()
    wide = gaussian_weights(x.half(), -1, torch.tensor([0.5]).half(), torch.tensor([1.0]).half())
    assert wide.dtype == torch.float32
    assert math.isclose(float(wide.sum()), 1, rel_tol=1e-5)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="causal"):
        regard.create("gaam", dim=8, num_heads=2, causal=True)
    with pytest.raises(ValueError, match=r"leaves a head without variance \(got 5\); expected 2 or more of dim"):
        GaussianAdaptiveAttention(8, 5)
    with pytest.raises(ValueError, match=r"axis is unknown \(got 0\); expected one of -1, 1"):
        GaussianAdaptiveAttention(8, 2, axis=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"num_gaussians is too small \(got 0\)"):
        GaussianAdaptiveAttention(8, 2, num_gaussians=0)
    with pytest.raises(ValueError, match=r"combine is unknown \(got 'mean'\)"):
        GaussianAdaptiveAttention(8, 2, combine="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"eps is out of range \(got 0\)"):
        GaussianAdaptiveAttention(8, 2, eps=0)
    with pytest.raises(
        ValueError, match=r"x has too few entries for a variance \(got 3 along axis 1\); expected 2 or more"
    ):
        GaussianAdaptiveAttention(8, 2, axis=1)(torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match=r"x has no line along axis 3 \(got \(2, 5\)\)"):
        GaussianGate(1, axis=3)(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"combine is unknown \(got 'mean'\)"):
        gaussian_weights(torch.zeros(2, 5), 1, torch.zeros(1), torch.ones(1), combine="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"widths has the wrong shape \(got \(2,\)\); expected \(K = 1\)"):
        gaussian_weights(torch.zeros(2, 5), 1, torch.zeros(1), torch.ones(2))
