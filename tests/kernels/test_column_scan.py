"""The scan whose columns fade: loops, its forms against each other, far decays, documents, half precision."""

import pytest
import torch
from torch import Tensor

from regard.kernels.column_scan import column_scan
from regard.laws.agreement import close

B, H, K, V = 2, 2, 3, 4


def inputs(T: int, strength: float = 1.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, B, H, T, K, generator=g, dtype=torch.float64)
    v, decay = torch.randn(2, B, H, T, V, generator=g, dtype=torch.float64)
    state = torch.randn(B, H, K, V, generator=g, dtype=torch.float64)
    return {"q": q, "k": k, "v": v, "decay": -strength * decay.abs(), "state": state}


def all_pairs(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Each value by itself, with what it lost since it was written."""
    outs = []
    for t in range(q.shape[2]):
        now = decay[:, :, : t + 1].sum(2)[..., None, :].exp() * state
        for j in range(t + 1):
            kept = decay[:, :, j + 1 : t + 1].sum(2).exp() * v[:, :, j]
            now = now + k[:, :, j, :, None] * kept[:, :, None]
        outs.append((q[:, :, t, :, None] * now).sum(2))
    return torch.stack(outs, 2), now


def run(scan, given: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {n: z.clone().requires_grad_() for n, z in given.items()}
    out, state = scan(**leaves)
    loss = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() + state.sin().sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out.detach(), "final": state.detach(), **dict(zip(leaves, grads))}


@pytest.mark.parametrize("form", ["chunked", "step"])
@pytest.mark.parametrize(("T", "strength"), [(1, 1.0), (2, 1.0), (13, 0.3), (13, 3000.0)])
def test_forms_are_all_pairs(form: str, T: int, strength: float) -> None:
    got, want = (
        run(lambda **z: column_scan(**z, form=form, chunk=4), inputs(T, strength)),
        run(all_pairs, inputs(T, strength)),
    )
    for key in want:
        close(got[key], want[key], key)


@pytest.mark.parametrize("chunk", [7, 64])
def test_chunks_and_segments_make_no_difference(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(150, 0.1)
    want = run(lambda **z: column_scan(**z, form="step"), given)
    monkeypatch.setattr("regard.kernels.linear_scan.NUMBERS", 2000)
    got = run(lambda **z: column_scan(**z, chunk=chunk), given)
    for key in want:
        close(got[key], want[key], key)


@pytest.mark.parametrize("form", ["chunked", "step"])
def test_documents_are_runs_of_their_own(form: str) -> None:
    given = inputs(20, 0.2)
    starts = torch.zeros(1, 20, dtype=torch.bool)
    starts[0, [6, 7, 15]] = True
    got = column_scan(**given, starts=starts, form=form, chunk=4)
    outs, state = [], given["state"]
    for first, last in ((0, 6), (6, 7), (7, 15), (15, 20)):
        out, end = all_pairs(*(given[n][:, :, first:last] for n in ("q", "k", "v", "decay")), state)
        outs.append(out)
        state = torch.zeros_like(end)
    close(got.out, torch.cat(outs, 2), "out")
    close(got.state, end, "state")


def test_half_precision_and_no_tokens() -> None:
    given = {n: z.bfloat16() for n, z in inputs(30).items()}
    got, want = column_scan(**given), column_scan(**{n: z.float() for n, z in given.items()})
    assert got.state.dtype is torch.float32
    assert torch.equal(got.out, want.out.bfloat16())
    none = column_scan(**inputs(0))
    assert none.out.shape == (B, H, 0, V)
    assert torch.equal(none.state, inputs(0)["state"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": torch.ones(B, H, 9, K + 1).double()}, "column_scan: q, k and v have the wrong shapes"),
        ({"decay": torch.ones(B, H, 9, K).double()}, "column_scan: decay has the wrong shape"),
        ({"state": torch.ones(B, H, V, K)}, "state"),
        ({"starts": torch.ones(B, 9)}, "starts does not fit q"),
        ({"form": "quadratic"}, "form"),
    ],
)
def test_refusals(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        column_scan(**{**inputs(9), **change})
