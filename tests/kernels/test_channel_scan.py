"""The scan of channels by themselves: loops, its forms against each other, far decays, documents, half precision."""

import pytest
import torch
from torch import Tensor

from regard.kernels.channel_scan import channel_scan
from regard.laws.agreement import close

B, C = 2, 3


def inputs(T: int, strength: float = 1.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, decay = torch.randn(2, B, T, C, generator=g, dtype=torch.float64)
    state = torch.randn(B, C, generator=g, dtype=torch.float64)
    return {"x": x, "decay": -strength * decay.abs(), "state": state}


def loops(x: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Number by number."""
    rows = []
    for b in range(x.shape[0]):
        for c in range(x.shape[2]):
            h = state[b, c]
            for t in range(x.shape[1]):
                h = torch.exp(decay[b, t, c]) * h + x[b, t, c]
                rows.append(h)
    out = torch.stack(rows).view(x.shape[0], x.shape[2], x.shape[1]).mT
    return out, out[:, -1]


def run(scan, given: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {k: t.clone().requires_grad_() for k, t in given.items()}
    out, state = scan(**leaves)
    loss = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() + state.sin().sum()
    return {
        "out": out.detach(),
        "final": state.detach(),
        **dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())))),
    }


@pytest.mark.parametrize("form", ["chunked", "parallel", "step"])
@pytest.mark.parametrize("T", [1, 2, 16, 17, 70])
def test_forms_are_the_loops(form: str, T: int) -> None:
    got, want = run(lambda **z: channel_scan(**z, form=form), inputs(T)), run(loops, inputs(T))
    for key in want:
        close(got[key], want[key], key)


@pytest.mark.parametrize("strength", [0.0, 1e-9, 40.0, 3000.0], ids=str)
def test_decays_near_one_and_near_zero(strength: float) -> None:
    given = inputs(300, strength)
    want = run(lambda **z: channel_scan(**z, form="step"), given)
    for form in ("chunked", "parallel"):
        got = run(lambda form=form, **z: channel_scan(**z, form=form), given)
        for key in want:
            close(got[key], want[key], key)


@pytest.mark.parametrize("form", ["chunked", "parallel", "step"])
def test_documents_are_runs_of_their_own(form: str) -> None:
    given = inputs(40)
    starts = torch.zeros(1, 40, dtype=torch.bool)
    starts[0, [9, 20]] = True
    got = channel_scan(**given, starts=starts, form=form)
    outs, state = [], given["state"]
    for first, last in ((0, 9), (9, 20), (20, 40)):
        out, end = loops(given["x"][:, first:last], given["decay"][:, first:last], state)
        outs.append(out)
        state = torch.zeros_like(end)
    close(got.out, torch.cat(outs, 1), "out")
    close(got.state, end, "state")


def test_split_equals_whole_and_hidden_tokens_pass_the_state_on() -> None:
    given = inputs(40)
    whole = channel_scan(**given)
    first = channel_scan(given["x"][:, :23], given["decay"][:, :23], state=given["state"])
    second = channel_scan(given["x"][:, 23:], given["decay"][:, 23:], state=first.state)
    close(torch.cat([first.out, second.out], 1), whole.out, "out")
    close(second.state, whole.state, "state")
    given["x"][:, 23:], given["decay"][:, 23:] = 0, 0
    close(channel_scan(**given).state, first.state, "hidden")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_summed_in_single_precision(dtype: torch.dtype) -> None:
    given = {n: z.to(dtype) for n, z in inputs(90).items()}
    got, want = channel_scan(**given), channel_scan(**{n: z.float() for n, z in given.items()})
    assert got.state.dtype is torch.float32
    assert torch.equal(got.out, want.out.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(channel_scan(**{n: z.float() for n, z in given.items()}).out, want.out)


def test_derivatives_and_no_tokens() -> None:
    given = {n: z.requires_grad_() for n, z in inputs(19).items()}
    assert torch.autograd.gradcheck(lambda *z: tuple(channel_scan(**dict(zip(given, z)))), tuple(given.values()))
    none = channel_scan(**inputs(0))
    assert none.out.shape == (B, 0, C)
    assert torch.equal(none.state, inputs(0)["state"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.ones(B, C)}, "channel_scan: x has the wrong shape or dtype"),
        ({"decay": torch.ones(B, 9, C + 1)}, "decay does not fit x"),
        ({"state": torch.ones(B, C + 1)}, "state"),
        ({"starts": torch.ones(B, 9)}, "starts does not fit x"),
        ({"form": "quadratic"}, "form"),
    ],
)
def test_refusals(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        channel_scan(**{**inputs(9), **change})
