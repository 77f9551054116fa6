"""What a selection keeps, against whole score matrices."""

import pytest
import torch

from regard import masks
from regard.routing import kept, report
from regard.routing.moba import moba
from regard.routing.xattention import xattention


def heads(T: int, S: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(T + S)
    return torch.randn(2, 4, T, 3, generator=g, dtype=torch.float64), torch.randn(2, 2, S, 3, generator=g).double()


def whole(q: torch.Tensor, k: torch.Tensor, mask: masks.Mask, scale: float) -> torch.Tensor:
    """All weights; rows that see nothing are 0."""
    allowed = mask.dense(q.shape[2], k.shape[2]).expand(2, 4, -1, -1)
    scores = scale * torch.einsum("bhtd,bhsd->bhts", q, k.repeat_interleave(2, 1))
    return scores.masked_fill(~allowed, -torch.inf).softmax(-1).nan_to_num(0.0)


@pytest.mark.parametrize(("T", "S"), [(20, 20), (5, 13)])
@pytest.mark.parametrize("pairs", [1, 2**24])
def test_shares_are_those_of_the_whole_matrix(T: int, S: int, pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "PAIRS", pairs)
    q, k = heads(T, S)
    mask = masks.causal() & masks.padding(torch.arange(S) >= torch.tensor([[0], [3]]))
    selected = moba(q, k, block=4, topk=2, mask=mask)
    got = kept(q, k, selected, mask=mask, scale=0.7)
    allowed, keep = (m.dense(T, S).expand(2, 4, -1, -1) for m in (mask, mask & selected))
    assert got.pairs == pytest.approx(float(keep.sum() / allowed.sum()))
    mass = (whole(q, k, mask, 0.7) * keep).sum(-1)
    alive = allowed.any(-1)
    assert torch.allclose(got.mass, mass.sum(-1) / alive.sum(-1), rtol=1e-12)
    assert torch.allclose(got.least, mass.masked_fill(~alive, 1.0).amin(-1), rtol=1e-12)


def test_everything_and_nothing() -> None:
    q, k = heads(9, 9)
    all_ = kept(q, k, masks.full(), mask=masks.causal())
    assert (all_.pairs, all_.blocks) == (1.0, 1.0)
    assert torch.allclose(all_.mass, torch.ones(2, 4).double())
    none = kept(q, k, ~masks.full())
    assert (none.pairs, none.blocks) == (0.0, 0.0)
    assert not none.mass.any()
    empty = kept(q[:, :, :0], k, masks.full())
    assert (empty.pairs, empty.blocks) == (1.0, 1.0)
    assert empty.mass.eq(1).all()


def test_counts_the_blocks_that_the_kernel_visits() -> None:
    """1 of 4 columns of blocks, and the diagonal, under causality: 4 + 3 of 10."""
    tiles = torch.eye(4, dtype=torch.bool)[None, None] | (torch.arange(4) == 0)
    q, k = torch.randn(2, 1, 1, 64, 4)
    got = kept(q, k, masks.chosen(tiles, 64, 64, 16), mask=masks.causal())
    assert got.blocks == pytest.approx(7 / 10)
    words = str(got)
    assert "70.0% of the blocks" in words
    assert f"{got.pairs:.1%} of the pairs" in words


def test_says_more_for_a_better_choice() -> None:
    q, k = (4 * z for z in heads(64, 64))
    shares = [
        kept(q, k, xattention(q, k, block=8, stride=2, threshold=t, mask=masks.causal()), mask=masks.causal())
        for t in (0.3, 0.9)
    ]
    assert shares[0].pairs < shares[1].pairs < 1
    assert (shares[0].mass < shares[1].mass).all()


def test_refuses() -> None:
    q, k = heads(4, 4)
    with pytest.raises(TypeError, match=r"selected has the wrong type \(got Tensor\); expected a regard\.masks\.Mask"):
        kept(q, k, torch.ones(4, 4))
    with pytest.raises(TypeError, match=r"mask has the wrong type \(got bool\); expected a regard\.masks\.Mask"):
        kept(q, k, masks.full(), mask=True)
