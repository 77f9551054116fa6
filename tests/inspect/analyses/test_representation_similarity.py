"""CKA against loops, and what it must not see."""

import pytest
import torch
from tests.inspect.analyses.naive_attention_distance import naive_cka

from regard.inspect.analyses.representation_similarity import representation_similarity
from regard.laws.agreement import close


def test_equals_the_loops() -> None:
    """Two batches of different size, layers of different width and shape."""
    xs = [[torch.randn(n, 3, 2).double(), torch.randn(n, 5).double()] for n in (6, 5)]
    ys = [[torch.randn(n, 4).double() + 2, torch.randn(n, 2, 2).double(), batch[1]] for n, batch in zip((6, 5), xs)]
    got = representation_similarity(xs, ys)
    want = torch.tensor(
        [[naive_cka([b[i] for b in xs], [b[j] for b in ys]) for j in range(3)] for i in range(2)], dtype=torch.float64
    )
    close(got, want)
    assert got[1, 2].item() == pytest.approx(1)
    close(representation_similarity(xs).diagonal(), torch.ones(2, dtype=torch.float64))


def test_does_not_see_rotation_scale_and_shift() -> None:
    """By hand: an orthogonal map keeps all inner products, and HSIC is blind to what is the same everywhere."""
    x = torch.randn(20, 6).double()
    turn = torch.linalg.qr(torch.randn(6, 6).double()).Q
    got = representation_similarity([[x]], [[3 * x @ turn, x @ turn + 1, torch.randn(20, 6).double()]])
    assert got[0, 0].item() == pytest.approx(1)
    assert got[0, 1].item() == pytest.approx(1)
    assert got[0, 2].abs() < 0.3


def test_has_no_bias() -> None:
    """Unrelated features of 200 dimensions, for which the plain estimate would say about 0.9; and turned ones."""
    turn = torch.linalg.qr(torch.randn(200, 200)).Q
    xs = [torch.randn(16, 200) for _ in range(40)]
    found = torch.stack([representation_similarity([[x]], [[torch.randn(16, 200), x @ turn]]) for x in xs])
    unrelated, turned = found.mean((0, 1))
    assert unrelated.abs() < 0.05
    assert turned > 0.99


def test_what_is_wrong_is_named() -> None:
    x = [[torch.randn(5, 3)]]
    with pytest.raises(
        ValueError, match=r"representation_similarity: y has another number of batches than x \(got 2\); expected 1"
    ):
        representation_similarity(x, x + x)
    with pytest.raises(
        ValueError, match=r"representation_similarity: x .*\(got layers of \[3\] inputs\); .*at least 4"
    ):
        representation_similarity([[torch.randn(3, 3)]])
    with pytest.raises(
        ValueError, match=r"representation_similarity: x .*\(got layers of \[4, 5\] inputs\); expected as many"
    ):
        representation_similarity([[torch.randn(4, 3), torch.randn(5, 3)]])
    with pytest.raises(ValueError, match=r"representation_similarity: y .*\(got 6 inputs\); expected the same 5"):
        representation_similarity(x, [[torch.randn(6, 3)]])
