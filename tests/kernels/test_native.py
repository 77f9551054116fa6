"""The C++ kernels: they compute in fp32 (bf16 on tile registers), so float64 is the reference here and not an input."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import regard
from kernels.test_kernels import MASKS
from regard import masks
from regard.kernels import native
from regard.kernels.native import build
from regard.kernels.problem import Problem, attend
from regard.laws.agreement import naive_precision, near
from regard.masks import Mask
from regard.normalizers import Entmax
from regard.normalizers.entmax import entmax
from regard.normalizers.topk import topk
from regard.positions import Alibi, Kerple, T5Bias
from regard.stages import Position, Rows

pytestmark = pytest.mark.skipif(bool(build.why_not()), reason=f"no C++ kernels here: {'; '.join(build.why_not())}")


def tensors(B: int, H: int, G: int, T: int, S: int, D: int, V: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((B, H, T, D), (B, G, S, D), (B, G, S, V))
    return [torch.randn(n, generator=generator).to(dtype).requires_grad_() for n in sizes]


def problem(given: list[Tensor], **stages: object) -> Problem:
    return Problem(*given, scale=given[0].shape[3] ** -0.5, **stages)


def all_of(p: Problem, run, given: list[Tensor], extra: list[Tensor]) -> list[Tensor]:
    out = run(p)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [*given, *extra], grad)]


def eager(p: Problem) -> Tensor:
    return attend(p, slice(0, p.q.shape[2]), slice(0, p.k.shape[2]))


def agrees(
    given: list[Tensor],
    mask: Mask | None,
    position: Position | None = None,
    bias: Tensor | None = None,
    *,
    kernel: ModuleType = native,
) -> None:
    """No worse than torch's own operations in the same dtype, measured against float64: output and gradients."""
    p = problem(given, mask=mask, position=position, bias=bias)
    assert kernel.why_not(p) == []
    parameters = [] if position is None else list(position.parameters())
    got = all_of(p, kernel.run, given, parameters)
    with naive_precision():
        plain = all_of(p, eager, given, parameters)
    wide = [x.detach().double().requires_grad_() for x in given]
    twin = None if position is None else copy.deepcopy(position).double()
    exact = problem(wide, mask=mask, position=twin, bias=None if bias is None else bias.double())
    want = all_of(exact, eager, wide, [] if twin is None else list(twin.parameters()))
    for n, (g, w, naive) in enumerate(zip(got, want, plain, strict=True)):
        near(g, w, naive, f"result {n}", grad=n > 0)


LONG = {
    "none": None,
    "causal": masks.causal(),
    "window": masks.causal() & masks.window(50),
    "both sides": masks.window(9, ahead=40),
    "documents": masks.documents((torch.arange(300) // 37)[None].expand(2, -1)) & masks.causal(),
    "padding": masks.padding(lengths=torch.tensor([300, 131])),
    "blocks by head": masks.chosen(
        torch.rand(1, 4, 5, 5, generator=torch.Generator().manual_seed(3)) < 0.4, 300, 300, 64
    ),
    "small blocks": masks.chosen(
        torch.rand(1, 1, 19, 19, generator=torch.Generator().manual_seed(3)) < 0.4, 300, 300, 16
    ),
    "global": masks.global_tokens(3) | masks.window(20),
}


@pytest.mark.parametrize("case", list(LONG))
def test_long(case: str) -> None:
    """Lengths of several blocks, none of them whole."""
    agrees(tensors(2, 4, 2, 300, 300, 64, 64), LONG[case])


@pytest.mark.parametrize("case", list(MASKS))
def test_irregular_masks(case: str) -> None:
    agrees(tensors(2, 4, 2, 29, 37, 8, 5), MASKS[case])


@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1, 1, 1, 1, 1), (1, 2, 1, 17, 300, 40, 24), (2, 2, 2, 300, 17, 59, 96), (1, 6, 2, 129, 129, 111, 16)],
)
def test_sizes(sizes: tuple[int, ...]) -> None:
    agrees(tensors(*sizes), masks.causal())


def t5_bias(heads: int) -> Position:
    return T5Bias(16, heads)


@pytest.mark.parametrize("make", [Alibi, Kerple, t5_bias])
def test_bias_by_distance(make: Callable[[int], Position]) -> None:
    """Its table, and the gradient through it, with T != S both ways."""
    for T, S in ((200, 200), (40, 150), (150, 40)):
        torch.manual_seed(0)
        agrees(tensors(2, 4, 2, T, S, 16, 16), masks.causal(), make(4))


def test_bias_of_later_keys() -> None:
    """A bias that differs by the side on which a key stands."""
    torch.manual_seed(0)
    agrees(tensors(2, 4, 2, 40, 150, 16, 16), None, t5_bias(4))


@pytest.mark.parametrize("shape", [(1, 1, 1, 200), (2, 1, 130, 200), (1, 4, 130, 1), (2, 4, 130, 200)])
def test_tensor_bias(shape: tuple[int, ...]) -> None:
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    agrees(tensors(2, 4, 2, 130, 200, 16, 16), masks.window(30), None, bias)
    agrees(tensors(2, 4, 2, 130, 200, 16, 16), None, Alibi(4), bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["none", "window", "documents", "blocks by head"])
def test_half(case: str, dtype: torch.dtype) -> None:
    agrees(tensors(2, 4, 2, 300, 300, 64, 40, dtype), LONG[case])


@pytest.mark.parametrize("way", ["widened", "pairs"])
def test_bf16_where_a_processor_has_less(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """As on processors without tile registers, and without any products of bf16."""
    if not (has := build.library().regard_bf16()):
        pytest.skip("this processor has less itself")
    monkeypatch.setattr(build.library(), "regard_bf16", lambda: min(has, ["widened", "pairs"].index(way)))
    for case in ("none", "window", "documents", "small blocks", "padding"):
        agrees(tensors(2, 4, 2, 300, 300, 64, 40, torch.bfloat16), LONG[case])
    agrees(tensors(1, 2, 1, 17, 300, 300, 24, torch.bfloat16), masks.causal(), Alibi(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_is_read_where_it_lies(dtype: torch.dtype) -> None:
    """Views of one tensor: no part of it is copied, forward or backward, in fp32."""
    x = torch.randn(1, 640, 3, 2, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, k, v = (x[:, :, n].transpose(1, 2).requires_grad_() for n in range(3))
    agrees([q, k, v], masks.causal() & masks.window(30))
    seen: list[torch.dtype] = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "_to_copy" in str(func) and out.numel() >= q.numel():
                seen.append(out.dtype)
            return out

    with Watched():
        native.run(problem([q.detach(), k.detach(), v.detach()], mask=masks.causal()))
    assert seen == []


def test_positions_by_distance() -> None:
    """What says so depends on i - j alone: shifted rows give the same bias."""
    for position in (Alibi(4), Kerple(4), regard.positions.KerplePower(4), t5_bias(4)):
        assert position.by_distance
        q = torch.randn(1, 4, 6, 8)
        at = [
            position.bias(Rows(q=q, k=q, scores=q.new_empty(0), i=torch.arange(n, n + 6), j=torch.arange(n, n + 6)))
            for n in (0, 100)
        ]
        torch.testing.assert_close(at[0], at[1])


def test_log_sum_exp() -> None:
    q, k, v = (x.detach() for x in tensors(1, 2, 2, 40, 70, 16, 16))
    mask = masks.padding(lengths=torch.tensor([50])) & ~masks.padding(lengths=torch.tensor([0]))
    _, lse = native.with_lse(problem([q, k, v], mask=mask))
    scores = (q.double() @ k.double().mT / 4).masked_fill(~mask.dense(40, 70), -torch.inf)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), atol=1e-5, rtol=1e-5)
    _, lse = native.with_lse(problem([q, k, v], mask=masks.nothing()))
    assert (lse == -torch.inf).all()


def test_strides() -> None:
    """Transposed, expanded and sliced inputs, and a gradient that is one number expanded."""
    x = torch.randn(2, 70, 3, 4, 24, generator=torch.Generator().manual_seed(0))
    q, k, v = (x[:, :, n].transpose(1, 2)[..., :20].requires_grad_() for n in range(3))
    agrees([q, k, v], masks.causal())
    one = k.detach()[:, :1].expand(-1, 4, -1, -1).requires_grad_()
    out = native.run(problem([q, one, v]))
    dq = torch.autograd.grad(out.sum(), q)[0]
    want = torch.autograd.grad(eager(problem([q, one.contiguous(), v])).sum(), q)[0]
    torch.testing.assert_close(dq, want, atol=1e-5, rtol=1e-5)


def test_differentiated_twice() -> None:
    given = tensors(1, 2, 1, 20, 20, 8, 8)
    results = []
    for run in (native.run, eager):
        torch.manual_seed(0)
        position = Kerple(2)
        out = run(problem(given, mask=masks.causal(), position=position))
        first = torch.autograd.grad(out.square().sum(), [*given, *position.parameters()], create_graph=True)
        results.append(torch.autograd.grad(sum(x.square().sum() for x in first), [*given, *position.parameters()]))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)


def test_same_again() -> None:
    """Twenty runs, bit by bit the same, whichever thread takes which block."""
    given = tensors(1, 3, 3, 300, 300, 32, 32)
    first = all_of(problem(given, mask=masks.causal()), native.run, given, [])
    for _ in range(20):
        for got, want in zip(all_of(problem(given, mask=masks.causal()), native.run, given, []), first, strict=True):
            assert torch.equal(got, want)


def test_a_changed_mask_tensor_counts() -> None:
    """Masks that hold tensors are never remembered."""
    q, k, v = (x.detach() for x in tensors(1, 1, 1, 40, 40, 8, 8))
    keep = torch.ones(1, 40, dtype=torch.bool)
    mask = masks.padding(keep)
    before = native.run(problem([q, k, v], mask=mask))
    keep[:, 20:] = False
    after = native.run(problem([q, k, v], mask=masks.padding(keep)))
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, eager(problem([q, k, v], mask=masks.padding(keep))), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("keys", [1, 5, 16, 33, 700])
def test_entmax_rows(alpha: float, keys: int) -> None:
    """The same weights and gradients as float64, which takes torch's operations."""
    generator = torch.Generator().manual_seed(0)
    x = (3 * torch.randn(7, 11, keys, generator=generator)).requires_grad_()
    allowed = torch.rand(7, 1, keys, generator=generator) < 0.7
    allowed[0] = False
    results = []
    for scores in (x, x.detach().double().requires_grad_()):
        p = entmax(scores, alpha, allowed=allowed)
        grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p.dtype)
        results.append((p.detach(), torch.autograd.grad(p, scores, grad)[0]))
    (p, dx), (want, want_dx) = results
    torch.testing.assert_close(p.double(), want, atol=2e-6, rtol=2e-5)
    assert torch.equal(p[0], torch.zeros_like(p[0]))
    sure = ((want == 0) | (want > 1e-6)).all(-1, keepdim=True)  # where the support leaves no doubt
    torch.testing.assert_close(torch.where(sure, dx.double(), 0), torch.where(sure, want_dx, 0), atol=1e-4, rtol=1e-4)


def test_entmax_keeps_nan() -> None:
    x = torch.zeros(2, 20)
    x[1, 3] = torch.nan
    p = Entmax()(x[None, None], None)[0, 0]
    assert p[0].isfinite().all()
    assert p[1].isnan().all()


@pytest.mark.parametrize("k", [1, 8, 50, 5000])
@pytest.mark.parametrize("keys", [1, 5, 16, 33, 700])
@pytest.mark.parametrize("kind", ["random", "ties", "far apart", "close to 0", "neighbours"])
def test_topk_rows(kind: str, k: int, keys: int) -> None:
    """The same keys, weights and gradients as float64, which takes torch's operations."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 11, keys, generator=generator)
    made = {
        "random": 3 * x,
        "ties": (2 * x).round(),
        "far apart": x.sign() * 10 ** (8 * x),
        "close to 0": x.sign() * 10 ** (-6 * x.abs()),
        "neighbours": 1 + x.abs().round() * 2**-23,
    }
    x = made[kind].requires_grad_()
    allowed = torch.rand(7, 1, keys, generator=generator) < 0.7
    allowed[0] = False
    results = []
    for scores in (x, x.detach().double().requires_grad_()):
        p = topk(scores, k, allowed=allowed)
        grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p.dtype)
        results.append((p.detach(), torch.autograd.grad(p, scores, grad)[0]))
    (p, dx), (want, want_dx) = results
    assert torch.equal(p > 0, want > 1e-38)
    torch.testing.assert_close(p.double(), want, atol=2e-7, rtol=2e-6)
    torch.testing.assert_close(dx.double(), want_dx, atol=2e-6, rtol=2e-5)


def test_topk_rows_can_be_differentiated_twice() -> None:
    twice = []
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        (dx,) = torch.autograd.grad((topk(x, 5) ** 2).sum(), x, create_graph=True)
        twice.append(torch.autograd.grad((dx**2).sum(), x)[0].double())
    torch.testing.assert_close(*twice, atol=1e-6, rtol=1e-5)


def test_nan_in_a_bias_is_not_a_mask() -> None:
    q, k, v = (x.detach() for x in tensors(1, 1, 1, 20, 20, 8, 8))
    bias = torch.zeros(1, 1, 20, 20)
    bias[..., 7, 3] = torch.nan
    out = native.run(problem([q, k, v], bias=bias))
    assert out[0, 0].isnan().any(-1).tolist() == [i == 7 for i in range(20)]


REFUSED = {
    "float64": ({"dtype": torch.float64}, {}),
    "Entmax is not softmax": ({}, {"normalizer": Entmax()}),
    "dropout": ({}, {"dropout": 0.1}),
    "no function of distance": ({}, {"position": regard.positions.CoPE(8)}),
    "wants a gradient": ({}, {"bias": torch.zeros(1, 1, 1, 9, requires_grad=True)}),
}


@pytest.mark.parametrize("words", list(REFUSED))
def test_refusals(words: str) -> None:
    how, stages = REFUSED[words]
    reasons = native.why_not(problem(tensors(1, 2, 2, 9, 9, 8, 8, **how), **stages))
    assert any(words in reason for reason in reasons), reasons


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"REGARD_NATIVE": "0"}, "switched off"),
        ({"PATH": "", "CXX": ""}, "no C++ compiler"),
        ({"CXX": sys.executable, "REGARD_CACHE": "{tmp}"}, "could not build"),
    ],
)
def test_without_them(environment: dict[str, str], words: str, tmp_path) -> None:
    """Everything still runs, and the plan says why the C++ kernels don't."""
    code = """
import torch, regard
q = torch.randn(1, 1, 300, 8)
mask = regard.masks.causal() & regard.masks.window(9)
out = regard.attention(q, q, q, mask=mask)
torch.testing.assert_close(out, regard.attention(q, q, q, mask=mask, kernel="eager"))
print(regard.plan(q, q, q, mask=mask))
"""
    given = {k: v.format(tmp=tmp_path) for k, v in environment.items()}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout


def test_gradient_of_the_log_sum_exp() -> None:
    """It flows to q and k, alone and beside the output's."""
    q, k, v = tensors(1, 2, 1, 40, 70, 16, 16)
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    scores = wide[0] @ wide[1].mT / 4
    for weight in (0.0, 1.0):
        out, lse = native.with_lse(problem([q, k, v]))
        got = torch.autograd.grad(lse.sin().sum() + weight * out.sum(), [q, k])
        exact = scores.logsumexp(-1).sin().sum() + weight * (scores.softmax(-1) @ wide[2]).sum()
        want = torch.autograd.grad(exact, wide[:2], retain_graph=True)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g.double(), w, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_reaches_exactly_the_rows_that_see_it(where: str, value: float, dtype: torch.dtype) -> None:
    """And gradients of the others stay finite."""
    mask = masks.causal() & masks.window(40) & ~masks.blocks(7)
    given = {n: x.detach() for n, x in zip("qkv", tensors(1, 2, 1, 200, 200, 16, 16, dtype), strict=True)}
    given[where][0, 0, 100, 3] = value
    xs = [x.requires_grad_() for x in given.values()]
    out = regard.attention(*xs, mask=mask, kernel="native")
    seen = mask.dense(200, 200)[0, 0]
    hit = torch.zeros(2, 200, dtype=torch.bool)
    if where == "q":
        hit[0, 100] = seen[100].any()
    else:
        hit[:] = seen[:, 100]
    assert torch.equal(out[0].isnan().all(-1), hit)
    assert out[0][~hit].isfinite().all()
    grads = torch.autograd.grad(out[0][~hit].float().square().sum(), xs)
    assert all(g.isfinite().all() for g in grads)
