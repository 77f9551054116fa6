"""The C++ kernel under torch.compile: the same numbers as eager calls give, for masks, biases, NaN and gradients."""

import pytest
import torch
from torch import Tensor
from torch.func import grad, jvp, vmap

import regard
from masks.test_masks import RULES
from regard import masks
from regard.kernels.native import build, operator
from regard.masks.flat import flatten, unflatten
from regard.normalizers import Sinks
from regard.positions import Alibi, Kerple
from regard.scores import SoftCap

NATIVE = pytest.mark.skipif(bool(build.why_not()), reason=f"no C++ kernels here: {'; '.join(build.why_not())}")
IDS = torch.arange(150)[None] // 37
KEEP = torch.arange(150) < torch.tensor([[150], [90]])
SIZES = (2, 4, 2, 150, 16)

MASKS = {
    "window": lambda: masks.causal() & masks.window(20),
    "documents": lambda: masks.causal() & masks.documents(IDS),
    "padding": lambda: masks.padding(KEEP) & masks.causal(),
    "not and or": lambda: ~masks.window(9) | masks.prefix(3),
    "heads": lambda: masks.per_head([masks.causal(), masks.window(5), masks.full(), masks.dilated(3, 2)]),
    "grid": lambda: masks.neighborhood((10, 15), 3),
}


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tensors(*, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    B, H, G, T, D = SIZES
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(B, heads, T, D, generator=generator) for heads in (H, G, G))
    return [x.to(dtype).requires_grad_() for x in made]


def used(function, *args: Tensor) -> set[str]:
    """The operators of ours in the one graph that torch.compile makes of it."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch.compile(function, fullgraph=True, backend=backend)(*args)
    assert len(graphs) == 1
    targets = (str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function")
    return {t for t in targets if t.startswith("regard")}


def agree(function, *args: Tensor, within: float = 2e-5) -> None:
    """Compiled and eager give the same outputs and the same gradients."""
    leaves = [x for x in args if x.requires_grad]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, function):
        out = run(*args)
        weight = torch.linspace(-1, 1, out.numel()).view(out.shape)
        results.append([out, *torch.autograd.grad((out.nan_to_num().float() * weight).sum(), leaves)])
    for got, want in zip(*results, strict=True):
        assert torch.equal(got.isnan(), want.isnan())
        assert (got - want).nan_to_num().abs().max() <= within * (1 + want.nan_to_num().abs().max())


def test_gradients_of_a_mask_without_numbers() -> None:
    """Padding alone: torch takes its empty list of numbers for one of tensors."""
    q, k, v = (torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(n)).requires_grad_() for n in range(3))
    keep = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    agree(lambda q, k, v: regard.attention(q, k, v, mask=masks.padding(keep)), q, k, v)


@pytest.mark.parametrize("case", [name for name in RULES if not name.startswith("predicate")])
def test_a_mask_comes_back(case: str) -> None:
    mask = RULES[case][0]
    again = unflatten(*flatten(mask))
    assert type(again) is type(mask)
    assert torch.equal(again.dense(7, 9), mask.dense(7, 9))


def test_a_rule_in_code_is_left_to_torch() -> None:
    mask = masks.predicate(lambda b, h, i, j: (i + j) % 3 > 0)
    assert flatten(mask & masks.causal()) is None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return regard.attention(q, k, v, mask=mask)

    assert not used(run, *tensors())
    agree(run, *tensors())


@NATIVE
@pytest.mark.parametrize("case", list(MASKS))
def test_masks(case: str) -> None:
    mask = MASKS[case]()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return regard.attention(q, k, v, mask=mask)

    assert used(run, *tensors()) == {"regard.native_attention.default"}
    agree(run, *tensors())


@NATIVE
def test_a_mask_made_of_what_is_handed_in() -> None:
    def run(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return regard.attention(q, k, v, mask=masks.causal() & masks.documents(ids))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for ids in (IDS, IDS // 2):
            torch.testing.assert_close(compiled(*tensors(), ids), run(*tensors(), ids), rtol=0, atol=1e-5)


@NATIVE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return regard.attention(q, k, v, mask=MASKS["window"]())

    agree(run, *tensors(dtype=dtype), within=2 * torch.finfo(dtype).eps)


@NATIVE
@pytest.mark.parametrize("position", [Alibi, Kerple])
def test_biases_by_distance_learn(position) -> None:
    part = position(4)

    def run(q: Tensor, k: Tensor, v: Tensor, *parameters: Tensor) -> Tensor:
        return regard.attention(q, k, v, mask=masks.causal(), position=part)

    assert used(run, *tensors()) == {"regard.native_attention.default"}
    agree(run, *tensors(), *part.parameters())


@NATIVE
def test_a_tensor_bias() -> None:
    bias = torch.randn(1, 4, 150, 150, generator=torch.Generator().manual_seed(1))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return regard.attention(q, k, v, mask=MASKS["window"](), bias=bias)

    agree(run, *tensors())


@NATIVE
@pytest.mark.parametrize("masked", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("parts", ["cap", "sinks", "cap and sinks"])
def test_a_cap_and_sinks(parts: str, masked: bool) -> None:
    sinks = torch.tensor([0.0, 2.0, 4.0, 6.0], requires_grad=True)

    def run(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
        cap = SoftCap(cap=0.7) if "cap" in parts else None
        normalizer = Sinks(sinks) if "sinks" in parts else None
        mask = MASKS["padding"]() if masked else None
        return regard.attention(q, k, v, mask=mask, score_mix=cap, normalizer=normalizer)

    assert used(run, *tensors(), sinks) == {"regard.native_attention.default"}
    q, k, v = tensors()
    plain = regard.attention(q, k, v, mask=MASKS["padding"]() if masked else None)
    assert (run(q, k, v, sinks) - plain).abs().max() > 0.05, "without them it differs"
    if "sinks" in parts:
        agree(run, q, k, v, sinks)
    else:
        agree(lambda q, k, v: run(q, k, v, sinks), q, k, v)


@NATIVE
@pytest.mark.parametrize("normalizer", [None, Sinks(torch.linspace(-1, 2, 4))])
def test_nan_reaches_who_sees_it(normalizer: Sinks | None) -> None:
    q, k, v = (x.detach().clone() for x in tensors())
    k[0, 0, 3], v[1, 1, 100], q[1, 2, 7, 3] = torch.nan, torch.inf, torch.nan

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return regard.attention(q, k, v, mask=MASKS["window"](), normalizer=normalizer)

    agree(run, *(x.requires_grad_() for x in (q, k, v)))
    assert run(q, k, v).isnan().any(-1).sum() == 2 * 20 + 2 * 20 + 1


@NATIVE
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", ["vmap", "grad", pytest.param("jvp", marks=pytest.mark.slow)])
def test_torch_func_goes_through_torchs_own(transform: str) -> None:
    def run(q: Tensor) -> Tensor:
        return regard.attention(q, q, q, mask=MASKS["window"]())

    function = {
        "vmap": lambda q: vmap(run)(q[:, None]),
        "grad": grad(lambda q: run(q).square().sum()),
        "jvp": lambda q: jvp(run, (q,), (torch.ones_like(q),))[1],
    }[transform]
    q = tensors()[0].detach()
    torch.testing.assert_close(torch.compile(function)(q), function(q), rtol=1e-5, atol=1e-5)


@NATIVE
def test_no_second_derivative() -> None:
    q, k, v = tensors()
    out, _ = operator.forward(q, k, v, None, None, *flatten(masks.causal()), 0.25, None)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        first.sum().backward()


@NATIVE
def test_torch_finds_no_fault_with_the_operator() -> None:
    args = (*tensors(), None, None, *flatten(masks.causal() & masks.documents(IDS)), 0.25, 2.0)
    torch.library.opcheck(operator.forward, args, atol=1e-4, rtol=1e-4)
