"""FlexAttention as a kernel: what is handed to torch (blocks, mask and bias), what it refuses, and new lengths."""

import pytest
import torch
from torch import Tensor

import regard
from regard import masks
from regard.kernels import Problem, flex
from regard.laws.agreement import close
from regard.normalizers import Entmax
from regard.pipeline.function import problem as _problem
from regard.positions import Alibi, Kerple, Shaw

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "BLOCK", 16)


def problem(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Problem:
    return _problem(q, k, v, **{name: value for name, value in options.items() if name != "kernel"})


def qkv(T: int = 29, S: int = 37, *, D: int = 8, V: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(n).to(dtype) for n in ((2, 4, T, D), (2, 2, S, D), (2, 2, S, V))]


def kerple() -> Kerple:
    return Kerple(4).double().requires_grad_(False)


CASES = {
    "nothing": {},
    "causal": {"mask": masks.causal()},
    "window": {"mask": masks.causal() & masks.window(5)},
    "one row empty": {"mask": masks.causal() & masks.padding(lengths=torch.tensor([37, 0]))},
    "documents": {"mask": masks.documents(torch.tensor([0] * 20 + [1] * 9 + [0] * 8))},
    "by head": {"mask": masks.per_head([masks.window(3), masks.causal(), masks.strided(5), masks.full()])},
    "chosen": {"mask": masks.chosen(torch.eye(4, 5).bool()[None, None], 29, 37, 8)},
    "no pair": {"mask": masks.nothing()},
    "by distance": {"mask": masks.causal(), "position": Alibi(4)},
    "all at once": {"mask": masks.causal(), "position": kerple(), "bias": torch.randn(2, 1, 1, 37).double()},
    "whole bias": {"bias": torch.randn(1, 4, 29, 37).double()},
}


@pytest.mark.parametrize("case", list(CASES))
def test_is_attention(case: str) -> None:
    """Grouped keys, T != S, V != D, lengths that no block divides."""
    given = qkv()
    close(
        regard.attention(*given, **CASES[case], kernel="flex"), regard.attention(*given, **CASES[case], kernel="eager")
    )


def test_one_query() -> None:
    q, k, v = qkv(1, 50)
    for mask in (masks.causal(), masks.window(9)):
        want = regard.attention(q, k, v, mask=mask, kernel="eager")
        close(regard.attention(q, k, v, mask=mask, kernel="flex"), want)


def test_a_scale_of_its_own() -> None:
    given = qkv()
    want = regard.attention(*given, scale=0.01, kernel="eager")
    close(regard.attention(*given, scale=0.01, kernel="flex"), want)


@pytest.mark.parametrize("case", [name for name, options in CASES.items() if "mask" in options])
def test_blocks_are_the_layouts(case: str) -> None:
    """The lists that torch is given say what the layout says, and which blocks are full; ragged ones never are."""
    mask = CASES[case]["mask"]
    found, layout = flex._block_mask(problem(*qkv(), mask=mask)), mask.layout(29, 37, block=16)
    assert torch.equal(found.to_dense().bool(), layout.to_dense_blocks())
    whole = layout.to_dense_full()[..., : 29 // 16, : 37 // 16]
    assert found.full_kv_num_blocks[..., : 29 // 16].tolist() == whole.sum(-1).tolist()
    assert not found.full_kv_num_blocks[..., 29 // 16 :].any()


def test_what_it_refuses() -> None:
    q, k, v = qkv()
    for options, reason in (
        ({"normalizer": Entmax()}, "normalizer Entmax is not softmax"),
        ({"position": Shaw(8)}, "position Shaw adds to the values"),
        ({"dropout": 0.1}, "dropout"),
    ):
        assert any(r.startswith(reason) for r in flex.why_not(problem(q, k, v, **options)))
    for given, reason in (
        ((q.to("meta"), k.to("meta"), v.to("meta")), "tensors are on meta: only CPUs and cuda, xpu"),
        ((q, k, v.clone().requires_grad_()), "torch has no gradients for FlexAttention on CPUs"),
    ):
        assert [r.startswith(reason) for r in flex.why_not(problem(*given))] == [True]
    trained = problem(q, k, v, position=Kerple(4))
    assert flex.why_not(trained)
    with torch.no_grad():
        assert flex.why_not(trained) == []
        v.requires_grad_()
        assert regard.attention(q, k, v, position=Kerple(4), kernel="flex").shape == (2, 4, 29, 5)


def test_only_accelerators_prefer_it() -> None:
    given = qkv()
    assert regard.plan(*given, mask=masks.causal() & masks.window(5)).kernel != "flex"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["documents", "window and bias"])
def test_compiled_once_for_all_lengths(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph for the first lengths and at most two more for all others, however T and S and their blocks change."""
    monkeypatch.setattr(flex, "BLOCK", 128)
    flex._compiled.cache_clear()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for T, S in ((250, 260), (300, 330), (290, 300), (400, 500), (600, 790)):
        given = qkv(T, S, D=16, V=16, dtype=torch.float32)
        options = {"mask": masks.documents(torch.arange(S) // 70)}
        if case != "documents":
            options = {"mask": masks.causal() & masks.window(50), "position": Alibi(4)}
        got = flex.attend(problem(*given, **options), compiled=True)
        assert (got - regard.attention(*given, **options, kernel="eager")).abs().max() < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
