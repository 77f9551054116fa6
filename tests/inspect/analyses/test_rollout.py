"""Attention rollout against loops, the authors' numbers (A175) and a path that raw attention does not show."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.inspect.analyses.naive_rollout import naive_rollout
from torch import Tensor

from regard.inspect.analyses.rollout import attention_rollout
from regard.laws.agreement import close

VECTORS = Path(__file__).parents[2] / "vectors" / "A175.npz"


def vectors(case: str) -> dict[str, Tensor]:
    with np.load(VECTORS) as file:
        return {k[2:]: torch.from_numpy(file[k]) for k in file if k.startswith(f"{case}.")}


def maps(layers: int, *shape: int, seed: int = 0, causal: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(layers, *shape, dtype=torch.float64, generator=generator)
    if causal:
        logits = logits.masked_fill(torch.ones(shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
    return list(logits.softmax(-1))


def path() -> list[Tensor]:
    """Two layers of one head on 5 tokens: token 3 is read by position 1, and that by position 0; else all stay."""
    plain = torch.full((5, 5), 0.025, dtype=torch.float64).fill_diagonal_(0.9)
    first, second = plain.clone(), plain.clone()
    first[1] = second[0] = 0.025
    first[1, 3] = second[0, 1] = 0.9
    return [first[None, None], second[None, None]]


def test_by_hand() -> None:
    """Two tokens; the second position reads the first only, the first itself. Half goes around each layer."""
    one = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]], dtype=torch.float64)
    want = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[1.0, 0.0], [0.75, 0.25]]], dtype=torch.float64)
    close(attention_rollout([one, one])[:, 0], want)
    close(attention_rollout([one, one], residual=0.0)[:, 0], one[:, 0].expand(2, 2, 2))
    close(attention_rollout([one, one], residual=1.0)[:, 0], torch.eye(2, dtype=torch.float64).expand(2, 2, 2))


@pytest.mark.parametrize("case", "AB")
def test_gives_the_authors_numbers(case: str) -> None:
    z = vectors(case)
    attention = [layer[None] for layer in z["attention"]]
    close(attention_rollout(attention)[:, 0], z["rollout"])
    close(attention_rollout(attention, residual=0.0)[:, 0], z["rollout_no_residual"])


@pytest.mark.parametrize("heads", ["mean", "max", "min"])
@pytest.mark.parametrize("residual", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_loops(heads: str, residual: float, causal: bool) -> None:
    given = maps(3, 2, 4, 5, 5, causal=causal)
    got = attention_rollout(given, residual=residual, heads=heads)  # type: ignore[arg-type]
    for b in range(2):
        close(got[:, b], naive_rollout([layer[b] for layer in given], residual, heads))


def test_rows_sum_to_one_and_causality_holds() -> None:
    got = attention_rollout(maps(4, 2, 3, 6, 6, causal=True))
    close(got.sum(-1), torch.ones(4, 2, 6, dtype=torch.float64))
    assert not got.triu(1).any()
    assert got.tril().ne(0).sum() == 4 * 2 * 21


def test_layers_may_differ_in_heads() -> None:
    (two,), (three,) = maps(1, 1, 2, 4, 4), maps(1, 1, 3, 4, 4, seed=1)
    close(attention_rollout([two, three])[:, 0], naive_rollout([two[0], three[0]]))


def test_a_query_that_sees_nothing_keeps_itself() -> None:
    (given,) = maps(1, 1, 2, 4, 4)
    given[:, :, 2] = 0
    assert attention_rollout([given])[0, 0, 2].tolist() == [0, 0, 1, 0]
    assert attention_rollout([given], residual=0.0)[0, 0, 2].tolist() == [0, 0, 0, 0]


def test_finds_a_path_that_raw_attention_does_not_show() -> None:
    """The claim, in small: token 3 reaches position 0 through position 1."""
    raw, got = path()[1][0, 0, 0], attention_rollout(path())[1, 0, 0]
    assert raw[3] == raw[2]
    assert 8 < got[3] / got[2] < 10
    assert attention_rollout(path(), residual=0.0)[1, 0, 0].argmax() == 3


def test_gradients_dtypes_and_nan() -> None:
    given = [layer.requires_grad_() for layer in maps(2, 1, 2, 3, 3)]
    assert torch.autograd.gradcheck(lambda *layers: attention_rollout(layers), given)
    half = [layer.detach().bfloat16() for layer in given]
    assert attention_rollout(half).dtype == torch.float32
    half[0][0, 0, 1, 1] = torch.nan
    assert attention_rollout(half)[0, 0].isnan().any(-1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("attention", "options", "error", "says"),
    [
        (
            torch.ones(1, 2, 3, 3),
            {},
            TypeError,
            r"attention has the wrong type \(got Tensor\); expected one map \(B, _H, T, T\) a",
        ),
        ([], {}, ValueError, r"attention is empty \(got \[\]\); expected one map"),
        ([torch.ones(2, 3, 3)], {}, ValueError, r"attention\[0\] .*\(got \(2, 3, 3\)\); expected \(B, _H, T, T\)"),
        (
            [torch.ones(1, 2, 3, 3, dtype=torch.long)],
            {},
            TypeError,
            r"attention\[0\] .*\(got torch.int64\); expected floating",
        ),
        (
            [torch.ones(1, 2, 3, 4)],
            {},
            ValueError,
            r"attention\[0\] .*\(got \(1, 2, 3, 4\)\); expected \(B, _H, T, T\)",
        ),
        (
            [torch.ones(1, 2, 0, 0)],
            {},
            ValueError,
            r"attention\[0\] is empty \(got \(1, 2, 0, 0\)\); expected one at least",
        ),
        (
            [torch.ones(1, 2, 3, 3), torch.ones(1, 2, 4, 4)],
            {},
            ValueError,
            r"attention\[1\] .*\(got \(1, 2, 4, 4\)\); expected \(B = 1, _H, T = 3, T = 3\)",
        ),
        (
            [torch.ones(1, 2, 3, 3)],
            {"residual": 1.5},
            ValueError,
            r"residual is out of range \(got 1.5\); .*>= 0 and <= 1",
        ),
        (
            [torch.ones(1, 2, 3, 3)],
            {"heads": "sum"},
            ValueError,
            "heads is unknown .*'sum'.*one of 'mean', 'max', 'min'",
        ),
    ],
)
def test_what_is_wrong_is_named(attention: object, options: dict, error: type, says: str) -> None:
    with pytest.raises(error, match=f"attention_rollout: {says}"):
        attention_rollout(attention, **options)  # type: ignore[arg-type]
