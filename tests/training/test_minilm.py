"""MiniLM's loss against loops over rows, public numbers (A139), and a student that learns by it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import regard
from regard.laws.agreement import close, close_all, run
from regard.training import MiniLMLoss, minilm_loss
from training.naive_minilm import naive_minilm

VECTORS = Path(__file__).parents[1] / "vectors" / "A139.npz"


def heads(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def six(B: int, H: int, T: int, teacher: int, student: int) -> list[Tensor]:
    return [heads(n, B, H, T, teacher if n < 3 else student) for n in range(6)]


@pytest.mark.parametrize("case", "AB")
def test_gives_the_numbers_of_the_public_code(case: str) -> None:
    with np.load(VECTORS) as file:
        z = {k[2:]: torch.from_numpy(file[k]) for k in file if k.startswith(f"{case}.")}
    teacher = tuple(z[f"teacher_{n}"] for n in "qkv")
    student = tuple(z[f"student_{n}"].requires_grad_() for n in "qkv")
    keep = z["mask"].bool()
    losses = minilm_loss(teacher, student, keep=keep)
    close(losses[0].detach(), z["loss_attention"].reshape(()))
    close(losses[1].detach(), z["loss_value"].reshape(()))
    loss = MiniLMLoss()(*teacher, *student, mask=keep)
    close(loss.detach(), z["loss"].reshape(()))
    for n, grad in zip("qkv", torch.autograd.grad(loss, student), strict=True):
        close(grad, z[f"grad_student_{n}"])


class Naive(nn.Module):
    def __init__(self, causal: bool, keep: Tensor | None) -> None:
        super().__init__()
        self.causal, self.keep = causal, keep

    def forward(self, *given: Tensor) -> Tensor:
        return naive_minilm(*given, self.keep, causal=self.causal)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 3, 2), (2, 3, 5, 4, 2), (2, 2, 4, 3, 6)])
def test_equals_the_loops(causal: bool, sizes: tuple[int, ...]) -> None:
    given, loss = six(*sizes), MiniLMLoss(causal=causal)
    close_all(run(loss, *given), run(Naive(causal, None), *given))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("side", ["left", "right", "inside"])
def test_padding_equals_the_loops_and_cannot_poison(causal: bool, side: str) -> None:
    given, loss = six(2, 3, 5, 4, 2), MiniLMLoss(causal=causal)
    keep = torch.ones(2, 5, dtype=torch.bool)
    keep[0, {"left": slice(0, 2), "right": slice(3, 5), "inside": slice(1, 3)}[side]] = False
    want = run(Naive(causal, keep), *given)
    poisoned = [z.masked_fill(~keep[:, None, :, None], torch.nan) for z in given]
    close_all(run(loss, *poisoned, mask=keep), want)


def test_a_sample_of_padding_counts_nothing() -> None:
    given = six(2, 3, 5, 4, 2)
    keep = torch.tensor([[True], [False]]).expand(2, 5)
    got, want = run(MiniLMLoss(), *given, mask=keep), run(MiniLMLoss(), *(z[:1] for z in given))
    close(got["out"], want["out"] / 2)
    for n in (3, 4, 5):
        close(got[f"input{n}"][:1], want[f"input{n}"] / 2)
        assert not got[f"input{n}"][1].any()


def test_zero_only_for_the_same_relations() -> None:
    """Relations, not features, are copied: rotations of the student's heads cost nothing."""
    q, k, v, *_ = six(2, 3, 5, 4, 4)
    loss = MiniLMLoss()
    close(loss(q, k, v, q, k, v), torch.zeros((), dtype=torch.float64))
    turn, other = torch.linalg.qr(heads(9, 4, 4)).Q, heads(10, 4, 4)
    close(loss(q, k, v, q @ other, k @ torch.linalg.inv(other).T, v @ turn), torch.zeros((), dtype=torch.float64))
    assert loss(q, k, v, k, q, v) > 0.1
    assert loss(q, k, v, q, k, q) > 0.1


def test_teacher_gets_no_gradient() -> None:
    given = [z.requires_grad_() for z in six(1, 2, 3, 4, 4)]
    grads = torch.autograd.grad(MiniLMLoss()(*given), given, allow_unused=True)
    assert [g is None for g in grads] == [True] * 3 + [False] * 3


def test_a_narrower_student_approaches_the_teacher() -> None:
    """The teacher's heads are 8 wide, the student's 5; it sees the same inputs and learns by this loss alone."""
    torch.manual_seed(0)
    x = torch.randn(8, 12, 16)
    teacher = [z.unflatten(-1, (4, 8)).transpose(1, 2) for z in (x @ torch.randn(16, 96) / 4).chunk(3, -1)]
    student = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 60))
    optimizer, loss = torch.optim.Adam(student.parameters(), lr=1e-2), MiniLMLoss()

    def relations() -> list[Tensor]:
        return [z.unflatten(-1, (4, 5)).transpose(1, 2) for z in student(x).chunk(3, -1)]

    first = loss(*teacher, *relations()).item()
    for _ in range(200):
        optimizer.zero_grad()
        loss(*teacher, *relations()).backward()
        optimizer.step()
    q, k, _ = relations()
    assert loss(*teacher, *relations()) < 0.1 * first
    want = (teacher[0] @ teacher[1].mT / 8**0.5).softmax(-1)
    got = (q @ k.mT / 5**0.5).softmax(-1)
    assert (got - want).abs().sum(-1).mean() < 0.3 < (want.mean(-1, keepdim=True) - want).abs().sum(-1).mean()


def test_bad_input_raises() -> None:
    given = six(2, 3, 5, 4, 2)
    with pytest.raises(
        ValueError, match=r"student_q has the wrong shape \(got \(2, 2, 5, 2\)\); expected \(B = 2, H = 3"
    ):
        MiniLMLoss()(*given[:3], given[3][:, :2], *given[4:])
    with pytest.raises(ValueError, match=r"student_k has the wrong shape \(got \(2, 3, 5, 1\)\); .* E = 2"):
        MiniLMLoss()(*given[:4], given[4][..., :1], given[5])
    with pytest.raises(ValueError, match=r"mask has the wrong shape \(got \(2, 4\)\); expected \(B = 2, T = 5\)"):
        MiniLMLoss()(*given, mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"mask has the wrong dtype \(got torch\.float32\); expected torch\.bool"):
        MiniLMLoss()(*given, mask=torch.ones(2, 5))
    assert regard.create("minilm", dim=8, num_heads=2, causal=True).causal
