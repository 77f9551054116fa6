"""MEDUSA's classifier: whose gates these are, and that the body learns where to look."""

import pytest
import torch
from torch import Tensor

from regard.laws.agreement import close
from regard.vision.medusa_host import MedusaClassifier
from vision.shared import filled, normal


def rings(n: int, side: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Textures that fill the frame, a ring on them whose gap is in one of four directions, and its disc."""
    at = torch.arange(side)
    y, x = (torch.randint(8, side - 8, (n, 1, 1)) for _ in range(2))
    down, right = at[:, None] - y, at - x
    distance = (down.square() + right.square()).float().sqrt()
    label = torch.randint(4, (n,))
    along = torch.stack([down.expand_as(distance), right.expand_as(distance)], 1).float()
    sign = torch.where(label % 2 == 0, 1, -1)[:, None, None]
    toward = sign * along[torch.arange(n), label // 2] > 0.8 * distance
    ring = ((distance - 4).abs() < 1.2) & ~toward
    return 0.5 * torch.randn(n, 1, side, side) + 2 * ring[:, None], (distance < 6).float(), label


def test_each_stage_is_gated_before_the_next() -> None:
    net = filled(MedusaClassifier(2, 3, dims=(3, 4), widths=(3, 4), residual=True))
    image = normal(1, 2, 2, 7, 6)
    a, b = net.gates.prepare(image, [(7, 6), (4, 3)])
    first = net.stages[0](image)
    second = net.stages[1](first * a + first)
    close(net(image), net.head((second * b + second).mean((2, 3))))


def test_the_body_learns_the_region_and_all_learn_the_class() -> None:
    torch.manual_seed(0)
    net = MedusaClassifier(1, 4, dims=(8, 8, 8, 8), widths=(8, 8, 8))
    image, region, label = rings(12, 24)
    found = {}
    for stage, loss_of in (
        ("region", lambda: net.region_loss(image, region)),
        ("class", lambda: torch.nn.functional.cross_entropy(net(image), label)),
    ):
        optimizer = torch.optim.Adam(net.parameters(), 1e-2)
        losses = []
        for _ in range(20):
            loss = loss_of()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found[stage] = losses[-1] / losses[0]
    assert found["region"] < 0.7
    assert found["class"] < 0.9
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_what_is_refused() -> None:
    net = MedusaClassifier(2, 3)
    with pytest.raises(ValueError, match=r"image has the wrong shape \(got \(1, 3, 8, 8\)\)"):
        net(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"x is too small a map"):
        net(torch.zeros(1, 2, 2, 8))
    with pytest.raises(ValueError, match=r"classes is too small \(got 0\)"):
        MedusaClassifier(2, 0)
