"""Kernels beyond the laws: irregular masks, sizes that straddle chunks, memory, and what the plan says."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import regard
from regard import masks
from regard.kernels import KERNELS, block_sparse, chunked, sdpa, size, window
from regard.normalizers import Entmax
from regard.positions import Alibi, Kerple


def qkv(B: int, H: int, T: int, D: int, *, G: int | None = None, S: int | None = None) -> list[Tensor]:
    G, S = G or H, S or T
    sizes = ((B, H, T, D), (B, G, S, D), (B, G, S, D))
    return [torch.randn(n, dtype=torch.float64, requires_grad=True) for n in sizes]


def agrees(kernel: str, given: list[Tensor], extra: list[Tensor] = (), **options: object) -> None:  # type: ignore[assignment]
    """Output and all gradients are eager's."""
    results = []
    for name in (kernel, "eager"):
        out = regard.attention(*given, kernel=name, **options)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
        results.append([out, *torch.autograd.grad(out, [*given, *extra], grad)])
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= 1e-10 * (1 + want.abs().max())


# --- block_sparse -------------------------------------------------------------------------------------------


def random_mask(shape: tuple[int, ...], density: float, block: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    small = torch.rand(*shape[:2], -(-shape[2] // block), -(-shape[3] // block), generator=generator) < density
    return small.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, : shape[2], : shape[3]]


MASKS = {
    "random": masks.dense(random_mask((1, 1, 29, 37), 0.3)),
    "random blocks": masks.dense(random_mask((1, 1, 29, 37), 0.3, block=8)),
    "by batch row": masks.dense(random_mask((2, 1, 29, 37), 0.3, block=8)),
    "by head": masks.dense(random_mask((1, 4, 29, 37), 0.3, block=8)),
    "by both": masks.dense(random_mask((2, 4, 29, 37), 0.3, block=5)),
    "ragged": masks.causal() & masks.padding(lengths=torch.tensor([37, 11])),
    "one row empty": masks.padding(lengths=torch.tensor([37, 0])),
    "patterns by head": masks.per_head([masks.window(3), masks.causal(), masks.strided(5), masks.full()]),
    "documents": masks.documents(torch.tensor([0] * 20 + [1] * 9 + [0] * 8)),
    "far apart": masks.global_tokens(2) | masks.window(2),
    "nothing": masks.nothing(),
}


@pytest.mark.parametrize("block", [4, 16])
@pytest.mark.parametrize("case", list(MASKS))
def test_block_sparse(case: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_sparse, "BLOCK", block)
    agrees("block_sparse", qkv(2, 4, 29, 6, G=2, S=37), mask=MASKS[case])


BANDS = {
    "causal": masks.causal() & masks.window(5),
    "both ways": masks.window(4),
    "ahead only": masks.window(4) & ~masks.causal(),
    "padded": masks.causal() & masks.window(7) & masks.padding(lengths=torch.tensor([37, 11])),
    "dilated": masks.causal() & masks.dilated(3, 2),
    "in blocks": masks.blocks(6),
    "wider than all": masks.causal() & masks.window(50),
    "itself": masks.window(1),
    "nothing": masks.causal() & masks.nothing(),
}


@pytest.mark.parametrize(("T", "S"), [(29, 37), (37, 29), (33, 33), (1, 37), (8, 8)])
@pytest.mark.parametrize("case", list(BANDS))
def test_window(case: str, T: int, S: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "SMALLEST", 4)
    monkeypatch.setattr(window, "LARGEST", 4)
    agrees("window", qkv(2, 4, T, 6, G=2, S=S), mask=BANDS[case])


def test_window_refuses_what_it_cannot_run() -> None:
    q, k, v = qkv(1, 2, 5, 3)
    near = masks.causal() & masks.window(3)
    for options, reason in (
        ({"mask": masks.causal()}, "nothing bounds how far"),
        ({"mask": masks.per_head([near, masks.window(2)])}, "differs by head"),
        ({"mask": near, "position": Kerple(2)}, "Kerple: only plain softmax"),
    ):
        with pytest.raises(ValueError, match=f"kernel 'window' can't run this: .*{reason}"):
            regard.attention(q, k, v, kernel="window", **options)


def test_block_sparse_runs_stages_and_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_sparse, "BLOCK", 8)
    position = Kerple(4).double()
    given, bias = (
        qkv(2, 4, 29, 6, G=2, S=37),
        torch.randn(2, 4, 1, 37, dtype=torch.float64, requires_grad=True),
    )
    options = {"mask": MASKS["by head"], "position": position, "bias": bias, "normalizer": Entmax()}
    agrees("block_sparse", given, [bias, *position.parameters()], **options)


@pytest.mark.parametrize("kernel", ["block_sparse", "window", "chunked", "sdpa"])
def test_rows_without_keys_are_0_whatever_the_inputs_sum_to(kernel: str) -> None:
    q, k, v = (torch.full((1, 1, 33, 64), 60.0, dtype=torch.float16) for _ in range(3))
    out = regard.attention(q, k, v, mask=masks.window(1) & masks.nothing(), kernel=kernel)
    assert torch.equal(out, torch.zeros_like(out))


def test_block_sparse_skips_empty_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The work follows the blocks that hold something: 1/8 of them here."""
    seen = []
    real = torch.nn.functional.scaled_dot_product_attention

    def counted(q, k, v, *rest, **options):
        seen.append(q.shape[:3].numel() * k.shape[2])
        return real(q, k, v, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    q, k, v = qkv(1, 1, 1024, 4)
    regard.attention(q, k, v, mask=masks.blocks(128), kernel="block_sparse")
    assert sum(seen) == 1024 * 128


# --- chunked ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "S"), [(1, 1), (15, 16), (16, 17), (17, 4), (31, 33), (48, 48), (50, 7)])
@pytest.mark.parametrize(
    "mask", [None, masks.causal(), masks.causal() & masks.window(5)], ids=["all", "causal", "window"]
)
def test_chunked_across_chunk_edges(T: int, S: int, mask: masks.Mask | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 queries and 7 keys."""
    monkeypatch.setattr(chunked, "KEYS", 7)
    monkeypatch.setattr(chunked, "TILE_BYTES", 0)
    position = Kerple(4).double()
    given = qkv(2, 4, T, 3, G=2, S=S)
    agrees("chunked", given, list(position.parameters()) if max(T, S) > 1 else [], mask=mask, position=position)
    agrees("chunked", given, mask=mask, normalizer=Entmax())


@pytest.mark.parametrize("shape", [(1, 1, 1, 37), (2, 4, 29, 37), (1, 4, 29, 1), (2, 1, 1, 1)], ids=str)
def test_bias_gradients_are_summed_to_its_shape(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "KEYS", 7)
    monkeypatch.setattr(chunked, "TILE_BYTES", 0)
    bias = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    given = qkv(2, 4, 29, 3, G=2, S=37)
    for kernel in ("chunked", "sdpa", "block_sparse"):
        agrees(kernel, given, [bias], bias=bias, mask=masks.causal())


def test_a_gradient_for_the_bias_alone() -> None:
    """pytorch#148476."""
    given = [t.detach() for t in qkv(1, 2, 5, 3)]
    bias = torch.randn(1, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    grads = []
    for kernel in ("chunked", "sdpa", "eager"):
        grads.append(torch.autograd.grad(regard.attention(*given, bias=bias, kernel=kernel).square().sum(), bias)[0])
    for g in grads[:2]:
        assert (g - grads[2]).abs().max() < 1e-10


@pytest.mark.parametrize("case", [*MASKS, "none"])
@pytest.mark.parametrize("biased", [False, True], ids=["mask", "mask and bias"])
def test_fused_by_chunks_of_queries(case: str, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 16 queries; bias and position are trained through them."""
    monkeypatch.setattr(sdpa, "BIAS_BYTES", 0)
    given, options, extra = qkv(2, 4, 29, 3, G=2, S=37), {}, []
    if biased:
        position, bias = Kerple(4).double(), torch.randn(2, 1, 29, 37, dtype=torch.float64, requires_grad=True)
        options, extra = {"position": position, "bias": bias}, [bias, *position.parameters()]
    agrees("sdpa", given, extra, mask=MASKS.get(case), **options)


PEAK = """
import torch, regard
from regard.bench.memory import PeakMemory
from regard.positions import Alibi
torch.set_num_threads(1)
T, train, kernel = {T}, {train}, {kernel!r}
q, k, v = (torch.randn(1, 2, T, 16, requires_grad=train) for _ in "qkv")
options = dict(position=Alibi(2), mask=regard.masks.causal(), kernel=kernel)
regard.attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], **options)
memory = PeakMemory(torch.device("cpu"))
out = regard.attention(q, k, v, **options)
if train:
    out.sum().backward()
print(memory.bytes())
"""


def peak(T: int, train: bool, kernel: str) -> float:
    """Extra MB at the peak, in a process of its own."""
    code = PEAK.format(T=T, train=train, kernel=kernel)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    return int(done.stdout) / 2**20


@pytest.mark.slow
@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
def test_memory(train: bool) -> None:
    """At T = 8192 the scores take 2 x 256 MB, and eager several times that. Chunks of them stay far below.

    What the allocator keeps for later makes single figures uncertain by some 100 MB.
    """
    eager, chunks, fused = (peak(8192, train, kernel) for kernel in ("eager", "chunked", "sdpa"))
    assert eager > 4 * 256
    assert chunks < eager / 20
    assert fused < eager / 5


class Largest(TorchDispatchMode):
    """Bytes of the largest memory that anything made in it lies in."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for made in pytree.tree_leaves(out):
            if isinstance(made, Tensor):
                self.bytes = max(self.bytes, made.untyped_storage().nbytes())
        return out


def chosen_all(T: int, block: tuple[int, int]) -> masks.Mask:
    return masks.chosen(torch.ones(1, 1, -(-T // block[0]), -(-T // block[1]), dtype=torch.bool), T, T, block)


WIDE: dict[str, Callable[[int, int], masks.Mask]] = {
    "window": lambda T, n: masks.window(n),
    "causal window": lambda T, n: masks.causal() & masks.window(n),
    "window ahead": lambda T, n: masks.window(2, ahead=n),
    "dilated": lambda T, n: masks.dilated(2, n),
    "blocks": lambda T, n: masks.blocks(n),
    "strided": lambda T, n: masks.strided(n) & masks.causal(),
    "global tokens": lambda T, n: masks.global_tokens(n) | masks.window(2),
    "chosen by queries": lambda T, n: chosen_all(T, (1, n)),
    "chosen": lambda T, n: chosen_all(T, (n, n)),
    "chosen, causal": lambda T, n: chosen_all(T, (n, n)) & masks.causal(),
}
"""Masks of a size that is named, here far beyond the text."""


@pytest.mark.parametrize("case", list(WIDE))
def test_memory_follows_the_data_and_not_a_size_that_is_named(case: str) -> None:
    T = 5
    q, k, v = torch.randn(3, 1, 2, T, 8)
    narrow, wide = (WIDE[case](T, n) for n in (block_sparse.BLOCK, 2**30))
    able = regard.plan(q, k, v, mask=wide)
    kernels = able.costs.keys() - {"flex"}  # an operator of its own kind, into which no mode sees
    assert {"eager", "sdpa", "block_sparse"} <= kernels
    for name in sorted(kernels):
        with Largest() as few:
            want = regard.attention(q, k, v, mask=narrow, kernel=name)
        with Largest() as many:
            got = regard.attention(q, k, v, mask=wide, kernel=name)
        assert many.bytes <= few.bytes, f"{name}: {many.bytes} bytes"
        torch.testing.assert_close(got, want)


# --- the plan -----------------------------------------------------------------------------------------------


def meta(T: int, S: int | None = None, H: int = 8) -> list[Tensor]:
    return [torch.empty(1, H, n, 64, device="meta") for n in (T, S or T, S or T)]


def test_plans() -> None:
    """What is chosen where, on shapes alone."""
    built = not KERNELS["native"].build.why_not()
    assert regard.plan(*meta(1024)).kernel in ("sdpa", "native")  # about equal
    assert regard.plan(*meta(1024), mask=masks.causal()).kernel in ("sdpa", "native")
    windowed = regard.plan(*meta(16384), mask=masks.causal() & masks.window(512))
    assert windowed.kernel == ("native" if built else "window")
    alibi = regard.plan(*meta(16384), position=Alibi(8), mask=masks.causal())
    assert alibi.kernel in (("native",) if built else ("sdpa", "block_sparse"))
    assert regard.plan(*meta(16384), normalizer=Entmax()).kernel == "chunked"
    assert regard.plan(*meta(64), normalizer=Entmax()).kernel in ("eager", "chunked")


def test_the_plan_says_why() -> None:
    plan = regard.plan(*meta(16384), position=Alibi(8), normalizer=Entmax())
    assert plan.why_not.keys() == KERNELS.keys() - {plan.kernel}
    assert "normalizer Entmax is not softmax" in plan.why_not["sdpa"]
    assert any("no mask" in reason for reason in plan.why_not["block_sparse"])
    assert any("times the time" in reason for reason in plan.why_not["eager"])
    text = str(plan)
    assert text.startswith(f"{plan.kernel}: {plan.because}")
    assert all(f"not {name}: " in text for name in plan.why_not)
    named = regard.plan(*meta(64), kernel="eager")
    assert (named.kernel, named.because) == ("eager", "asked for by name")


def test_a_named_kernel_is_never_replaced() -> None:
    q, k, v = qkv(1, 2, 5, 3)
    with pytest.raises(
        ValueError, match=r"kernel 'block_sparse' can't run this: no mask.*these can: sdpa, chunked, eager"
    ):
        regard.attention(q, k, v, kernel="block_sparse")
    with pytest.raises(ValueError, match=r"attention: kernel is unknown \(got 'flash'\); expected one of 'auto', "):
        regard.plan(q, k, v, kernel="flash")


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (1023, "1.02e+03 B"), (1536, "1.5 KB"), (3 * 2**30, "3 GB"), (2**52, "4.1e+03 TB")],
)
def test_sizes_are_readable(n: int, text: str) -> None:
    assert size.sized(n) == text
