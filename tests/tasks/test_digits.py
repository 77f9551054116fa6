"""Digits: scikit-learn's images, held out or not, for mixers of three kinds."""

import pytest
import torch

pytest.importorskip("sklearn")

from sklearn.datasets import load_digits

from regard import tasks
from regard.models.mixer import parse
from regard.models.tokens import Mean, OnMaps
from regard.tasks import Size, TaskError
from regard.tasks import digits as module


def test_the_parts_are_all_images_once():
    (pixels, digits), (held, answers) = tasks.make("digits").parts
    assert (len(pixels), len(held)) == (1348, 449)
    mine = sorted(map(tuple, torch.cat([pixels, held])[..., 0].mul(8).add(8).int().tolist()))
    assert mine == sorted(map(tuple, load_digits().data.astype(int).tolist()))
    assert torch.bincount(answers).min() > 30
    assert len(digits) == len(pixels)


@pytest.mark.parametrize("mechanism", ["softmax", "polarized", "efficient_probing", "stubs:Mapped"])
def test_each_kind_stands_where_it_belongs(mechanism, monkeypatch, request):
    monkeypatch.syspath_prepend(request.path.parent.parent / "bench")
    task = tasks.make("digits")
    model = task.model(parse(mechanism), Size(16, 2, 2, 16))
    pixels, _ = next(task.batches(3, 0))
    assert model(pixels).shape == (3, 10)
    on_maps = [isinstance(block.mixer, OnMaps) for block in model.blocks]
    assert on_maps == [mechanism in ("polarized", "stubs:Mapped")] * 2
    assert isinstance(model.pool, Mean) == (mechanism != "efficient_probing")
    assert len(model.mixers) == (1 if mechanism == "efficient_probing" else 2)


def test_pixels_keep_their_places_on_the_map():
    class Shift(torch.nn.Module):
        def forward(self, x):
            return x.roll(1, dims=3)

    pixels = torch.arange(64.0).reshape(1, 64, 1)
    moved = OnMaps(Shift(), (8, 8))(pixels)[0, :, 0]
    assert moved[:9].tolist() == [7, 0, 1, 2, 3, 4, 5, 6, 15]


def test_accuracy_is_the_share_of_right_answers():
    task = tasks.make("digits", {"heldout": 0.1})

    class Always(torch.nn.Module):
        def forward(self, pixels):
            return torch.eye(10)[3].expand(len(pixels), 10)

    _, (_, answers) = task.parts
    found, notes = task.measure(Always(), 50, torch.device("cpu"))
    assert found == {"accuracy": (answers == 3).double().mean().item()}
    assert notes == []


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    module.images.cache_clear()
    with pytest.raises(TaskError, match=r'pip install "regard\[tasks\]"'):
        module.images()


def test_a_share_must_be_one():
    with pytest.raises(
        TaskError, match=r"task digits: heldout is out of range \(got 1\); expected a finite number > 0 and < 1"
    ):
        tasks.make("digits", {"heldout": 1})
