"""The Triton kernels in Triton's interpreter: any mask, any size, what masked slots may do, and how they are started.

Blocks of 16, the least there are, so that a few tokens straddle several; small batches, as the interpreter is slow.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import regard
from regard import masks
from regard.kernels import Problem
from regard.kernels import triton_attention as kernel
from regard.kernels._triton_walk import Walk, walk
from regard.laws.agreement import naive_precision, near, same
from regard.masks import Mask
from regard.normalizers import Entmax
from regard.pipeline.function import problem as _problem
from regard.positions import Alibi, Shaw

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Without a GPU the interpreter stands in for it (see conftest)."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "LARGEST", 16)


def problem(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, **options: object) -> Problem:
    return _problem(q, k, v, mask=mask, **options)


def qkv(
    T: int = 20,
    S: int = 24,
    *,
    B: int = 1,
    H: int = 2,
    G: int = 1,
    D: int = 8,
    V: int = 5,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    sizes = ((B, H, T, D), (B, G, S, D), (B, G, S, V))
    return [torch.randn(n).to(DEVICE, dtype).requires_grad_() for n in sizes]


def results(given: list[Tensor], mask: Mask | None, name: str, dtype: torch.dtype) -> list[Tensor]:
    """Output and gradients of all inputs."""
    leaves = [z.detach().to(dtype).requires_grad_() for z in given]
    out = kernel.run(problem(*leaves, mask)) if name == "triton" else regard.attention(*leaves, mask=mask, kernel=name)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    return [z.detach().cpu() for z in (out, *torch.autograd.grad(out, leaves, grad))]


def agrees(given: list[Tensor], mask: Mask | None) -> None:
    """No further from float64 than a plain computation in the inputs' dtype, up to the factors of `near`."""
    dtype = given[0].dtype
    got = results(given, mask, "triton", dtype)
    want = results(given, mask, "eager", torch.float64)
    with naive_precision():
        naive = results(given, mask, "eager", dtype)
    for n, what in enumerate(("out", "dq", "dk", "dv")):
        near(got[n], want[n], naive[n], what, grad=n > 0)


def random_mask(B: int, H: int, T: int, S: int) -> Tensor:
    return torch.rand(B, H, T, S, generator=torch.Generator().manual_seed(0)) < 0.3


RANDOM_BLOCKS = torch.tensor([[[[1, 0, 1], [0, 0, 1]], [[0, 1, 0], [1, 1, 0]]]]).bool()
MASKS = {
    "all": None,
    "causal": masks.causal(),
    "window": masks.causal() & masks.window(5),
    "documents": masks.documents(torch.tensor([0] * 10 + [1] * 9 + [0] * 5)),
    "padding": masks.causal() & masks.padding(lengths=torch.tensor([24, 17])),
    "one row empty": masks.padding(lengths=torch.tensor([24, 0])),
    "chosen by head": masks.chosen(RANDOM_BLOCKS, 20, 24, (16, 8)),
    "by head": masks.per_head([masks.window(3), masks.strided(5)]),
    "by batch row and head": masks.dense(random_mask(2, 2, 20, 24)),
    "far apart": masks.global_tokens(2) | masks.window(2),
    "nothing": masks.nothing(),
}


@pytest.mark.parametrize("case", list(MASKS))
def test_any_mask(case: str) -> None:
    """Grouped keys, T != S, V != D, nothing a power of two."""
    mask = MASKS[case]
    agrees(qkv(B=1 if mask is None else mask.batch), mask)


@pytest.mark.parametrize(
    ("T", "S", "D", "V"), [(1, 1, 8, 8), (1, 129, 40, 8), (17, 17, 40, 24), (129, 33, 8, 8), (33, 129, 16, 64)]
)
def test_any_size(T: int, S: int, D: int, V: int) -> None:
    agrees(qkv(T, S, H=1, D=D, V=V), masks.causal() & masks.window(70))


def test_groups_of_heads() -> None:
    """Two key heads, each read by its own two query heads, under a mask that differs by head."""
    agrees(qkv(17, 17, H=4, G=2), masks.per_head([masks.causal(), masks.window(3), masks.full(), masks.causal()]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    agrees(qkv(B=2, dtype=dtype), masks.causal())


def test_scores_of_any_size() -> None:
    """Scores up to 10^4: the running maximum keeps every power of two at most 1."""
    q, k, v = (z.detach() for z in qkv())
    got, want, naive = (
        results([100 * q, 100 * k, v], masks.causal(), name, dtype)
        for name, dtype in (("triton", torch.float32), ("eager", torch.float64), ("eager", torch.float32))
    )
    near(got[0], want[0], naive[0], "out")
    assert all(g.isfinite().all() for g in got[1:])


@pytest.mark.parametrize("case", ["heads last", "gaps", "expanded"])
def test_any_strides(case: str) -> None:
    q, k, v = (z.detach() for z in qkv(D=5, G=2))
    change = {
        "heads last": lambda z: z.transpose(1, 2).contiguous().transpose(1, 2),
        "gaps": lambda z: torch.stack([z, z + 1], -1)[..., 0],
        "expanded": lambda z: z[:, :1].expand(-1, 2, -1, -1),
    }[case]
    given = [change(z) for z in (q, k, v)]
    got = kernel.run(problem(*given, MASKS["window"]))
    same(got, kernel.run(problem(*(z.contiguous() for z in given), MASKS["window"])))


def test_the_log_sum_exp_and_its_gradient() -> None:
    """-inf, and no gradient, where a row sees nothing."""
    given, mask = qkv(B=2), MASKS["one row empty"]
    _, lse = kernel.attend(problem(*given, mask))
    wide = [z.detach().double().requires_grad_() for z in given]
    scores = wide[0] @ wide[1].mT * 8**-0.5
    want = scores.masked_fill(~mask.dense(20, 24).to(DEVICE), -torch.inf).logsumexp(-1)
    assert torch.equal(lse[1].cpu(), torch.full((2, 20), -torch.inf))
    assert (lse[0] - want[0]).abs().max() < 1e-6
    got = torch.autograd.grad(lse[0].sin().sum() + 0 * lse[1].nan_to_num().sum(), given[:2])
    for g, w in zip(got, torch.autograd.grad(want[0].sin().sum(), wide[:2]), strict=True):
        assert (g - w).abs().max() < 1e-5


# --- what masked slots hold ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_masked_slots_cannot_poison(bad: float) -> None:
    """Neither outputs nor gradients, whatever queries, keys and values hold where nobody may look."""
    sees = torch.ones(1, 1, 20, 24, dtype=torch.bool)
    sees[..., 7:11] = False  # keys that nobody sees
    sees[..., 18, :] = False  # a query that sees nothing
    given = qkv()
    want = results(given, masks.dense(sees), "triton", torch.float32)
    hurt = [z.detach().clone() for z in given]
    hurt[0][:, :, 18], hurt[1][:, :, 7:9], hurt[2][:, :, 9:11] = bad, bad, bad
    for got, expected in zip(results(hurt, masks.dense(sees), "triton", torch.float32), want, strict=True):
        same(got, expected)


@pytest.mark.parametrize("hurt", ["q", "k", "v"])
def test_nan_reaches_the_rows_that_see_it(hurt: str) -> None:
    given = {name: z.detach().clone() for name, z in zip("qkv", qkv(), strict=True)}
    given[hurt][0, 0, 9, 3] = float("nan")
    out = kernel.run(problem(**given, mask=masks.causal()))
    row = masks.causal().dense(20, 24)[0, 0, :, 9]
    want = torch.stack([row, row]) if hurt != "q" else torch.zeros(2, 20).index_fill(1, torch.tensor([9]), 1).bool()
    want[1] &= hurt != "q"
    assert torch.equal(out[0].isnan().any(-1).cpu(), want)


# --- which blocks are visited -------------------------------------------------------------------------------------


def rebuilt(found: Walk, T: int, S: int, block: tuple[int, int], *, columns: bool) -> Tensor:
    """The mask that the lists of one direction describe."""
    nq, nk = -(-T // block[0]), -(-S // block[1])
    lists, lines = (found.columns, nk) if columns else (found.rows, nq)
    whole = torch.zeros(found.batch * found.heads, nq, nk, *block, dtype=torch.bool)
    for line in range(found.batch * found.heads * lines):
        for at in range(int(lists.start[line]), int(lists.start[line + 1])):
            other, tile = int(lists.at[at]), int(lists.tile[at])
            assert (tile < 0) == (at < lists.middle[line]), "full blocks come first"
            r, c = (other, line % lines) if columns else (line % lines, other)
            whole[line // lines, r, c] = True if tile < 0 else found.tiles[tile].bool().cpu()
    flat = whole.transpose(2, 3).reshape(found.batch, found.heads, nq * block[0], nk * block[1])
    return flat[:, :, :T, :S]


@pytest.mark.parametrize("case", [name for name, mask in MASKS.items() if mask is not None])
@pytest.mark.parametrize("block", [(8, 8), (4, 16)], ids=str)
def test_the_lists_are_the_mask(case: str, block: tuple[int, int]) -> None:
    mask = MASKS[case]
    found = walk(mask, 20, 24, block, DEVICE)
    for columns in (False, True):
        assert torch.equal(rebuilt(found, 20, 24, block, columns=columns), mask.dense(20, 24))
    assert len(found.rows.at) == len(found.columns.at) == mask.layout(20, 24, block=block).num_blocks


def test_blocks_on_a_diagonal_share_a_tile() -> None:
    for mask, tiles in ((masks.causal(), 1), (masks.causal() & masks.window(512), 2), (masks.window(40), 3)):
        assert len(walk(mask, 2048, 2048, (64, 64), DEVICE).tiles) == tiles
    equal = [masks.causal() & masks.window(512) for _ in range(2)]
    first, second = (walk(mask, 2048, 2048, (64, 64), DEVICE) for mask in equal)
    assert first is second


# --- how the programs are started ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "T", "S", "D", "grain", "want"),
    [
        (torch.float16, 4096, 4096, 64, None, (64, 64)),
        (torch.bfloat16, 4096, 4096, 128, None, (64, 64)),
        (torch.bfloat16, 4096, 4096, 256, None, (32, 32)),
        (torch.float32, 4096, 4096, 64, None, (32, 32)),
        (torch.float32, 4096, 4096, 200, None, (16, 16)),
        (torch.float16, 1, 4096, 64, None, (16, 64)),
        (torch.float16, 4096, 4096, 64, (32, 128), (32, 64)),
        (torch.float16, 4096, 4096, 64, (48, 8), (64, 64)),
    ],
)
def test_blocks_suit_the_hardware(
    dtype: torch.dtype,
    T: int,
    S: int,
    D: int,
    grain: tuple[int, int] | None,
    want: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernel, "LARGEST", 64)
    q, k = torch.empty(1, 1, T, D, dtype=dtype, device="meta"), torch.empty(1, 1, S, D, dtype=dtype, device="meta")
    mask = None
    if grain is not None:
        tiles = torch.ones(1, 1, -(-T // grain[0]), -(-S // grain[1]), dtype=torch.bool)
        mask = masks.chosen(tiles, T, S, grain)
    assert kernel.block_of(problem(q, k, k, mask)) == want


def test_launch() -> None:
    got = kernel.launch((2, 8, 1000, 80), (2, 4, 3000, 80), (2, 4, 3000, 33), (64, 32))
    assert got == kernel.Launch(width=(128, 64), warps=4, stages=2, programs=(2 * 8 * 16, 2 * 4 * 94))
    assert kernel.launch((1, 1, 1, 64), (1, 1, 1, 64), (1, 1, 1, 64), (16, 16)).stages == 3


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 2, 5, 8, device=DEVICE)
    crowd = torch.zeros(1, 1, 1, 1, device=DEVICE).expand(2**20, 2**12, 1, 1)
    wide = torch.zeros(1, 1, 4, 300, device=DEVICE)
    for given, options, reason in (
        (q, {"normalizer": Entmax()}, "Entmax: only plain softmax"),
        (q, {"position": Alibi(2)}, "Alibi: only plain softmax"),
        (q, {"position": Shaw(8, max_distance=3)}, "Shaw: only plain softmax"),
        (q, {"bias": q[:, :1, :, :5]}, "bias: only masks"),
        (q, {"dropout": 0.1}, "dropout 0.1"),
        (q.double(), {}, "dtype torch.float64: only float16, bfloat16 and float32"),
        (q.to("meta"), {}, "tensors are on meta: only CUDA devices"),
        (wide, {}, "heads are 300 wide: at most 256"),
        (crowd, {}, "4294967296 programs exceed the grid limit 2147483647: split the batch"),
    ):
        (found,) = kernel.why_not(problem(given, given, given, **options))
        assert found.startswith(reason)
    assert kernel.why_not(problem(q, q, q)) == []
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert kernel.why_not(problem(*[q.cpu()] * 3)) == [
        "tensors are on cpu: only CUDA devices, or TRITON_INTERPRET=1 in the environment"
    ]
    monkeypatch.setattr(kernel, "installed", lambda: False)
    assert kernel.why_not(problem(q, q, q)) == ['triton is not installed: pip install "regard[triton]"']


def test_no_second_derivative() -> None:
    given = qkv()
    (grad,) = torch.autograd.grad(kernel.run(problem(*given)).square().sum(), given[0], create_graph=True)
    with pytest.raises(NotImplementedError, match='"triton" has no second derivatives; expected kernel="eager"'):
        grad.sum().backward()


# --- torch.compile, and the real compiler -------------------------------------------------------------------------


def test_the_operator_keeps_torchs_rules() -> None:
    """Schema, fake tensors, autograd, and what torch.compile makes of it at lengths of any size."""
    kernel.run(problem(*qkv(T=1, S=1)))  # defines it
    lists = walk(MASKS["window"], 5, 7, (16, 16), DEVICE).tensors
    torch.library.opcheck(
        torch.ops.regard.triton_attention.default, (*qkv(T=5, S=7, H=1), lists, 0.3, [16, 16], [1, 1])
    )


def test_compiled_whole() -> None:
    """One graph for all lengths from the second on; the lists are made before."""
    found = {T: walk(MASKS["window"], T, T, (16, 16), DEVICE) for T in (18, 20, 23)}
    run = torch.compile(kernel.over, backend="aot_eager", fullgraph=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for T, lists in found.items():
        given = qkv(T, T, H=1)
        for walked in (lists, None):
            want = kernel.over(*given, walked, scale=0.3, block=(16, 16))[0]
            got = run(*given, walked, scale=0.3, block=(16, 16))[0]
            same(got, want)
            for g, w in zip(*(torch.autograd.grad(z.sum(), given) for z in (got, want)), strict=True):
                same(g, w)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from regard.kernels import _triton_attention as programs

chosen = dict(BQ=64, BK=64, BD=64, BV=64, DENSE=False, PRECISION="ieee")
kinds = dict(start="*i32", middle="*i32", at="*i32", tile_of="*i32", tiles="*u8")
kinds |= dict(bound="*fp32", dbound="*fp32", delta="*fp32", scale="fp32", scale_log2="fp32")
kinds |= {name: "*bf16" for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")}
for program in (programs.forward, programs.backward_queries, programs.backward_keys):
    types = {n: "constexpr" if n in chosen else kinds.get(n, "i32") for n in program.arg_names}
    fixed = {(n,): chosen[name] for n, name in enumerate(program.arg_names) if name in chosen}
    made = triton.compile(ASTSource(program, types, fixed), target=GPUTarget("cuda", 90, 32))
    print(program.__name__, len(made.asm["cubin"]) > 0, bool(re.search("mma", made.asm["ptx"])), made.metadata.shared)
"""


@pytest.mark.slow
def test_compiles_for_cuda() -> None:
    """Without a device: machine code that uses the matrix units, and fits into a multiprocessor's shared memory."""
    env = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=env, timeout=280)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["forward", "backward_queries", "backward_keys"]
    assert all(line[1:3] == ["True", "True"] and int(line[3]) <= 99 * 1024 for line in lines)
