"""SAGAN's block against loops, whose author saw the paper's account alone, neither code nor test, and golden numbers
of BigGAN-PyTorch and fastai (A013)."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from regard.laws.agreement import close
from regard.vision.sagan import SAGANAttention
from regard.vision.spectral import SpectralLinear
from vision import naive_sagan
from vision.shared import filled, gradients, normal, vectors


def weights(layer: SAGANAttention) -> dict[str, Tensor]:
    found = {}
    for name in ("q", "k", "v", "o"):
        part = getattr(layer, f"{name}_proj")
        if isinstance(part, SpectralLinear):
            found[f"{name}_weight"] = naive_sagan.spectral_weight_torch(
                part.weight, part.u, part.v, training=part.training
            )[0]
        elif part is not None:
            found[f"{name}_weight"] = part.weight
    return found


@pytest.mark.parametrize("spectral", [False, True])
@pytest.mark.parametrize("form", ["pooled", "full", "narrow"])
@pytest.mark.parametrize("training", [False, True])
def test_is_the_definition(form: str, spectral: bool, training: bool) -> None:
    layer = filled(SAGANAttention(8, form=form, qk_ratio=4, spectral=spectral)).train(training)
    x = normal(1, 2, 8, 3, 4).requires_grad_()
    naive = naive_sagan.sagan_pooled if form == "pooled" else naive_sagan.sagan_full
    want = naive(x, gamma=layer.gamma, **weights(layer))
    got = layer(x)
    close(got, want)
    of = [x, *layer.parameters()]
    for a, b in zip(gradients(got, of), gradients(want, of), strict=True):
        close(a, b)


@pytest.mark.parametrize("form", ["full", "narrow"])
@pytest.mark.parametrize("sizes", [(7,), (2, 3, 2)])
def test_maps_of_any_number_of_axes(form: str, sizes: tuple[int, ...]) -> None:
    layer = filled(SAGANAttention(8, form=form, spectral=False))
    x = normal(2, 1, 8, *sizes)
    close(layer(x), naive_sagan.sagan_full(x, gamma=layer.gamma, **weights(layer)))


def given(case: str, form: str) -> tuple[SAGANAttention, dict[str, Tensor], dict[str, Tensor]]:
    """The layer with a case's numbers; and which parameter of ours each of its names is."""
    z = vectors("A013", case)
    names = {"theta": "q_proj", "phi": "k_proj", "g": "v_proj", "o": "o_proj"}
    if form == "full":  # its `key` makes the rows of the softmax
        names = {"query": "k_proj", "key": "q_proj", "value": "v_proj"}
    layer = SAGANAttention(16, form=form, spectral=case == "sn").double().eval()
    ours = {f"{theirs}.weight": getattr(layer, name).weight for theirs, name in names.items()}
    with torch.no_grad():
        layer.gamma.copy_(z["p_gamma"].reshape(()))
        for key, p in ours.items():
            p.copy_(z[f"p_{key}"].flatten(1))
        for theirs, name in names.items() if case == "sn" else ():  # BigGAN steps from the stored u in eval, too
            part = getattr(layer, name)
            part.v.copy_(F.normalize(z[f"p_{theirs}.u0"][0] @ part.weight, dim=0))
            part.u.copy_(F.normalize(part.weight @ part.v, dim=0))
    return layer, z, {**ours, "gamma": layer.gamma}


@pytest.mark.parametrize(("case", "form"), [("pooled", "pooled"), ("sn", "pooled"), ("full", "full")])
def test_gives_their_numbers(case: str, form: str) -> None:
    layer, z, parameters = given(case, form)
    x = z["x"].requires_grad_()
    out = layer(x)
    close(out, z["out"])
    (out * z["w"]).sum().backward()
    close(x.grad, z["gx"])
    told = [key for key in z if key.startswith("g_")]
    assert len(told) >= 2
    for key in told:
        close(parameters[key.removeprefix("g_")].grad.flatten(), z[key].flatten())


def test_the_norm_is_torchs() -> None:
    """The same weights from the same vectors, in training and in eval, and both find the largest singular value."""
    ours = SpectralLinear(7, 5).double()
    theirs = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Linear(7, 5, bias=False).double())
    held = theirs.parametrizations.weight
    with torch.no_grad():
        held.original.copy_(ours.weight)
        held[0]._u.copy_(ours.u)
        held[0]._v.copy_(ours.v)
    x = normal(3, 4, 7)
    for _ in range(3):
        close(ours(x), theirs(x))
    ours.eval(), theirs.eval()
    close(ours(x), theirs(x))
    for _ in range(300):
        ours.train()(x)
    close(torch.linalg.matrix_norm(ours.normalised(), 2), torch.ones(()).double())


def test_starts_as_the_identity_and_learns_how_much() -> None:
    torch.manual_seed(0)
    for form in ("pooled", "full", "narrow"):
        layer = regard.create("sagan", dim=16, num_heads=2, form=form)
        x = torch.randn(2, 16, 6, 6)
        out = layer(x)
        assert torch.equal(out, x), "bit for bit"
        out.square().sum().backward()
        assert layer.gamma.grad.abs() > 0
        for name, p in layer.named_parameters():
            assert name == "gamma" or not p.grad.any(), "nothing else learns in the first step"


def reached(layer: torch.nn.Module, x: Tensor) -> int:
    """How many pixels change when the last one does."""
    moved = x.clone()
    moved[..., -1, -1] += 3.0
    return int((layer(moved) - layer(x)).abs().amax(1).gt(1e-9).sum())


def test_cues_come_from_all_locations() -> None:
    """One pixel changes all outputs, where a 3 x 3 convolution passes it to its neighbours; but at the start nothing
    does. A place is what it holds: without pooling any order of pixels will do, with it any order of cells."""
    x, order = normal(4, 1, 8, 6, 6), torch.randperm(36, generator=torch.Generator().manual_seed(0))
    moved = x.flatten(2)[..., order].view_as(x)
    for form in ("full", "narrow", "pooled"):
        layer = regard.create("sagan", dim=8, num_heads=1, form=form, dtype=torch.float64).eval()
        assert reached(layer, x) == 1
        torch.nn.init.ones_(layer.gamma)
        assert reached(layer, x) == 36
        apart = (layer(moved) - layer(x).flatten(2)[..., order].view_as(x)).abs().max()
        assert (apart > 1e-3) == (form == "pooled")
    cells = x.unflatten(3, (3, 2)).unflatten(2, (3, 2)).permute(0, 1, 2, 4, 3, 5).flatten(2, 3)
    turned = cells[:, :, order[order < 9]].unflatten(2, (3, 3)).permute(0, 1, 2, 4, 3, 5).flatten(4).flatten(2, 3)
    back = layer(x).unflatten(3, (3, 2)).unflatten(2, (3, 2)).permute(0, 1, 2, 4, 3, 5).flatten(2, 3)
    want = back[:, :, order[order < 9]].unflatten(2, (3, 3)).permute(0, 1, 2, 4, 3, 5).flatten(4).flatten(2, 3)
    close(layer(turned), want)
    assert reached(torch.nn.Conv2d(8, 8, 3, padding=1).double(), x) == 4, "a corner's"


def test_the_norm_bounds_the_scores() -> None:
    """However large the weights: |q_i . k_j| <= |x_i| |x_j|."""
    torch.manual_seed(0)
    layer = SAGANAttention(8, form="full").double().eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(100)
    x = normal(5, 3, 8)
    scores = layer.q_proj(x) @ layer.k_proj(x).T
    assert (scores.abs() <= 1.001 * x.norm(dim=1) * x.norm(dim=1)[:, None]).all()


def test_vectors_of_the_norm_stay_exact() -> None:
    layer = SpectralLinear(6, 4).bfloat16()
    assert layer.weight.dtype == torch.bfloat16
    assert layer.u.dtype == layer.v.dtype == torch.float32
    assert layer(torch.randn(2, 6).bfloat16()).dtype == torch.bfloat16


def test_empty_maps() -> None:
    for form in ("pooled", "full", "narrow"):
        layer = SAGANAttention(8, form=form)
        for shape in ((0, 8, 4, 4),):
            assert layer(torch.zeros(shape)).shape == shape


def test_what_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"form is unknown \(got 'paper'\); expected one of 'pooled', 'full', 'narrow'"
    ):
        SAGANAttention(8, form="paper")
    with pytest.raises(
        ValueError, match=r"SAGANAttention: qk_ratio is too large \(got 8\); expected an int from 1 to 4"
    ):
        SAGANAttention(4)
    with pytest.raises(ValueError, match=r"dim is too small \(got 1\)"):
        SAGANAttention(1, qk_ratio=1)
    with pytest.raises(ValueError, match=r"x has no cells of 2 x 2 \(got \(1, 8, 1, 4\)\)"):
        SAGANAttention(8)(torch.zeros(1, 8, 1, 4))
    with pytest.raises(ValueError, match=r"x has no cells of 2 x 2 \(got \(1, 8, 4\)\)"):
        SAGANAttention(8)(torch.zeros(1, 8, 4))
    with pytest.raises(ValueError, match=r"x has the wrong shape \(got \(1, 7, 4, 4\)\)"):
        SAGANAttention(8)(torch.zeros(1, 7, 4, 4))
