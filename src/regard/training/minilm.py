"""MiniLM distillation: a student learns the teacher's last attention maps and value relations.

The relations are T x T, so that widths may differ; numbers of heads may not. Last layers are compared. With a teacher
assistant, apply it twice: teacher to assistant, assistant to student.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked
from regard.shapes import HeadShape


def _inputs(shape: HeadShape) -> tuple[Tensor, ...]:
    """q, k, v of a teacher, and of a student with narrower heads."""
    generator = torch.Generator().manual_seed(0)
    widths = 3 * [shape.head_dim] + 3 * [max(1, shape.head_dim - 1)]
    return tuple(torch.randn(2, shape.num_heads, 12, w, generator=generator, dtype=torch.float64) for w in widths)


FIXED = "no gradient reaches the teacher, by design"

CARD = Card(
    "minilm",
    equation="""A = softmax(q k^T / sqrt(D)),   R = softmax(v v^T / sqrt(D)),   each model with its own head width D
loss = 1 / (H T) sum over heads and rows of KL(A_teacher || A_student) + KL(R_teacher || R_student)""",
    papers=(
        Paper(
            "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers",
            "Wang et al.",
            2020,
            "2002.10957",
            "abstract; the formulas in three independent restatements, third-party code among them",
        ),
    ),
    protocol="Loss",
    inputs=_inputs,
    supports={"causal", "bidirectional", "padding", "compile"},
    cost=Cost("4*B*H*T*T*D", ""),
    claim="A narrower student trained by this loss alone takes on the teacher's attention: "
    "tests/training/test_minilm.py::test_a_narrower_student_approaches_the_teacher.",
    differs=("Padded tokens count neither as rows nor as keys, and batches take the mean over their sequences.",),
    verified="third-party",
    exceptions={"L23": FIXED, "L51": FIXED},
)


def relation(
    a: Float[Tensor, "B H T D"], b: Float[Tensor, "B H T D"], allowed: Bool[Tensor, "#B 1 #T T"] | None = None
) -> Float[Tensor, "B H T T"]:
    """log softmax(a b^T / sqrt(D)) in at least fp32; 0 where not allowed."""
    scores = (a @ b.mT).to(torch.promote_types(a.dtype, torch.float32)) * int(a.shape[-1]) ** -0.5
    if allowed is None:
        return scores.log_softmax(-1)
    return scores.masked_fill(~allowed, -torch.inf).log_softmax(-1).masked_fill(~allowed, 0)


def divergence(
    teacher: Float[Tensor, "B H T T"],
    student: Float[Tensor, "B H T T"],
    allowed: Bool[Tensor, "#B 1 #T T"] | None = None,
) -> Float[Tensor, "B H T"]:
    """KL(teacher || student) of each row, from log-probabilities."""
    p = teacher.exp() if allowed is None else teacher.exp().masked_fill(~allowed, 0)
    return (p * (teacher - student)).sum(-1)


def minilm_loss(
    teacher: tuple[Tensor, Tensor, Tensor],
    student: tuple[Tensor, Tensor, Tensor],
    *,
    keep: Bool[Tensor, "B T"] | None = None,
    causal: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The two losses, of attention and of value relations. Teacher and student are (q, k, v), each (B, H, T, D)."""
    _, H, T, _ = teacher[0].shape
    device = teacher[0].device
    allowed = None
    if causal:
        allowed = torch.ones(1, 1, T, T, dtype=torch.bool, device=device).tril()
    if keep is not None:
        hide = ~keep[:, None, :, None]
        teacher, student = (tuple(z.masked_fill(hide, 0) for z in zs) for zs in (teacher, student))  # type: ignore
        allowed = keep[:, None, None] if allowed is None else allowed & keep[:, None, None]
    (tq, tk, tv), (sq, sk, sv) = (z.detach() for z in teacher), student
    losses = []
    for ours, theirs in (((tq, tk), (sq, sk)), ((tv, tv), (sv, sv))):
        rows = divergence(relation(*ours, allowed), relation(*theirs, allowed), allowed)
        if keep is None:
            losses.append(rows.mean())
        else:
            count = H * keep.sum(1).clamp_min(1)
            losses.append((rows.masked_fill(~keep[:, None], 0).sum((1, 2)) / count).mean())
    return losses[0], losses[1]


@CARD.module
class MiniLMLoss(nn.Module):
    """Attention plus value-relation loss between the last layers of a teacher and a student.

    Args:
        causal: both models are causal; relations are too.
    """

    def __init__(self, *, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal

    @checked()
    def forward(
        self,
        teacher_q: Float[Tensor, "B H T D"],
        teacher_k: Float[Tensor, "B H T D"],
        teacher_v: Float[Tensor, "B H T V"],
        student_q: Float[Tensor, "B H T E"],
        student_k: Float[Tensor, "B H T E"],
        student_v: Float[Tensor, "B H T W"],
        *,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss; `mask` is True at real tokens. No gradient reaches the teacher."""
        teacher, student = (teacher_q, teacher_k, teacher_v), (student_q, student_k, student_v)
        attention, values = minilm_loss(teacher, student, keep=mask, causal=self.causal)
        return (attention + values).to(student_q.dtype)
