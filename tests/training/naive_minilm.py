"""MiniLM's two distillation losses written out with loops: one sample, one head, one query row at a time."""

import math

import torch
from torch import Tensor


def naive_relation_kl(
    teacher_a: Tensor,
    teacher_b: Tensor,
    student_a: Tensor,
    student_b: Tensor,
    keep: Tensor | None = None,
    *,
    causal: bool = False,
) -> Tensor:
    """teacher_a, teacher_b (B, H, T, D_T), student_a, student_b (B, H, T, D_S), keep (B, T) -> scalar.

    keep True = a real token.

    Relation of a model: rows softmax_s(a_t . b_s / sqrt(its own D)) over real tokens s (s <= t if causal). KL with the
    teacher as target, summed over heads and real rows, divided by H and the sample's number of real tokens, averaged
    over samples.
    """
    B, H, T, _ = teacher_a.shape
    total = student_a.new_zeros(())
    for b in range(B):
        real = [t for t in range(T) if keep is None or bool(keep[b, t])]
        of_sample = student_a.new_zeros(())
        for h in range(H):
            for t in real:
                seen = [s for s in real if not causal or s <= t]

                def log_row(a: Tensor, z: Tensor, b: int = b, h: int = h, t: int = t, seen=seen) -> list[Tensor]:
                    logits = [torch.dot(a[b, h, t], z[b, h, s]) / math.sqrt(a.shape[-1]) for s in seen]
                    largest = max(float(x) for x in logits)
                    norm = torch.log(sum(((x - largest).exp() for x in logits), a.new_zeros(()))) + largest
                    return [x - norm for x in logits]

                for lt, ls in zip(log_row(teacher_a, teacher_b), log_row(student_a, student_b), strict=True):
                    of_sample = of_sample + lt.exp() * (lt - ls)
        total = total + of_sample / (H * len(real))
    return total / B


def naive_minilm(
    teacher_q: Tensor,
    teacher_k: Tensor,
    teacher_v: Tensor,
    student_q: Tensor,
    student_k: Tensor,
    student_v: Tensor,
    keep: Tensor | None = None,
    *,
    causal: bool = False,
) -> Tensor:
    """(B, H, T, D_T) and (B, H, T, D_S) tensors, keep (B, T) -> L_AT + L_VR, scalar; the teacher gets no gradient."""
    teacher_q, teacher_k, teacher_v = (z.detach() for z in (teacher_q, teacher_k, teacher_v))
    attention = naive_relation_kl(teacher_q, teacher_k, student_q, student_k, keep, causal=causal)
    return attention + naive_relation_kl(teacher_v, teacher_v, student_v, student_v, keep, causal=causal)
