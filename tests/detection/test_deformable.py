"""Deformable attention and RT-DETRv2's options: loops over samples, the authors' numbers (B083), transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import regard
from detection.naive_deformable import naive_deformable
from regard.detection.deformable import DeformableAttention
from regard.detection.places import pixel_centres
from regard.detection.sampling import deformable_attention, sampling_locations
from regard.laws.agreement import close
from regard.laws.subject import perturb

VECTORS = Path(__file__).parents[1] / "vectors" / "B083.npz"
PARTS = {"off": "offset_proj", "a": "weight_proj", "v": "v_proj", "o": "o_proj"}


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k.removeprefix(case + "_"): torch.from_numpy(file[k]) for k in file if k.startswith(case + "_")}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def uniform(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def layer(seed: int, dim: int, heads: int, points, **options) -> DeformableAttention:
    torch.manual_seed(seed)
    made = DeformableAttention(dim, heads, points=points, **options).double()
    perturb(made, seed)
    return made


def by_loops(made: DeformableAttention, x, context, reference, shapes, keep=None) -> Tensor:
    weights = [t for n in PARTS.values() for t in (getattr(made, n).weight, getattr(made, n).bias)]
    return naive_deformable(
        x,
        context,
        reference,
        shapes,
        made.points,
        *weights,
        made.num_heads,
        made.sampling == "discrete",
        made.offset_scale,
        keep,
    )


CASES = {
    "points": {"points": (2, 2), "shapes": [(3, 4), (2, 1)], "coordinates": 2},
    "points, one reference for all levels": {
        "points": (3, 1, 2),
        "shapes": [(5, 3), (2, 3), (1, 1)],
        "coordinates": 2,
        "levels": 1,
    },
    "boxes, points by level": {"points": (2, 1, 3), "shapes": [(4, 5), (3, 2), (1, 2)], "coordinates": 4},
    "boxes, other scale": {
        "points": (1, 2),
        "shapes": [(3, 3), (2, 5)],
        "coordinates": 4,
        "offset_scale": 1.7,
        "levels": 1,
    },
    "padding": {"points": (2, 2), "shapes": [(4, 3), (2, 2)], "coordinates": 2, "padded": True},
    "one pixel": {"points": (1,), "shapes": [(1, 1)], "coordinates": 2},
    "discrete points": {"points": (2, 3), "shapes": [(4, 7), (3, 1)], "coordinates": 2, "sampling": "discrete"},
    "discrete boxes": {
        "points": (2, 1),
        "shapes": [(3, 5), (2, 2)],
        "coordinates": 4,
        "sampling": "discrete",
        "padded": True,
    },
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_loops(case: str, seed: int) -> None:
    """Output, and gradients of queries, memory, references and all parameters."""
    c = dict(CASES[case])
    shapes, coordinates, padded = c.pop("shapes"), c.pop("coordinates"), c.pop("padded", False)
    levels = c.pop("levels", len(shapes))
    made = layer(seed, 6, (2, 3, 1)[seed], **c)
    S = sum(y * x for y, x in shapes)
    x, context = normal(10 + seed, 2, 3, 6), normal(20 + seed, 2, S, 6)
    # Some references lie near or beyond the border, where samples fall outside the map.
    reference = 1.4 * uniform(30 + seed, 2, 3, levels, coordinates) - 0.2
    keep = uniform(40 + seed, 2, S) < 0.7 if padded else None
    given = [t.requires_grad_() for t in (x, context, reference)]
    w = normal(50 + seed, 2, 3, 6)
    wanted = [*given, *(p for p in made.parameters() if p.requires_grad)]
    results = []
    for out in (made(x, context, reference, shapes, mask=keep), by_loops(made, x, context, reference, shapes, keep)):
        grads = torch.autograd.grad(out, wanted, w, allow_unused=True)
        results.append([out.detach(), *(torch.zeros_like(p) if g is None else g for p, g in zip(wanted, grads))])
    for n, (got, want) in enumerate(zip(*results)):
        close(got, want, f"{case} {n}")


@pytest.mark.parametrize("case", ["msda2", "msda4pad", "v2mixed", "v2discrete", "hfdiscrete"])
@pytest.mark.parametrize("which", ["loops", "layer"])
def test_gives_the_authors_numbers(case: str, which: str) -> None:
    z = vectors(case)
    heads = 3
    made = DeformableAttention(
        6, heads, points=z["npts"].tolist(), sampling="discrete" if "discrete" in case else "bilinear"
    ).double()
    for letter, name in PARTS.items():
        getattr(made, name).load_state_dict({"weight": z["W" + letter], "bias": z["b" + letter]})
    given = [z[n].clone().requires_grad_() for n in ("x", "mem", "ref")]
    keep = ~z["pad"] if "pad" in z else None
    shapes = [(int(y), int(x)) for y, x in z["shapes"]]
    out = by_loops(made, *given, shapes, keep) if which == "loops" else made(*given, z["shapes"], mask=keep)
    close(out.detach(), z["out"])
    grads = torch.autograd.grad(out, given, z["w"], allow_unused=True)
    for name, got in zip(("gx", "gmem", "gref"), grads):
        close(torch.zeros_like(z[name]) if got is None else got, z[name], name)


@pytest.mark.parametrize("coordinates", [2, 4])
def test_equals_deformable_detr_of_transformers(coordinates: int) -> None:
    pytest.importorskip("transformers")
    from transformers import DeformableDetrConfig
    from transformers.models.deformable_detr import modeling_deformable_detr as hf

    shapes = [(4, 7), (3, 2), (1, 3)]
    config = DeformableDetrConfig(d_model=24, num_feature_levels=3, disable_custom_kernels=True)
    theirs = hf.DeformableDetrMultiscaleDeformableAttention(config, num_heads=6, n_points=2).double().eval()
    made = layer(1, 24, 6, (2, 2, 2))
    theirs.load_state_dict(regard.layer_state(made, like=theirs))
    x, context, reference = normal(2, 2, 5, 24), normal(3, 2, 37, 24), uniform(4, 2, 5, 3, coordinates)
    keep = uniform(5, 2, 37) < 0.8
    want = theirs(
        x,
        encoder_hidden_states=context,
        attention_mask=keep,
        reference_points=reference,
        spatial_shapes=torch.tensor(shapes),
        spatial_shapes_list=shapes,
    )[0]
    close(made(x, context, reference, shapes, mask=keep), want)


@pytest.mark.parametrize("sampling", ["bilinear", "discrete"])
def test_equals_rt_detr_v2_of_transformers(sampling: str) -> None:
    pytest.importorskip("transformers")
    from transformers import RTDetrV2Config
    from transformers.models.rt_detr_v2 import modeling_rt_detr_v2 as hf

    shapes = [(4, 7), (3, 2), (1, 3)]
    config = RTDetrV2Config(
        d_model=24,
        decoder_attention_heads=6,
        decoder_n_points=2,
        decoder_n_levels=3,
        decoder_offset_scale=0.8,
        decoder_method="default" if sampling == "bilinear" else "discrete",
    )
    theirs = hf.RTDetrV2MultiscaleDeformableAttention(config).double().eval()
    made = layer(1, 24, 6, (2, 2, 2), sampling=sampling, offset_scale=0.8)
    theirs.load_state_dict(regard.layer_state(made, like=theirs))
    x, context, reference = normal(2, 2, 5, 24), normal(3, 2, 37, 24), uniform(4, 2, 5, 1, 4)
    want = theirs(
        x,
        encoder_hidden_states=context,
        reference_points=reference,
        spatial_shapes=torch.tensor(shapes),
        spatial_shapes_list=shapes,
    )[0]
    close(made(x, context, reference, shapes), want)


# What the paper says of it


def test_starts_on_rays_with_equal_weights() -> None:
    made = DeformableAttention(16, 8, points=(3, 2))
    offsets = made.offset_proj.bias.detach().view(8, 5, 2)
    assert not made.offset_proj.weight.any()
    assert not made.weight_proj.weight.any()
    assert not made.weight_proj.bias.any()
    eight = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for h, ray in enumerate(eight):
        want = torch.tensor([[k * ray[0], k * ray[1]] for k in (1, 2, 3, 1, 2)])
        assert (offsets[h] - want).abs().max() < 1e-6


def test_reads_a_ramp_at_the_mean_of_its_points() -> None:
    """Bilinear sampling is exact on a linear map, so each head gives the ramp at its reference plus the mean offset."""
    Y, X, heads = 20, 30, 4
    made = DeformableAttention(8, heads, points=(3,)).double()
    with torch.no_grad():
        for proj in (made.v_proj, made.o_proj):
            proj.weight.copy_(torch.eye(8))
    centres = pixel_centres([(Y, X)], dtype=torch.float64) * torch.tensor([X, Y])
    ramp = 2 * centres[:, 0] - 3 * centres[:, 1]
    reference = torch.tensor([[[[0.4, 0.6]]]], dtype=torch.float64)
    out = made(normal(0, 1, 1, 8), ramp[None, :, None].expand(-1, -1, 8), reference, [(Y, X)])[0, 0].view(heads, 2)
    for h, (dx, dy) in enumerate([(1, 0), (0, 1), (-1, 0), (0, -1)]):
        want = 2 * (0.4 * X + 2 * dx) - 3 * (0.6 * Y + 2 * dy)  # the mean of 1, 2 and 3 is 2
        assert (out[h] - want).abs().max() < 1e-10


@pytest.mark.parametrize("sampling", ["bilinear", "discrete"])
def test_reads_few_pixels_however_large_the_maps(sampling: str) -> None:
    heads, points = 2, (2, 1)
    made = layer(0, 8, heads, points, sampling=sampling)
    most = heads * sum(points) * (4 if sampling == "bilinear" else 1)
    for size in (4, 16, 64):
        shapes = [(size, size), (size // 2, size // 2)]
        context = normal(size, 1, sum(y * x for y, x in shapes), 8).requires_grad_()
        made(normal(1, 1, 1, 8), context, torch.full((1, 1, 1, 2), 0.5).double(), shapes).sum().backward()
        assert 0 < int(context.grad.ne(0).any(-1).sum()) <= most


# Policies


@pytest.mark.parametrize("sampling", ["bilinear", "discrete"])
def test_only_what_is_sampled_can_poison(sampling: str) -> None:
    made = layer(0, 6, 2, (2, 1), sampling=sampling)
    shapes = [(6, 6), (3, 3)]
    x, context, reference = normal(1, 1, 8, 6), normal(2, 1, 45, 6).requires_grad_(), uniform(3, 1, 8, 1, 2)
    out = made(x, context, reference, shapes)
    for pixel in range(0, 45, 5):
        seen = [bool(torch.autograd.grad(row.sum(), context, retain_graph=True)[0][0, pixel].any()) for row in out[0]]
        poisoned = context.detach().index_fill(1, torch.tensor([pixel]), torch.nan)
        assert made(x, poisoned, reference, shapes)[0].isnan().any(-1).tolist() == seen


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sampling", ["bilinear", "discrete"])
@pytest.mark.parametrize("where", ["x", "reference"])
def test_a_bad_query_is_told(value: float, sampling: str, where: str) -> None:
    made = layer(0, 6, 2, (2, 1), sampling=sampling)
    given = {"x": normal(1, 1, 4, 6), "context": normal(2, 1, 45, 6), "reference": uniform(3, 1, 4, 1, 2)}
    given[where][0, 2] = value
    out = made(**given, shapes=[(6, 6), (3, 3)])
    assert out[0].isnan().any(-1).tolist() == [False, False, True, False]


def test_hidden_pixels_cannot_poison() -> None:
    made = layer(0, 6, 2, (2,))
    x, context, reference = normal(1, 2, 4, 6), normal(2, 2, 12, 6), uniform(3, 2, 4, 1, 2)
    keep = uniform(4, 2, 12) < 0.6
    results = []
    for filler in (0.0, 1e4, float("nan")):
        given = context.masked_fill(~keep[..., None], filler).requires_grad_()
        out = made(x, given, reference, [(3, 4)], mask=keep)
        grads = torch.autograd.grad(out.sum(), [given, *made.parameters()])
        results.append([out, *grads])
        assert not grads[0][~keep].any()
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0]))
    nothing = made(x, context, reference, [(3, 4)], mask=torch.zeros_like(keep))
    close(nothing, made.o_proj.bias.expand(2, 4, 6))


def test_far_references_give_zero_and_keep_gradients_finite() -> None:
    value, shapes = normal(0, 1, 12, 2, 3).requires_grad_(), torch.tensor([(3, 4)])
    locations = torch.tensor([[-9.0, 0.5], [1e30, 0.5], [0.5, -1e30], [0.5, 7.0]]).double().view(1, 1, 1, 4, 2)
    locations = locations.expand(1, 1, 2, 4, 2).clone().requires_grad_()
    weights = torch.full((1, 1, 2, 4), 0.25).double().requires_grad_()
    out = deformable_attention(value, shapes, locations, weights, (4,))
    assert not out.any()
    for grad in torch.autograd.grad(out.sum(), (value, locations, weights)):
        assert not grad.any()


def test_half_precision_still_finds_the_pixel() -> None:
    """bf16 tells 1/128 apart at 1: locations on a map of 400 pixels must not be computed in it."""
    made = layer(0, 8, 2, (2,)).to(torch.bfloat16)
    exact = layer(0, 8, 2, (2,)).to(torch.bfloat16).double()
    x, context = normal(1, 1, 5, 8).bfloat16(), normal(2, 1, 400, 8).bfloat16()
    reference = uniform(3, 1, 5, 1, 2).float()
    got = made(x, context, reference, [(1, 400)])
    want = exact(x.double(), context.double(), reference.double(), [(1, 400)])
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() < 0.05 * want.abs().max()


def test_gradcheck() -> None:
    made = layer(2, 4, 2, (2, 1))
    given = (normal(1, 1, 2, 4), normal(2, 1, 8, 4), uniform(3, 1, 2, 2, 4))
    f = lambda *z: made(*z, [(2, 3), (1, 2)])  # noqa: E731
    assert torch.autograd.gradcheck(f, tuple(z.requires_grad_() for z in given))


def test_locations_by_hand() -> None:
    shapes = torch.tensor([(10, 20)])
    offsets = torch.tensor([4.0, 5.0]).double().view(1, 1, 1, 1, 2)
    at = sampling_locations(torch.tensor([0.5, 0.5]).double().view(1, 1, 1, 2), offsets, shapes, (1,))
    close(at.flatten(), torch.tensor([0.5 + 4 / 20, 0.5 + 5 / 10], dtype=torch.float64))
    box = torch.tensor([0.5, 0.5, 0.2, 0.4], dtype=torch.float64).view(1, 1, 1, 4)
    at = sampling_locations(box, offsets.expand(1, 1, 1, 4, 2), shapes, (4,))[0, 0, 0, 0]
    close(at, torch.tensor([0.5 + 0.2 / 2, 0.5 + 5 / 4 * 0.4 / 2], dtype=torch.float64))


def test_discrete_freezes_the_offsets() -> None:
    made = DeformableAttention(8, 2, points=(2,), sampling="discrete")
    assert not any(p.requires_grad for p in made.offset_proj.parameters())


def test_cards() -> None:
    """One number of points is for every level; a list must have one for each."""

    def points(name: str, **options) -> tuple[int, ...]:
        return regard.create(name, dim=24, num_heads=6, **options).points

    assert points("deformable_v2", num_levels=2, points=3) == (3, 3)
    assert points("deformable_v2", points=(4, 2, 1)) == (4, 2, 1)
    assert points("deformable_v2") == (4, 4, 4)
    assert points("deformable", num_levels=2, num_points=3) == (3, 3)
    assert points("deformable") == DeformableAttention(24, 6).points == (4, 4, 4, 4)
    with pytest.raises(ValueError, match=r"points has another number of levels .*\(4, 2, 1\)\); expected 2"):
        points("deformable_v2", num_levels=2, points=(4, 2, 1))
    with pytest.raises(ValueError, match=r"'deformable' has no such option \(got 'sampling'\)"):
        points("deformable", sampling="discrete")
    for name in ("deformable", "deformable_v2"):
        with pytest.raises(ValueError, match="causal"):
            points(name, causal=True)
        with pytest.raises(ValueError, match="gqa"):
            points(name, num_kv_heads=2)
        with pytest.raises(ValueError, match="head_dim"):
            points(name, head_dim=8)


def test_bad_input() -> None:
    made = layer(0, 6, 2, (2, 1))
    x, context, reference = normal(1, 2, 4, 6), normal(2, 2, 10, 6), uniform(3, 2, 4, 2, 2)
    shapes = [(2, 4), (1, 2)]
    made(x, context, reference, shapes)
    for change, words in (
        ({"x": x[..., :5]}, r"x has the wrong shape \(got \(2, 4, 5\)\); expected \(B, T, M = 6\)"),
        ({"context": context[0]}, r"context has the wrong shape \(got \(10, 6\)\); expected \(B = 2, S, M = 6\)"),
        ({"context": context[:1]}, r"context has the wrong shape \(got \(1, 10, 6\)\); expected \(B = 2, S"),
        ({"reference": reference[..., :1]}, r"reference has the wrong shape .* 2\) or \(B = 2, T = 4, 1 or L = 2, 4\)"),
        (
            {"reference": reference[:, :3]},
            r"reference has the wrong shape \(got \(2, 3, 2, 2\)\); .*T = 4",
        ),
        ({"reference": normal(1, 2, 4, 3, 2)}, r"reference has the wrong shape .* expected .* 1 or L = 2, 2\)"),
        ({"shapes": [(2, 4)]}, r"shapes has the wrong shape \(got \(1, 2\)\); expected \(L = 2, 2\)"),
        ({"shapes": [(2, 4), (1, 3)]}, r"shapes don't make up the context \(got .*\); expected maps of 10 tokens"),
        ({"shapes": [(-2, -4), (1, 2)]}, r"shapes don't make up the context \(got .*\); expected maps of 10 tokens"),
        ({"mask": regard.masks.causal()}, "mask can only hide keys"),
    ):
        with pytest.raises(ValueError, match=words):
            made(**{"x": x, "context": context, "reference": reference, "shapes": shapes, **change})
    for floats in (torch.tensor([(2.0, 4), (1, 2)]), [(2.0, 4), (1, 2)]):
        with pytest.raises(TypeError, match=r"shapes has the wrong dtype \(got torch.float32\); expected integers"):
            made(x, context, reference, floats)
    for options, words in (
        ({"points": ()}, r"points has no level \(got \(\)\)"),
        ({"points": (2, 0)}, r"points is too small \(got 0\); expected an int >= 1"),
        ({"num_levels": 0}, r"num_levels is too small \(got 0\)"),
        ({"sampling": "nearest"}, r"sampling is unknown \(got 'nearest'\); expected one of 'bilinear', 'discrete'"),
    ):
        with pytest.raises(ValueError, match=words):
            DeformableAttention(6, 2, **options)
    with pytest.raises(ValueError, match=r"dim is no multiple of num_heads = 2 \(got 7\)"):
        DeformableAttention(7, 2)
