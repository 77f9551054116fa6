"""The linear scan over packed documents: each as if by itself, in every form, with every decay and its gradients."""

import pytest
import torch
from torch import Tensor

from kernels.test_linear_scan import DECAYS, agree, inputs, run
from regard import masks
from regard.kernels.linear_scan import linear_scan
from regard.laws.agreement import close, same

LENGTHS = (3, 0, 1, 9, 4)
T = sum(LENGTHS)
ENDS = torch.tensor(LENGTHS).cumsum(0).tolist()


def starts(*, first: bool = True) -> Tensor:
    """(1, T): where documents start; not the first one where it goes on from the state."""
    mask = masks.packed(torch.tensor([0, *ENDS], dtype=torch.int32))
    begins = mask.places(T) == 0
    begins[:, 0] = first
    return begins


def by_document(q: Tensor, k: Tensor, v: Tensor, state: Tensor, decay: Tensor | None = None, *, first: bool = True):
    """Each document by itself: its outputs, and the last one's state. Only the first may go on from `state`."""
    outs, last = [], None
    for begin, end in zip([0, *ENDS], ENDS, strict=False):
        if begin == end:
            continue
        cut = [z[:, :, begin:end] for z in (q, k, v)]
        own = decay if decay is None or decay.dim() == 1 else decay[:, :, begin:end]
        given = state if begin == 0 and not first else None
        out, last = linear_scan(*cut, own, state=given, form="step")
        outs.append(out)
    return torch.cat(outs, 2), last


@pytest.mark.parametrize("first", [True, False], ids=["anew", "goes on"])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("form", ["parallel", "step", "chunked"])
def test_documents_are_alone(form: str, decay: str, first: bool) -> None:
    given, begins = inputs(T, decay), starts(first=first)
    want = run(lambda **each: by_document(**each, first=first), given)
    for chunk in (4, 64) if form == "chunked" else (64,):
        agree(run(lambda chunk=chunk, **each: linear_scan(**each, starts=begins, form=form, chunk=chunk), given), want)


@pytest.mark.parametrize("decay", DECAYS)
def test_rows_of_a_batch_have_their_own_documents(decay: str) -> None:
    given = inputs(T, decay)
    begins = torch.cat([starts(), torch.zeros(1, T, dtype=torch.bool)])
    out, last = linear_scan(**given, starts=begins, chunk=4)
    one, other = linear_scan(**given, starts=starts(), chunk=4), linear_scan(**given, chunk=4)
    for n, want in enumerate((one, other)):
        close(out[n], want.out[n], "out")
        close(last[n], want.state[n], "final state")


def test_a_long_row_in_groups_of_chunks() -> None:
    """More chunks than are joined by one product, and documents that end within and between them."""
    given = inputs(150, "time")
    cu = torch.tensor([0, 1, 40, 64, 150])
    got = linear_scan(**given, starts=masks.packed(cu).places(150) == 0, chunk=2)
    want = linear_scan(**given, starts=masks.packed(cu).places(150) == 0, form="step")
    close(got.out, want.out, "out")
    close(got.state, want.state, "final state")


def test_without_documents_nothing_changes() -> None:
    given = inputs(T, "time")
    same(linear_scan(**given, starts=torch.zeros(1, T, dtype=torch.bool)).out, linear_scan(**given).out, "out")


def test_starts_must_fit() -> None:
    given = inputs(T)
    for wrong in (torch.zeros(T, dtype=torch.bool), starts()[:, 1:], starts().long()):
        with pytest.raises(ValueError, match="linear_scan: starts does not fit q"):
            linear_scan(**given, starts=wrong)
