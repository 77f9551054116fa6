"""Select and pack attention against loops, whose author has read neither code nor test, and what choosing is for."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import regard
from laws.measured import flops
from regard.laws.agreement import close, same
from regard.vision.select_pack import Packing, SelectPackAttention, pack, select_loss, unpack
from vision import naive_select_pack as naive
from vision.shared import filled, gradients, leaves, normal


def layer(**options: Any) -> SelectPackAttention:
    part = SelectPackAttention(4, 2, **{"length": 5, **options})
    filled(part)
    return part


def loops(part: SelectPackAttention, x: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, scores and choice, as maps. A choice with gradients where there is noise."""
    grid, projections = x.shape[2:], [part.q_proj, part.k_proj, part.v_proj, part.o_proj]
    out, s, choice = naive.select_pack(
        x.flatten(2).mT,
        part.gate.weight[0],
        part.gate.bias[0],
        [p.weight for p in projections],
        heads=part.num_heads,
        length=part.length,
        threshold=part.threshold,
        temperature=part.temperature,
        order=naive.raster(grid, (part.shift, part.shift)),
        align=part.align,
        biases=[p.bias for p in projections],
        **options,
    )
    return out.mT.unflatten(2, grid), s.unflatten(1, grid), choice.unflatten(1, grid)


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(("shift", "align"), [(0, False), (1, True)])
def test_equals_the_loops(shift: int, align: bool, noisy: bool) -> None:
    """Outputs, scores, choice, and the gradients of x, the scores before and every parameter."""
    part = layer(shift=shift, align=align, threshold=0.55, temperature=0.7)
    x, previous = leaves(normal(1, 3, 4, 3, 4), normal(2, 3, 2, 2) - 0.5)
    noise = normal(3, 3, 3, 4, 2) if noisy else None
    resized = naive.upsample(previous.flatten(1), (2, 2), (3, 4))
    told = None if noise is None else noise.flatten(1, 2)
    want, s, choice = loops(part, x, previous=resized, noise=told)
    got = part.select(x, previous, noise=noise)
    counts = got.chosen.sum((1, 2)).tolist()
    assert len(set(counts)) > 1
    assert 0 < sum(counts) < 36
    same(got.chosen, choice.detach() > 0.5)
    close(got.scores.detach(), s.detach())
    close(got.out.detach(), want.detach())
    of = [x, previous, *part.parameters()]
    for g, w in zip(gradients(got.out, of), gradients(want, of), strict=True):
        close(g, w)


@pytest.mark.parametrize("align", [False, True])
def test_pack_equals_the_loops_and_unpack_undoes_it(align: bool) -> None:
    """Images of 9, 3, 8, 7, 0 and 5 chosen tokens in containers of 7."""
    x, counts = normal(1, 6, 10, 2), torch.tensor([9, 3, 8, 7, 0, 5])
    chosen = normal(2, 6, 10).argsort(1).argsort(1) < counts[:, None]
    got = pack(x, chosen, length=7, align=align)
    for found, want in zip(got, naive.pack(x, chosen, 7, align=align), strict=True):
        same(found, want)
    assert got.packed.shape == (5, 7, 2)
    same(unpack(got, 6, 10), x * chosen[..., None])
    none = pack(x, chosen & False, length=7, align=align)
    assert none.packed.shape == (0, 7, 2)
    assert not unpack(none, 6, 10).any()


def test_an_image_that_is_not_cut_is_as_by_itself() -> None:
    """Aligned, all that fit are; else those after one that ends within a container may be cut."""
    x = normal(4, 5, 4, 2, 2)  # of four pixels, so that all fit
    alone = torch.cat([layer()(one[None]) for one in x])
    close(layer(align=True)(x).detach(), alone.detach())
    assert not torch.allclose(layer()(x), alone)


def test_what_the_layer_before_chose_is_chosen_again() -> None:
    part, x = layer(), normal(5, 2, 4, 4, 4)
    previous = torch.where(normal(6, 2, 2, 2) > 0, 3.0, -30.0).double()
    coarse = F.interpolate(previous[:, None], (4, 4))[:, 0] > 0
    got, own = part.select(x, previous), part.select(x)
    same(got.chosen, own.chosen | coarse)
    assert (got.chosen & ~own.chosen).any()


def test_the_loss_equals_the_loops() -> None:
    fine, coarse = normal(7, 2, 4, 6), normal(8, 2, 2, 3)
    objects = (normal(9, 2, 8, 12) > 1.7).double()
    labels = [objects.unflatten(1, (y, -1)).unflatten(3, (x, -1)).amax((2, 4)) for y, x in ((4, 6), (2, 3))]
    want = naive.select_loss([s.flatten(1) for s in (fine, coarse)], [y.flatten(1) for y in labels])
    close(select_loss([fine, coarse], objects), want)
    with pytest.raises(ValueError, match=r"select_loss: scores is empty \(got no map\)"):
        select_loss([], objects)


def scenes(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Maps of 8 x 8 with one to three bright pixels of one of three colours, the colour, and where they are."""
    kind, some = torch.randint(3, (n,), generator=generator), torch.randint(1, 4, (n, 1), generator=generator)
    where = torch.rand(n, 64, generator=generator).argsort(1).argsort(1) < some
    x = 0.1 * torch.randn(n, 8, 64, generator=generator)
    x[:, :3] += F.one_hot(kind, 3)[..., None] * where[:, None]
    x[:, 3] += torch.where(where, 1.0, 0.2)
    return x.unflatten(2, (8, 8)), kind, where.unflatten(1, (8, 8)).float()


def trained(weight: float, steps: int) -> tuple[float, float, SelectPackAttention]:
    """Accuracy and the share that is kept, of new scenes."""
    torch.manual_seed(0)
    part = regard.create("select_pack", dim=8, num_heads=2, length=8)
    out, generator = nn.Linear(8, 3), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam([*part.parameters(), *out.parameters()], lr=0.05)
    for _ in range(steps):
        x, kind, objects = scenes(32, generator)
        got = part.select(x)
        loss = F.cross_entropy(out(got.out.sum((2, 3))), kind) + weight * select_loss([got.scores], objects)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    part.eval()
    x, kind, _ = scenes(200, generator)
    right = out(part(x).sum((2, 3))).argmax(-1) == kind
    return float(right.float().mean()), float(part.select(x).chosen.float().mean()), part


def test_what_is_kept_approaches_the_objects() -> None:
    """Two of 64 pixels on average. Without the loss more is kept for no better answers. What is not kept costs nothing,
    but for the gate, and images keep different numbers."""
    right, share, part = trained(1.0, 190)
    assert right > 0.95
    assert 0.025 < share < 0.037
    alone, more, _ = trained(0.0, 50)
    assert alone < right + 0.02
    assert more > 2 * share
    x = scenes(16, torch.Generator().manual_seed(2))[0]
    chosen = part.select(x).chosen.sum((1, 2))
    assert len(chosen.unique()) > 1
    containers = -(-int(chosen.sum()) // 8)
    spent = flops(lambda: part(x)) / 2
    assert spent <= 16 * 64 * 8 + containers * (4 * 8 * 8 * 8 + 2 * 8 * 8 * 8)
    assert not part(x)[:, :].permute(0, 2, 3, 1)[~part.select(x).chosen].any()


def test_noise_is_for_training() -> None:
    part, x = layer().train(), normal(10, 2, 4, 4, 4)
    torch.manual_seed(0)
    first = part.select(x).chosen
    assert (first != part.select(x).chosen).any()
    same(part.eval().select(x).chosen, part.gate(x.movedim(1, -1))[..., 0] > 0)


def test_starting_values() -> None:
    torch.manual_seed(0)
    part = regard.create("select_pack", dim=64, num_heads=4)
    for proj in (part.gate, part.q_proj, part.o_proj):
        assert 0.014 < float(proj.weight.detach().std()) < 0.026
        assert not proj.bias.any()
    assert part.length == 49


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"length": 0}, r"SelectPackAttention: length is too small \(got 0\)"),
        ({"shift": -1}, r"shift is too small \(got -1\)"),
        ({"threshold": 1.0}, r"threshold is out of range \(got 1.0\)"),
        ({"temperature": 0.0}, r"temperature is out of range \(got 0.0\)"),
    ],
)
def test_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        layer(**options)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"x has the wrong shape \(got \(2, 3, 4, 4\)\)"):
        layer()(normal(1, 2, 3, 4, 4))
    with pytest.raises(ValueError, match=r"previous has the wrong shape \(got \(3, 2, 2\)\)"):
        layer().select(normal(1, 2, 4, 4, 4), normal(2, 3, 2, 2))
    with pytest.raises(ValueError, match=r"pack: chosen has the wrong shape \(got \(2, 4\)\)"):
        pack(normal(1, 2, 5, 3), torch.ones(2, 4).bool(), length=2)
    with pytest.raises(ValueError, match=r"unpack: place has the wrong shape \(got \(1, 2\)\)"):
        unpack(Packing(normal(1, 1, 3, 2), torch.zeros(1, 3).long(), torch.zeros(1, 2).long()), 1, 3)
