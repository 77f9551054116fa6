"""The Triton scan in Triton's interpreter: against the recurrence, far decays, ragged sizes, and how it is started.

Chunks and tiles of 16, the least there are, so that a few tokens straddle several; one head or two, as the interpreter
is slow.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from kernels.test_linear_scan import agree, run
from regard.kernels import triton_scan as kernel
from regard.kernels.linear_scan import linear_scan
from regard.laws.agreement import near, same

DECAYS = ["none", "head", "time", "feature"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Without a GPU the interpreter stands in for it (see conftest)."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "LARGEST", 16)
    monkeypatch.setattr(kernel, "WIDEST", 16)


def inputs(
    T: int, decay: str = "none", *, B: int = 1, H: int = 2, K: int = 5, V: int = 3, strength: float = 1.0
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE)

    made = {"q": normal(B, H, T, K), "k": normal(B, H, T, K), "v": normal(B, H, T, V), "state": normal(B, H, K, V)}
    if decay != "none":
        made["decay"] = -strength * normal(*{"head": (H,), "time": (B, H, T), "feature": (B, H, T, K)}[decay]).abs()
    return made


def step(**given: Tensor):
    return linear_scan(**given, form="step")


def triton(**given: Tensor):
    return linear_scan(**given, form="triton")


@pytest.mark.parametrize(
    ("T", "decay"), [(1, d) for d in DECAYS] + [(T, d) for T in (16, 33) for d in ("none", "time", "feature")]
)
def test_is_the_recurrence(T: int, decay: str) -> None:
    """Outputs, final state and all gradients in float64, at chunks' ends and beside them."""
    given = inputs(T, decay, **({"B": 2, "H": 2} if T == 1 else {"H": 1}))
    agree(run(triton, given), run(step, given))


@pytest.mark.parametrize("decay", ["none", "time", "feature"])
def test_wide_heads_of_any_size(decay: str) -> None:
    """Several tiles of keys and of values, the last ones ragged."""
    given = inputs(3, decay, H=1, K=19, V=17)
    agree(run(triton, given), run(step, given))


@pytest.mark.parametrize("decay", ["time", "feature"])
@pytest.mark.parametrize("strength", [0.0, 1e-9, 3000.0], ids=str)
def test_decays_near_one_and_near_zero(decay: str, strength: float) -> None:
    given = inputs(18, decay, H=1, strength=strength)
    got = run(triton, given)
    assert all(t.isfinite().all() for t in got.values())
    agree(got, run(step, given))


@pytest.mark.parametrize("decay", ["time", "feature"])
@pytest.mark.parametrize("cut", [5, 16])
def test_forgetting_everything(decay: str, cut: int) -> None:
    """exp(-inf) = 0, inside a chunk and between two."""
    given = inputs(20, decay, H=1)
    given["decay"][:, :, cut] = -torch.inf
    got = run(triton, given)
    assert all(t.isfinite().all() for t in got.values())
    agree(got, run(step, given))
    same(got["decay"][:, :, cut], torch.zeros_like(got["decay"][:, :, cut]), "gradient of a reset")


@pytest.mark.parametrize(
    ("decay", "dtype"),
    [
        ("none", torch.bfloat16),
        ("time", torch.float16),
        ("time", torch.float32),
        ("feature", torch.bfloat16),
        ("feature", torch.float32),
    ],
    ids=str,
)
def test_lower_precision(decay: str, dtype: torch.dtype) -> None:
    """No worse than the recurrence in float32, rounded to the inputs' dtype; the state stays wide."""
    given = {k: t.to(dtype) for k, t in inputs(17, decay, H=1).items()}
    given |= {k: given[k].float() for k in ("state", "decay") if k in given}
    got, naive = run(triton, given), run(step, given)
    want = run(step, {k: t.double() for k, t in given.items()})
    assert got["final"].dtype == torch.float32
    for key in want:
        near(got[key], want[key], naive[key], key, grad=key not in ("out", "final"))


def test_half_inputs_are_summed_in_single_precision() -> None:
    """A half-precision sum of equal terms would stop growing at 256."""
    T = 300
    q = k = torch.ones(1, 1, T, 1, dtype=torch.bfloat16, device=DEVICE)
    out, state = linear_scan(q, k, torch.ones_like(q), form="triton")
    same(out.flatten(), (torch.arange(1, T + 1, dtype=torch.float32, device=DEVICE)).to(q.dtype))
    assert state.item() == T


@pytest.mark.parametrize("decay", ["none", "time", "feature"])
def test_the_future_changes_nothing(decay: str) -> None:
    given = inputs(20, decay, H=1)
    changed = {k: t.clone() for k, t in given.items()}
    for key in ("q", "k", "v", *(["decay"] if decay in ("time", "feature") else [])):
        changed[key][:, :, 11:] *= 100
    same(triton(**changed).out[:, :, :11], triton(**given).out[:, :, :11])


def test_split_equals_whole() -> None:
    given, state, outs = inputs(21, "time", H=1), None, []
    whole = triton(**{k: t for k, t in given.items() if k != "state"})
    for a, b in ((0, 4), (4, 4), (4, 21)):
        out, state = triton(**{k: t[:, :, a:b] for k, t in given.items() if k != "state"}, state=state)
        outs.append(out)
    agree({"out": torch.cat(outs, 2), "final": state}, {"out": whole.out, "final": whole.state})


@pytest.mark.parametrize("decay", DECAYS)
def test_no_tokens_no_batch(decay: str) -> None:
    given = inputs(0, decay)
    got = run(triton, given)
    assert got["out"].shape == (1, 2, 0, 3)
    same(got["final"], given["state"])
    empty = {k: t if t.dim() == 1 else t[:0] for k, t in inputs(7, decay).items()}
    assert run(triton, empty)["out"].shape == (0, 2, 7, 3)


def test_inputs_in_any_memory_order() -> None:
    given = inputs(3, "feature")
    turned = {k: t.transpose(1, 2).contiguous().transpose(1, 2) for k, t in given.items()}
    agree(run(triton, turned), run(triton, given))


def test_memory_for_backward_is_the_inputs() -> None:
    given, sizes = {k: t.requires_grad_() for k, t in inputs(40, "time", H=1).items()}, {}

    def pack(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        assert triton(**given).out.requires_grad
    assert sum(sizes.values()) <= sum(t.nbytes for t in given.values())


# --- refusals -----------------------------------------------------------------------------------------------------


def test_reasons_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {k: t.cpu() for k, t in inputs(3).items()}
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match='form "triton" cannot run: tensors are on cpu: only CUDA devices, or TRITON_'):
        triton(**given)
    monkeypatch.setattr(kernel, "installed", lambda: False)
    with pytest.raises(ValueError, match=r'triton is not installed: pip install "regard\[triton\]"'):
        triton(**given)
    monkeypatch.undo()
    wide = torch.zeros(1, 1, 1, 1).expand(1, 1, 1, 2**21)
    assert kernel.why_not(wide.to(DEVICE), wide.to(DEVICE)) == ["features are 2097152 wide: at most 1048560"]


def test_no_second_derivative() -> None:
    given = {k: t.requires_grad_() for k, t in inputs(3, H=1).items()}
    (grad,) = torch.autograd.grad(triton(**given).out.square().sum(), given["q"], create_graph=True)
    with pytest.raises(NotImplementedError, match='"triton" has no second derivatives; expected form="chunked"'):
        grad.sum().backward()


# --- how it is started --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 24, 4096])
@pytest.mark.parametrize("T", [0, 1, 16, 65, 1_000_003])
@pytest.mark.parametrize(("K", "V"), [(1, 1), (64, 65), (300, 128)])
@pytest.mark.parametrize("narrow", [False, True])
def test_programs_cover_everything_once(
    monkeypatch: pytest.MonkeyPatch, heads: int, T: int, K: int, V: int, narrow: bool
) -> None:
    monkeypatch.undo()
    cut = kernel.cut(heads, T, K, V, narrow=narrow)
    for size in cut[:3]:
        assert size in (16, 32, 64)
    assert (cut.chunks - 1) * cut.chunk < T <= cut.chunks * cut.chunk or T == cut.chunks == 0
    keys, values = cut.states[1:]
    assert (keys - 1) * cut.key_tile < K <= keys * cut.key_tile
    assert (values - 1) * cut.value_tile < V <= values * cut.value_tile
    assert cut.states[0] == heads
    assert cut.weights[0] == cut.outputs[0] == cut.gradients[0] == heads * cut.chunks
    assert (cut.outputs[1], cut.gradients[1]) == (values, keys)
    assert max(n for grid in cut[4:] for n in grid[1:] or (1,)) <= kernel.LINES, "only the first axis may be long"


# --- torch.compile, and the real compiler -------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["none", "feature"])
def test_the_operator_keeps_torchs_rules(decay: str) -> None:
    given = {k: t.requires_grad_() for k, t in inputs(2, decay, H=1).items()}
    args = (given["q"], given["k"], given["v"], given.get("decay"), given["state"])
    static = ("test_schema", "test_faketensor", "test_autograd_registration")
    more = () if decay == "none" else ("test_aot_dispatch_dynamic",)
    torch.library.opcheck(kernel._forward, args, test_utils=static + more)


def test_compiled_whole() -> None:
    """One graph for all lengths from the second on, gradients too."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(triton, backend="aot_eager", fullgraph=True)
    for T in (3, 4, 6):
        given = inputs(T, "time", H=1)
        agree(run(compiled, given), run(step, given))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


COMPILE = """
import re
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from regard.kernels import _triton_scan as programs
from regard.kernels.triton_scan import FEATURE, TIME, _Run

wide = ("first", "states", "behind", "last", "weights", "decay", "ddecay")
for dtype, kind in ((torch.bfloat16, TIME), (torch.float32, FEATURE)):
    like = torch.zeros(1, 1, 64, 64, dtype=dtype)
    g = torch.zeros(1, 1, 64, 1 if kind == TIME else 64)
    chosen = _Run(like, like, g, torch.zeros(1, 1, 64, 64)).options | {"REVERSE": True}
    options = {name: chosen.pop(name) for name in ("num_warps", "num_stages")}
    one = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    for program in (programs.run_states, programs.run_weights, programs.run_outputs, programs.run_gradients):
        names = program.arg_names
        kinds = {n: "constexpr" if n in chosen else "i32" if n == "T" else "*fp32" if n in wide else one for n in names}
        fixed = {(n,): chosen[name] for n, name in enumerate(names) if name in chosen}
        made = triton.compile(ASTSource(program, kinds, fixed), target=GPUTarget("cuda", 90, 32), options=options)
        print(len(made.asm["cubin"]) > 0, bool(re.search("mma", made.asm["ptx"])), made.metadata.shared)
"""


@pytest.mark.slow
def test_compiles_for_cuda() -> None:
    """Without a device: machine code that uses the matrix units, and fits into a multiprocessor's shared memory."""
    env = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=env, timeout=280)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 8
    assert all(line[:2] == ["True", "True"] and int(line[2]) <= 99 * 1024 for line in lines), lines
