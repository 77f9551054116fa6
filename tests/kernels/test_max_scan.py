"""The running maximum of what fades: loops, its forms against each other, far decays, documents."""

import pytest
import torch
from torch import Tensor

from regard.kernels.max_scan import EMPTY, max_scan
from regard.laws.agreement import close

B, C = 2, 3


def inputs(T: int, strength: float = 1.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, decay = torch.randn(2, B, T, C, generator=g, dtype=torch.float64)
    return {"x": x, "decay": -strength * decay.abs(), "state": torch.randn(B, C, generator=g, dtype=torch.float64)}


def all_pairs(x: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Every earlier number less what it lost until now, and the greatest of them."""
    rows = []
    for t in range(x.shape[1]):
        lost = [decay[:, j + 1 : t + 1].sum(1) for j in range(t + 1)]
        now = [state + decay[:, : t + 1].sum(1), *(x[:, j] + lost[j] for j in range(t + 1))]
        rows.append(torch.stack(now).amax(0))
    return torch.stack(rows, 1), rows[-1]


def run(scan, given: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {k: t.clone().requires_grad_() for k, t in given.items()}
    out, state = scan(**leaves)
    loss = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() + state.sin().sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out.detach(), "final": state.detach(), **dict(zip(leaves, grads))}


@pytest.mark.parametrize("form", ["chunked", "parallel", "step"])
@pytest.mark.parametrize(("T", "strength"), [(1, 1.0), (2, 1.0), (16, 0.0), (17, 0.1), (70, 0.05), (70, 3000.0)])
def test_forms_are_the_greatest_of_all_earlier(form: str, T: int, strength: float) -> None:
    given = inputs(T, strength)
    got, want = run(lambda **z: max_scan(**z, form=form), given), run(all_pairs, given)
    for key in want:
        close(got[key], want[key], key)


@pytest.mark.parametrize("form", ["chunked", "parallel", "step"])
def test_documents_are_runs_of_their_own(form: str) -> None:
    given = inputs(40, 0.1)
    starts = torch.zeros(1, 40, dtype=torch.bool)
    starts[0, [9, 10, 20]] = True
    got = max_scan(**given, starts=starts, form=form)
    outs, state = [], given["state"]
    for first, last in ((0, 9), (9, 10), (10, 20), (20, 40)):
        out, end = all_pairs(given["x"][:, first:last], given["decay"][:, first:last], state)
        outs.append(out)
        state = torch.full_like(end, EMPTY)
    close(got.out, torch.cat(outs, 1), "out")
    close(got.state, end, "state")


def test_split_equals_whole_and_hidden_tokens_pass_the_state_on() -> None:
    given = inputs(40, 0.1)
    whole = max_scan(**given)
    first = max_scan(given["x"][:, :23], given["decay"][:, :23], state=given["state"])
    second = max_scan(given["x"][:, 23:], given["decay"][:, 23:], state=first.state)
    close(torch.cat([first.out, second.out], 1), whole.out, "out")
    given["x"][:, 23:], given["decay"][:, 23:] = EMPTY, 0
    close(max_scan(**given).state, first.state, "hidden")


def test_nothing_and_half_precision() -> None:
    none = max_scan(**inputs(0))
    assert none.out.shape == (B, 0, C)
    assert torch.equal(none.state, inputs(0)["state"])
    given = {n: z.bfloat16() for n, z in inputs(30).items()}
    got = max_scan(**given)
    assert torch.equal(got.out, max_scan(**{n: z.float() for n, z in given.items()}).out)
    empty = torch.full((1, 300, 1), EMPTY)
    many = max_scan(empty, torch.zeros_like(empty), starts=torch.ones(1, 300, dtype=torch.bool))
    assert many.out.eq(EMPTY).all(), "documents with no token at all"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.ones(B, C)}, "max_scan: x has the wrong shape or dtype"),
        ({"decay": torch.ones(B, 9, C + 1)}, "max_scan: decay does not fit x"),
        ({"starts": torch.ones(B, 9)}, "starts does not fit x"),
        ({"form": "quadratic"}, "form"),
    ],
)
def test_refusals(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        max_scan(**{**inputs(9), **change})
