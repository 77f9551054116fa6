"""The delta rule: stored numbers of another library, its forms against each other, far decays, documents, long ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from regard.kernels.delta_scan import delta_scan
from regard.kernels.linear_scan import Scan, linear_scan
from regard.laws.agreement import close

VECTORS = Path(__file__).parents[1] / "vectors" / "kda_naive.npz"
B, H, K, V = 2, 3, 4, 5
DECAYS = ["none", "head", "time", "feature"]


def inputs(T: int, decay: str = "none", strength: float = 1.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    made = {"q": normal(B, H, T, K), "k": normal(B, H, T, K), "v": normal(B, H, T, V), "state": normal(B, H, K, V)}
    made["k"] = made["k"] / made["k"].norm(dim=-1, keepdim=True)
    made["beta"] = 2 * torch.rand(B, H, T, generator=g, dtype=torch.float64)
    shapes = {"head": (H,), "time": (B, H, T), "feature": (B, H, T, K)}
    if decay != "none":
        made["decay"] = -strength * normal(*shapes[decay]).abs()
    return made


def run(given: dict[str, Tensor], **options: object) -> dict[str, Tensor]:
    """Outputs, final state, and the gradients of all inputs, of a loss on both."""
    leaves = {k: t.clone().requires_grad_() for k, t in given.items()}
    out, state = delta_scan(**leaves, **options)  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(99)
    loss = sum((z * torch.randn(z.shape, generator=g, dtype=z.dtype)).sum() for z in (out, state))
    found = torch.autograd.grad(loss, list(leaves.values()))  # type: ignore[arg-type]
    return {"out": out.detach(), "final": state.detach(), **dict(zip(leaves, found, strict=True))}


def agree(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    for key in want:
        close(got[key], want[key], key)


@pytest.mark.parametrize("options", [{"form": "step"}, {"form": "parallel"}, {"chunk": 3}, {"chunk": 64}], ids=str)
def test_stored_numbers(options: dict) -> None:
    """Those of Kimi delta attention: a decay for each key feature, and two value heads to a key head."""
    with np.load(VECTORS) as stored:
        z = {name.removeprefix("k_"): torch.from_numpy(stored[name]) for name in stored}
    names = ("q", "k", "v", "log_decay", "beta")
    leaves = {n: z[n].clone().requires_grad_() for n in names}
    q, k, v, g, beta = (leaves[n].transpose(1, 2) for n in names)
    q, k = (x.expand(-1, v.shape[1], -1, -1) for x in (q, k))
    got = delta_scan(q / q.shape[-1] ** 0.5, k, v, beta, g, state=z["state0"], **options)
    out = got.out.transpose(1, 2)
    close(out, z["out"], "out")
    close(got.state, z["state"], "state")
    known = [n for n in names if f"g{n}" in z]
    assert len(known) == 4
    found = torch.autograd.grad((out * z["w"]).sum(), [leaves[n] for n in known])
    for name, d in zip(known, found, strict=True):
        close(d, z[f"g{name}"], name)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("T", [1, 2, 9, 17])
def test_forms_are_the_recurrence(decay: str, T: int) -> None:
    given = inputs(T, decay)
    want = run(given, form="step")
    agree(run(given, form="parallel"), want)
    for chunk in (1, 4, 5, 64):
        agree(run(given, chunk=chunk), want)


@pytest.mark.parametrize("decay", DECAYS[1:])
@pytest.mark.parametrize("strength", [0.0, 1e-9, 40.0, 3000.0], ids=str)
def test_decays_near_one_and_near_zero(decay: str, strength: float) -> None:
    given = inputs(71, decay, strength)
    want = run(given, form="step")
    for options in ({"form": "parallel"}, {"chunk": 3}, {"chunk": 16}):
        got = run(given, **options)
        assert all(t.isfinite().all() for t in got.values())
        agree(got, want)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("options", [{"form": "step"}, {"form": "parallel"}, {"chunk": 4}], ids=str)
def test_documents_are_runs_of_their_own(decay: str, options: dict) -> None:
    given = inputs(13, decay)
    starts = torch.zeros(1, 13, dtype=torch.bool)
    starts[0, [5, 6]] = True
    got = delta_scan(**given, starts=starts, **options)
    outs, state = [], given["state"]
    for first, last in ((0, 5), (5, 6), (6, 13)):
        part = {n: z[:, :, first:last] if n != "state" and z.dim() > 2 else z for n, z in given.items()}
        out, state = delta_scan(**{**part, "state": state}, form="step")
        outs.append(out)
        state = torch.zeros_like(state) if last < 13 else state
    close(got.out, torch.cat(outs, 2), "out")
    close(got.state, state, "state")


@pytest.mark.parametrize("decay", DECAYS)
def test_split_equals_whole_and_hidden_tokens_pass_the_state_on(decay: str) -> None:
    given = inputs(20, decay)
    whole = delta_scan(**given, chunk=8)
    outs, state = [], given["state"]
    for first, last in ((0, 7), (7, 8), (8, 20)):
        part = {n: z[:, :, first:last] if n != "state" and z.dim() > 2 else z for n, z in given.items()}
        out, state = delta_scan(**{**part, "state": state}, chunk=8)
        outs.append(out)
    close(torch.cat(outs, 2), whole.out, "out")
    close(state, whole.state, "state")
    given["beta"][:, :, 5:] = 0
    if "decay" in given and decay != "head":
        given["decay"][:, :, 5:] = 0
        early = {n: z[:, :, :5] if n != "state" else z for n, z in given.items()}
        close(delta_scan(**given, chunk=8).state, delta_scan(**early, chunk=8).state, "state")


def test_a_key_written_twice_is_read_as_last_written() -> None:
    """Where linear attention reads the sum of both."""
    key = torch.tensor([0.6, 0.0, 0.8, 0.0], dtype=torch.float64)
    k, v = key.expand(1, 1, 2, 4), torch.randn(1, 1, 2, 3, dtype=torch.float64)
    got = delta_scan(k, k, v, torch.ones(1, 1, 2, dtype=torch.float64))
    close(got.out[:, :, 1], v[:, :, 1], "the last")
    close(linear_scan(k, k, v).out[:, :, 1], v.sum(2), "the sum")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_are_summed_in_single_precision(dtype: torch.dtype) -> None:
    given = {n: z.float() if n == "state" else z.to(dtype) for n, z in inputs(90, "time").items()}
    got = delta_scan(**given)
    want = delta_scan(**{n: z.float() for n, z in given.items()})
    assert got.out.dtype is dtype
    assert got.state.dtype is torch.float32
    assert torch.equal(got.out, want.out.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(delta_scan(**{n: z.float() for n, z in given.items()}).out, want.out)


@pytest.mark.parametrize("decay", DECAYS)
def test_derivatives(decay: str) -> None:
    given = {n: z.requires_grad_() for n, z in inputs(5, decay).items()}
    assert torch.autograd.gradcheck(lambda *z: tuple(delta_scan(**dict(zip(given, z)), chunk=2)), tuple(given.values()))


def test_nothing_grows_over_many_tokens() -> None:
    """Rates of writing up to 2 for keys of length 1, in single precision."""
    given = {n: z.float() for n, z in inputs(4000).items()}
    got, want = (delta_scan(**{n: z.to(t) for n, z in given.items()}) for t in (torch.float32, torch.float64))
    assert (got.out - want.out).abs().max() < 1e-3 * want.out.abs().max()


def test_no_tokens() -> None:
    given = inputs(0, "time")
    got = delta_scan(**given)
    assert isinstance(got, Scan)
    assert got.out.shape == (B, H, 0, V)
    assert torch.equal(got.state, given["state"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"beta": torch.ones(B, H, 3)}, r"delta_scan: beta does not fit q \(got \(2, 3, 3\)"),
        ({"k": torch.ones(B, H, 9, K + 1).double()}, "q, k and v have the wrong shapes"),
        ({"decay": torch.ones(3, 3).double()}, "decay has the wrong shape"),
        ({"form": "quadratic"}, "form"),
        ({"chunk": 0}, "chunk"),
    ],
)
def test_refusals(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        delta_scan(**{**inputs(9), **change})


@pytest.mark.parametrize("decay", DECAYS)
def test_segments_are_the_whole(decay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs(45, decay)
    want = run(given, chunk=4)
    monkeypatch.setattr("regard.kernels.linear_scan.NUMBERS", 8 * B * H * (K + V + 1))
    agree(run(given, chunk=4), want)
