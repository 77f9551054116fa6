"""Coarse-to-fine attention against loops whose author has read neither the code nor this test."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import regard
from recurrent import naive_coarse_to_fine as naive
from regard.laws.agreement import close
from regard.recurrent import CoarseToFineAttention, LuongDecoder, RowEncoder, hard_loss
from regard.recurrent.coarse_to_fine import regions_of
from vision.shared import filled, leaves, normal


def scorer(score: Any) -> Any:
    if score.kind == "general":
        return score.q_proj.weight
    return score.vector, score.q_proj.weight, score.k_proj.weight


def looped(layer: Any, x: Tensor, fine: Tensor, coarse: Tensor, keep: Tensor | None, **options: Any) -> list[Tensor]:
    """Context vectors, weights, lookups and log p(cell) of one step; a grid of 4 x 6."""
    region = naive.region_map((4, 6), (4 // layer.tall, 6 // layer.wide))
    options = {"kind": layer.kind, "keep": keep, **options}
    score = naive.additive if layer.score.kind == "concat" else naive.general
    ours, theirs = scorer(layer.coarse_score), scorer(layer.score)
    return list(naive.coarse_to_fine(x, coarse, fine, region, ours, theirs, score=score, **options))


def built(kind: Any, score: Any = "concat", **options: Any) -> CoarseToFineAttention:
    options = {"columns": 6, "tall": 2, "wide": 3, "hidden": 4, **options}
    return filled(CoarseToFineAttention(5, context_dim=3, kind=kind, score=score, **options), 2)  # type: ignore


@pytest.mark.parametrize("kind", ["hierarchical", "sparse", "hard"])
@pytest.mark.parametrize("score", ["concat", "general"])
@pytest.mark.parametrize("padded", [False, True])
def test_equals_the_loops(kind: str, score: str, padded: bool) -> None:
    layer = built(kind, score)
    x, fine, coarse = leaves(normal(1, 2, 1, 5), normal(2, 2, 24, 3), normal(3, 2, 4, 3))
    keep = None
    if padded:
        keep = torch.ones(2, 24).bool()
        keep[0, 12:], keep[1, ::5] = False, False
    out, looked = layer.look(x, fine, mask=keep, coarse=coarse)
    context, weights, lookups, log = looped(layer, x[:, 0], fine, coarse, keep)
    close(looked.weights[:, 0], weights)
    close(out[:, 0], torch.tanh(layer.c_proj(torch.cat([context, x[:, 0]], -1))))
    assert torch.equal(looked.lookups[:, 0], lookups)
    wanted = [x, fine, coarse, *layer.score.parameters(), *layer.coarse_score.parameters()]
    g = normal(5, *weights.shape)
    target, ours = (weights * g).sum(), (looked.weights[:, 0] * g).sum()
    if kind == "hard":
        close(looked.log_cell[:, 0], log)
        target, ours = target + log.sum(), ours + looked.log_cell.sum()
    found = (torch.autograd.grad(z, wanted, allow_unused=True, materialize_grads=True) for z in (ours, target))
    for one, other in zip(*found, strict=True):
        close(one, other)


def test_mutants_of_the_loops_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, fine, coarse = built("sparse"), normal(1, 1, 5), normal(2, 1, 24, 3), normal(3, 1, 4, 3)
    got = layer.look(x[:, None], fine, coarse=coarse)[1].weights[:, 0]
    close(got, looped(layer, x, fine, coarse, None)[1])
    assert (got - looped(layer, x, fine, coarse, None, kind="hierarchical")[1]).abs().max() > 1e-3
    softmax = naive.softmax
    monkeypatch.setattr(naive, "softmax", lambda s: softmax([-z for z in s]))
    assert (got - looped(layer, x, fine, coarse, None)[1]).abs().max() > 1e-3


def test_one_region_is_plain_attention() -> None:
    x, fine = normal(1, 2, 3, 5), normal(2, 2, 24, 3)
    for kind in ("hierarchical", "sparse", "hard"):
        layer = built(kind, tall=4, wide=6)
        want = naive.coarse_to_fine(
            x[:, 1], fine, fine, [0] * 24, None, scorer(layer.score), kind="standard"
        )[1]  # fmt: skip
        close(layer.look(x, fine)[1].weights[:, 1], want)


def test_ragged_grids() -> None:
    regions = regions_of(8, 3, 2, 2)
    held = [sorted(m[e].tolist()) for m, e in zip(regions.members, regions.exists, strict=True)]
    assert held == [[0, 1, 3, 4], [2, 5], [6, 7], []]
    layer = filled(regard.create("coarse_to_fine", dim=5, num_heads=1, columns=3, tall=2, wide=2))
    close(layer.look(normal(1, 2, 3, 5), normal(2, 2, 8, 5))[1].weights.sum(-1), torch.ones(2, 3).double())


@pytest.mark.parametrize("kind", ["hierarchical", "sparse", "hard"])
@pytest.mark.parametrize("training", [False, True])
def test_empty_and_hidden(kind: str, training: bool) -> None:
    layer = (
        regard.create("coarse_to_fine", dim=5, num_heads=1, columns=3, tall=2, wide=2, kind=kind)
        .double()
        .train(training)
    )
    for B, T, S in ((0, 2, 6), (2, 0, 6), (2, 2, 6)):
        hidden = torch.zeros(B, S).bool()
        (fine,) = leaves(normal(2, B, S, 5))
        out = layer(normal(1, B, T, 5), fine, mask=hidden)
        assert out.shape == (B, T, 5)
        out.sum().backward()
        assert out.isfinite().all()
        assert fine.grad is not None
        assert not fine.grad.any()


def test_the_hard_loss_is_the_loops_and_reinforces() -> None:
    log_target, log_cell, baseline = leaves(*(-normal(n, 6).abs() for n in range(3)))
    ours, theirs = hard_loss(log_target, log_cell, baseline), naive.hard_loss(log_target, log_cell, baseline)
    close(ours, theirs)
    for one, other in zip(
        *(torch.autograd.grad(z, [log_target, log_cell]) for z in (ours, theirs)), strict=True
    ):  # fmt: skip
        close(one, other)


def test_training_draws_cells() -> None:
    layer = built("hard").train()
    torch.manual_seed(0)
    x, fine = normal(1, 1, 1, 5).expand(1, 2000, 5), normal(2, 1, 24, 3)
    cells = layer.look(x, fine)[1].cell[0]
    odds = built("hierarchical").look(x[:, :1], fine)[1].weights[0, 0].view(2, 2, 2, 3).sum((1, 3)).flatten()
    assert (cells.bincount(minlength=4) / 2000 - odds).abs().max() < 0.05


def test_rows_are_read_from_their_own_start() -> None:
    encoder = filled(RowEncoder(3, 4, rows=5))
    grid = normal(1, 2, 2, 3, 3)
    lstm = encoder.lstm
    p = (lstm.weight_ih_l0, lstm.weight_hh_l0, lstm.bias_ih_l0 + lstm.bias_hh_l0)
    got = encoder(grid)
    for b in range(2):
        close(got[b], naive.row_encoder(grid[b], encoder.start.movedim(0, 1), p))


def digits(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Grids of 12 x 12 cells that hold the number of their region (of 9); a cell of each has a digit and a mark."""
    held = regions_of(144, 12, 4, 4).members
    number = torch.zeros(144, dtype=torch.long).scatter(0, held.flatten(), torch.arange(9).repeat_interleave(16))
    digit, spot = (torch.randint(n, (count, 9), generator=generator) for n in (4, 16))
    fine = torch.zeros(count, 144, 16)
    fine[..., 4:13] = torch.nn.functional.one_hot(number, 9).float()
    rows, at = torch.arange(count)[:, None], held[torch.arange(9), spot]
    fine[rows, at, digit] = fine[rows, at, 13] = 4.0
    return fine, digit


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sparse", "hard"])
def test_few_lookups_copy_a_grid_of_digits(kind: Any) -> None:
    """The digits of 9 regions are named in turn. Of 144 fine cells a step looks at those of a region or two, and at
    the 9 coarse ones. Both start from the hierarchical kind."""
    torch.manual_seed(0)
    layer = regard.create("coarse_to_fine", dim=16, num_heads=1, columns=12, tall=4, wide=4, score="general")
    read, steps = nn.Linear(16, 4), nn.Parameter(0.3 * torch.randn(9, 16))
    optimizer = torch.optim.Adam([*layer.parameters(), *read.parameters(), steps], lr=0.03)
    generator, baseline = torch.Generator().manual_seed(1), torch.zeros(())
    for n in range(160):
        layer.kind = "hierarchical" if n < 120 else kind
        fine, digit = digits(16, generator)
        out, looked = layer.train().look(steps.expand(16, -1, -1), fine)
        log_target = -cross_entropy(read(out).flatten(0, 1), digit.flatten(), reduction="none").view(16, 9)
        drawn = looked.log_cell if layer.kind == "hard" else torch.zeros_like(log_target)
        baseline = 0.9 * baseline + 0.1 * log_target.detach().mean()
        loss = hard_loss(log_target, drawn, baseline)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    fine, digit = digits(64, generator)
    given = steps.expand(64, -1, -1)
    right = (read(layer.eval()(given, fine)).argmax(-1) == digit).float().mean()
    lookups = layer.look(given, fine)[1].lookups.float().mean()
    assert right > 0.9
    assert lookups < 9 + 2 * 16


def test_it_feeds_a_decoder() -> None:
    decoder = LuongDecoder(2, built("sparse")).double()
    assert decoder(normal(1, 2, 3, 2), normal(2, 2, 24, 3)).shape == (2, 3, 5)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"kind is unknown \(got 'soft'\)"):
        CoarseToFineAttention(4, kind="soft")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"score is unknown \(got 'dot'\)"):
        CoarseToFineAttention(4, score="dot")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tall is too small \(got 0\)"):
        CoarseToFineAttention(4, tall=0)
    with pytest.raises(ValueError, match=r"coarse has the wrong shape"):
        built("sparse").look(normal(1, 1, 1, 5), normal(2, 1, 24, 3), coarse=normal(3, 1, 3, 3))
    with pytest.raises(ValueError, match=r"grid has too many rows \(got 3\)"):
        RowEncoder(3, 4, rows=2)(normal(1, 1, 3, 2, 3).float())
