"""Shapes: images show what the classes say, distortions are held out, and what is asked for takes the sample."""

import math

import pytest
import torch

from regard import tasks
from regard.models.mixer import parse
from regard.models.tokens import Mean, OnMaps
from regard.tasks import HELDOUT_SEED, Size, TaskError
from regard.tasks.shapes import FIGURES, LOOKS, PATTERNS, Look, Scenes, draw, figures, scenes


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def shown(kind, worn, place=0, size=64, look=None, asked=None):
    """One image of one figure, without noise and at full contrast."""
    there = torch.zeros(1, 3, dtype=torch.bool)
    there[0, place] = True
    seen = Scenes(
        there, torch.full((1, 3), kind), torch.full((1, 3), worn), torch.tensor([place if asked is None else asked])
    )
    look = look or Look(turn=(0.0, 0.0), radius=(0.9, 0.9), contrast=(1.0, 1.0), noise=0.0)
    return (draw(seen, size, look, seeded())[0, 0] + 0.5) / 2


def quarter(image, place):
    half = image.shape[-1] // 2
    y, x = [(0, 1), (1, 0), (1, 1)][place]
    return image[y * half : (y + 1) * half, x * half : (x + 1) * half]


def test_scenes_show_what_is_asked_for_and_one_to_three_figures():
    seen = scenes(400, seeded())
    count = torch.bincount(seen.there.sum(1), minlength=4)
    assert count.tolist() == [0, 100, 100, 200]
    assert seen.there.gather(1, seen.asked[:, None]).all()
    for each, options in ((seen.kind, len(FIGURES)), (seen.worn, len(PATTERNS)), (seen.asked, 3)):
        assert torch.bincount(each.flatten(), minlength=options).min() > 0.7 * each.numel() / options
    one = [row.nonzero().flatten().tolist() for row in seen.there if row.sum() == 1]
    assert {place for row in one for place in row} == {0, 1, 2}
    classes = [int(k[a]) * 3 + int(w[a]) for k, w, a in zip(seen.kind, seen.worn, seen.asked, strict=True)]
    assert seen.classes.tolist() == classes


def test_figures_are_their_shapes():
    """Areas of the square from -1 to 1, and the middle, by formulas."""
    grid = torch.linspace(-1, 1, 401)
    disc, ring, cross, triangle = figures(grid[None, :].expand(401, -1), grid[:, None].expand(-1, 401)).float()
    areas = [math.pi * 0.95**2, math.pi * (1 - 0.55**2), 4 * (2 * 0.36 - 0.36**2), 1.75**2 / 2]
    for image, area in zip((disc, ring, cross, triangle), areas, strict=True):
        assert image.mean().item() * 4 == pytest.approx(area, rel=0.02)
    assert [image[200, 200].item() for image in (disc, ring, cross, triangle)] == [1, 0, 1, 1]


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("size", [32, 64])
def test_a_figure_stands_in_its_quarter_alone(place, size):
    image = shown(0, 2, place, size)
    for other in range(3):
        assert (quarter(image, other).abs().max() > 0.5) == (other == place)
    area = (quarter(image, place) > 0.5).float().mean()
    assert area == pytest.approx(math.pi * (0.95 * 0.45) ** 2, rel=0.08), "a disc of 0.9 x 0.95 half quarters"


@pytest.mark.parametrize(("worn", "along"), [(0, 1), (1, 0)])
def test_stripes_are_two_pixels_wide_and_run_one_way(worn, along):
    """The sample of place `worn` wears its pattern, too: it says where to look."""
    image = shown(0, worn, place=worn)
    for patch in (image[4:28, 4:28], quarter(image, worn)[11:21, 11:21]):
        assert torch.equal(patch.min(along).values, patch.max(along).values), "alike along a stripe"
        across = patch.select(along, 0)
        assert across.unique().tolist() == pytest.approx([0.35, 1.0])
        changes = (across.diff().abs() > 0.5).nonzero().flatten()
        assert (changes.diff() == 2).all()
    assert shown(0, 2, place=2)[4:28, 4:28].unique().tolist() == [1.0]


def test_the_sample_alone_says_who_is_asked():
    """Two scenes that differ in nothing else have other classes, and images alike outside the first quarter."""
    there = torch.ones(1, 3, dtype=torch.bool)
    kind, worn = torch.tensor([[0, 1, 2]]), torch.tensor([[0, 1, 2]])
    first, second = (Scenes(there, kind, worn, torch.tensor([asked])) for asked in (0, 2))
    assert first.classes != second.classes
    one, two = (draw(seen, 32, Look(), seeded())[0, 0] for seen in (first, second))
    assert not torch.equal(one[:16, :16], two[:16, :16])
    assert torch.equal(one[16:], two[16:])
    assert torch.equal(one[:, 16:], two[:, 16:])


def test_distortions_are_beyond_what_is_trained_on():
    trained = LOOKS["as trained"]
    assert trained == Look()
    assert LOOKS["turned"].turn[0] > trained.turn[1]
    assert LOOKS["small"].radius[1] < trained.radius[0]
    assert LOOKS["faint"].contrast[1] < trained.contrast[0]
    assert LOOKS["noisy"].noise > 3 * trained.noise


def test_each_distortion_does_what_its_name_says():
    seen = scenes(200, seeded())
    made = {name: draw(seen, 64, look, seeded(1)) for name, look in LOOKS.items()}
    ground = {name: image[:, :, -1, -1] for name, image in made.items()}
    assert ground["noisy"].std() > 3 * ground["as trained"].std()
    bright = {name: (image[:, :, :, 32:] > 0.4).float().mean() for name, image in made.items()}
    assert bright["small"] < 0.75 * bright["as trained"]
    sample = {name: image[:, :, 4:28, 4:28].mean() + 0.5 for name, image in made.items()}
    assert sample["faint"] < 0.75 * sample["as trained"]
    straight, turned = (shown(2, 2, look=Look(turn, (0.9, 0.9), (1.0, 1.0), 0.0)) for turn in ((0.0, 0.0), (0.4, 0.8)))
    assert (straight - turned).abs().mean() > 0.01


def test_held_out_images_are_none_that_a_run_trains_on():
    task = tasks.make("shapes")
    held, classes = task.images(64, Look(), seeded(HELDOUT_SEED))
    assert held.shape == (64, 1, 32, 32)
    assert classes.min() >= 0
    assert classes.max() < 12
    for seed in (0, 1):
        for (images, _), _ in zip(task.batches(64, seed), range(3), strict=False):
            assert not any(torch.equal(a, b) for a in held[:8] for b in images)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("mechanism", ["softmax", "polarized", "efficient_probing"])
def test_each_kind_stands_where_it_belongs(mechanism, size):
    task = tasks.make("shapes", {"size": size})
    model = task.model(parse(mechanism), Size(16, 2, 2, 16))
    images, _ = next(task.batches(3, 0))
    assert model(images).shape == (3, 12)
    assert task.tokens == (size // 4) ** 2 == model.read(images).shape[1]
    assert [isinstance(block.mixer, OnMaps) for block in model.blocks] == [mechanism == "polarized"] * 2
    assert isinstance(model.pool, Mean) == (mechanism != "efficient_probing")


def test_accuracy_is_the_share_of_right_answers_of_each_look():
    task = tasks.make("shapes", {"heldout": 40})

    class Says(torch.nn.Module):
        def forward(self, images):
            return torch.eye(12)[5].expand(len(images), 12)

    generator, expected = seeded(HELDOUT_SEED), {}
    for label, look in LOOKS.items():
        expected[label] = (task.images(40, look, generator)[1] == 5).double().mean().item()
    found, notes = task.measure(Says(), 16, torch.device("cpu"))
    assert found == {"mean": pytest.approx(sum(expected.values()) / 5), **expected}
    assert next(iter(found)) == "mean"
    assert notes == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": 36}, r"task shapes: size is no multiple of 8 \(got 36\); expected such as 32 or 64"),
        ({"size": 16}, r"size is too small \(got 16\); expected an int >= 24"),
        ({"heldout": 0}, r"heldout is too small \(got 0\)"),
    ],
)
def test_options_that_cannot_be_are_refused(options, said):
    with pytest.raises(TaskError, match=said):
        tasks.make("shapes", options)
