"""torch.compile: one graph for any pipeline, and no graph for every new length."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import regard
from regard import masks
from regard.heads import SigmoidGate
from regard.normalizers import Entmax
from regard.positions import Alibi, Kerple, Rotary

LENGTHS = (33, 64, 65, 100, 257, 300)
M, H = 32, 4

LAYERS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"causal": True, "mask": masks.window(20)},
    "two-sided window": {"mask": masks.window(20)},
    "alibi": {"causal": True, "position": lambda: Alibi(H)},
    "kerple": {"causal": True, "position": lambda: Kerple(H)},
    "rotary": {"causal": True, "position": lambda: Rotary(M // H)},
    "entmax": {"causal": True, "normalizer": Entmax},
    "grouped": {"causal": True, "num_kv_heads": 2},
    "gated": {"causal": True, "gate": lambda: SigmoidGate(M, H)},
    "all at once": {
        "causal": True,
        "mask": masks.window(20),
        "num_kv_heads": 2,
        "position": lambda: Rotary(M // H),
        "normalizer": Entmax,
    },
}

PARTS = ("position", "normalizer", "gate")


def layer(case: str) -> nn.Module:
    torch.manual_seed(0)
    slots = {name: part() if name in PARTS else part for name, part in LAYERS[case].items()}
    return regard.Attention(M, H, **slots)


def same(got: Tensor, want: Tensor) -> None:
    assert (got - want).abs().max() <= 2e-5 * (1 + want.abs().max())


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def results(run: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module) -> list[Tensor]:
    """The output and, where x wants one, all gradients."""
    out = run(x)
    return [out, *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])] if x.requires_grad else [out]


def few_graphs(case: str, *, train: bool) -> None:
    """One graph for the first length, at most two more for all others; what it gives is what eager gives."""
    module = layer(case)
    graphs = CompileCounterWithBackend("aot_eager" if train else "eager")
    compiled = torch.compile(module, fullgraph=True, backend=graphs)
    for T in LENGTHS:
        x = torch.randn(2, T, M, requires_grad=train)
        with torch.set_grad_enabled(train):
            for got, want in zip(results(compiled, x, module), results(module, x, module), strict=True):
                same(got, want)
    assert graphs.frame_count <= 3


NOW = ("causal", "rotary", "all at once")


@pytest.mark.parametrize("case", [c if c in NOW else pytest.param(c, marks=pytest.mark.slow) for c in LAYERS])
def test_new_lengths(case: str) -> None:
    few_graphs(case, train=False)


@pytest.mark.slow
def test_new_lengths_in_training() -> None:
    few_graphs("all at once", train=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", list(LAYERS))
def test_new_lengths_in_training_for_each(case: str) -> None:
    few_graphs(case, train=True)


@pytest.mark.parametrize("train", [False, True], ids=["forward", "backward"])
def test_padding(train: bool) -> None:
    """The mask is made of a tensor handed in: of data, not of the graph."""
    module = layer("causal")
    graphs = CompileCounterWithBackend("aot_eager" if train else "eager")

    def run(x: Tensor, keep: Tensor) -> Tensor:
        return module(x, mask=masks.padding(keep))

    compiled = torch.compile(run, fullgraph=True, backend=graphs)
    for T in LENGTHS:
        x, keep = torch.randn(2, T, M, requires_grad=train), torch.arange(T) < torch.tensor([[T], [T // 2]])
        got, want = compiled(x, keep), run(x, keep)
        same(got, want)
        if train:
            same(*(torch.autograd.grad(out.square().sum(), x)[0] for out in (got, want)))
    assert graphs.frame_count <= 3


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "bias"])
def test_the_function(biased: bool) -> None:
    """Cross-attention: T and S both change, at times one alone."""
    graphs = CompileCounterWithBackend("eager")

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        return regard.attention(q, k, v, mask=masks.causal() & masks.window(50), bias=bias)

    compiled = torch.compile(run, fullgraph=True, backend=graphs)
    for T, S in ((20, 33), (33, 40), (33, 64), (50, 65), (100, 257)):
        q, k, v = torch.randn(2, H, T, 8), torch.randn(2, 2, S, 8), torch.randn(2, 2, S, 8)
        bias = torch.randn(1, H, T, S) if biased else None
        same(compiled(q, k, v, bias), run(q, k, v, bias))
    assert graphs.frame_count <= 3


@pytest.mark.parametrize("kernel", ["sdpa", "window", "chunked", "eager"])
def test_kernels_by_name(kernel: str) -> None:
    """A kernel asked for by name runs whole, or says why not."""
    near = masks.causal() & masks.window(20)
    compiled = torch.compile(
        lambda q, k, v: regard.attention(q, k, v, mask=near, kernel=kernel), fullgraph=True, backend="eager"
    )
    x = torch.randn(3, 2, H, 65, 8)
    same(compiled(*x), regard.attention(*x, mask=near, kernel="eager"))


SOME = ("causal", *(pytest.param(case, marks=pytest.mark.slow) for case in ("window", "rotary", "entmax", "grouped")))


@pytest.mark.parametrize("case", SOME)
def test_a_step_is_one_graph(case: str) -> None:
    module, x = layer(case).eval(), torch.randn(2, 3, M)
    torch._dynamo.reset()
    step = torch.compile(module.step, backend="eager", fullgraph=True)
    with torch.no_grad():
        ours, theirs = module.init_state(2, 3), module.init_state(2, 3)
        for t in range(3):
            got, ours = step(x[:, t : t + 1], ours)
            want, theirs = module.step(x[:, t : t + 1], theirs)
            same(got, want)
