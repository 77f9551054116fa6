"""Attention flow against all cuts, a linear program, the authors' numbers (A175), and a path."""

import sys
from collections.abc import Callable

import pytest
import torch
from scipy.optimize import linprog
from tests.inspect.analyses.naive_rollout import naive_flow, naive_steps
from tests.inspect.analyses.test_rollout import maps, path, vectors
from torch import Tensor

from regard.inspect.analyses.flow import attention_flow
from regard.inspect.analyses.rollout import attention_rollout
from regard.laws.agreement import close


def program(steps: list[list[list[float]]], source: int, sink: int) -> float:
    """The greatest flow as a linear program: what enters a node leaves it."""
    L, T = len(steps), len(steps[0])
    edges = [(level, i, j) for level in range(L) for i in range(T) for j in range(T)]
    inner = [(level, i) for level in range(1, L) for i in range(T)]
    balance = [[float((x + 1, i) == n) - float((x, j) == n) for x, i, j in edges] for n in inner]
    gain = [-float(x == L - 1 and i == source) for x, i, _ in edges]
    bounds = [(0, steps[x][i][j] if x or j == sink else 0) for x, i, j in edges]
    equal = {"A_eq": balance, "b_eq": [0.0] * len(inner)} if inner else {}
    return -linprog(gain, bounds=bounds, **equal).fun


def test_by_hand() -> None:
    """R has edges 0 -> 0 of 1, 1 -> 0 of 1/4 and 1 -> 1 of 3/4.

    So from the top of two layers position 1 takes 1/4 + min(3/4, 1/4) from token 0, and 3/4 from token 1.
    """
    one = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]], dtype=torch.float64)
    got = attention_flow([one, one])[:, 0]
    close(got, torch.tensor([[[1, 0], [0.25, 0.75]], [[1, 0], [0.4, 0.6]]], dtype=torch.float64))


@pytest.mark.parametrize("case", "AB")
def test_gives_the_authors_numbers(case: str) -> None:
    z = vectors(case)
    close(attention_flow([layer[None] for layer in z["attention"]])[:, 0], z["flow"])


@pytest.mark.parametrize("residual", [0.0, 0.5])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_least_of_all_cuts(residual: float, causal: bool) -> None:
    given = maps(2, 2, 2, 3, 3, causal=causal)
    got = attention_flow(given, residual=residual)
    for b in range(2):
        close(got[:, b], naive_flow([layer[b] for layer in given], residual))


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_linear_program(seed: int) -> None:
    given = maps(3, 1, 2, 5, 5, seed=seed)
    steps = naive_steps([layer[0] for layer in given], 0.5, "mean")
    want = torch.tensor([[program(steps, i, j) for j in range(5)] for i in range(5)], dtype=torch.float64)
    close(attention_flow(given, layers=[-1])[0, 0], want / want.sum(-1, keepdim=True))


def test_some_layers_and_rows() -> None:
    given = maps(3, 2, 2, 4, 4)
    whole = attention_flow(given)
    assert whole.shape == (3, 2, 4, 4)
    close(attention_flow(given, layers=[2, 0], rows=[-1]), whole[[2, 0]][:, :, [3]])
    close(attention_flow([given[0]])[0], attention_rollout([given[0]])[0])


def test_ties_do_not_matter() -> None:
    """Where all weights are equal, all inputs are."""
    even = torch.full((1, 1, 4, 4), 0.25, dtype=torch.float64)
    close(attention_flow([even] * 3, residual=0.0), torch.full((3, 1, 4, 4), 0.25, dtype=torch.float64))


def test_finds_a_path_that_raw_attention_does_not_show() -> None:
    """The claim, in small, with the numbers of the authors' functions on it."""
    got = attention_flow(path(), layers=[1], rows=[0])[0, 0, 0]
    close(got.round(decimals=3), torch.tensor([0.333, 0.296, 0.037, 0.296, 0.037], dtype=torch.float64))


def test_dtype_and_device_are_those_of_the_maps() -> None:
    given = [layer.bfloat16() for layer in maps(1, 1, 2, 3, 3)]
    assert attention_flow(given).dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        (lambda a: a, {"layers": [2]}, r"layers\[0\] is too large \(got 2\); expected an int from -2 to 1"),
        (lambda a: a, {"rows": []}, r"rows is empty \(got \[\]\); expected one number at least"),
        (lambda a: a * torch.nan, {}, r"attention\[0\] has weights that are negative, NaN or infinite \(got nan\)"),
        (lambda a: -a, {}, r"attention\[0\] has weights that are negative, NaN or infinite \(got -0"),
        (lambda a: a[0], {}, r"attention\[0\] has the wrong shape \(got \(2, 3, 3\)\); expected \(B, _H, T, T\)"),
    ],
)
def test_what_is_wrong_is_named(change: Callable[[Tensor], Tensor], options: dict, says: str) -> None:
    given = [change(layer) for layer in maps(2, 1, 2, 3, 3)]
    with pytest.raises(ValueError, match=f"attention_flow: {says}"):
        attention_flow(given, **options)


def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ImportError, match=r'pip install "regard\[inspect\]"'):
        attention_flow(maps(1, 1, 1, 2, 2))
