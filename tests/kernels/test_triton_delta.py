"""The Triton kernels of the delta rule and of channels by themselves, in Triton's interpreter, against the recurrences.

Chunks and tiles of 16, the least there are, so that a few tokens straddle several.
"""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from kernels.test_linear_scan import agree, run
from regard.kernels import triton_channels, triton_delta, triton_scan
from regard.kernels.channel_scan import channel_scan
from regard.kernels.delta_scan import delta_scan
from regard.laws.agreement import near, same

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Without a GPU the interpreter stands in for it (see conftest)."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_scan, "LARGEST", 16)
    monkeypatch.setattr(triton_scan, "WIDEST", 16)
    monkeypatch.setattr(triton_channels, "BLOCK", 16)


def inputs(
    T: int, decay: str = "none", *, B: int = 1, H: int = 1, K: int = 5, V: int = 3, strength: float = 1.0
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(T)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64).to(DEVICE)

    made = {"q": normal(B, H, T, K), "k": normal(B, H, T, K), "v": normal(B, H, T, V), "state": normal(B, H, K, V)}
    made["k"] = torch.nn.functional.normalize(made["k"], dim=-1)
    made["beta"] = 2 * normal(B, H, T).sigmoid()
    if decay != "none":
        made["decay"] = -strength * normal(*{"head": (H,), "time": (B, H, T), "feature": (B, H, T, K)}[decay]).abs()
    return made


def channels(T: int, *, B: int = 2, C: int = 19, strength: float = 1.0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(T)
    x, decay = torch.randn(2, B, T, C, generator=g, dtype=torch.float64).to(DEVICE)
    state = torch.randn(B, C, generator=g, dtype=torch.float64).to(DEVICE)
    return {"x": x, "decay": -strength * decay.abs(), "state": state}


def step(**given: Tensor):
    return (channel_scan if "x" in given else delta_scan)(**given, form="step")


def triton(**given: Tensor):
    return (channel_scan if "x" in given else delta_scan)(**given, form="triton")


@pytest.mark.parametrize(
    ("T", "decay"),
    [(1, "feature"), (16, "none"), (33, "none"), (16, "head"), (33, "time"), (16, "time"), (33, "feature")],
)
def test_the_delta_rule_is_the_recurrence(T: int, decay: str) -> None:
    """Outputs, final state and all gradients in float64, at chunks' ends and beside them."""
    given = inputs(T, decay, **({"B": 2, "H": 2} if T == 1 else {}))
    agree(run(triton, given), run(step, given))


@pytest.mark.parametrize("T", [1, 2, 33])
def test_channels_are_the_recurrence(T: int) -> None:
    """More channels than one program has, the last block ragged."""
    given = channels(T)
    agree(run(triton, given), run(step, given))


@pytest.mark.parametrize("decay", ["none", "feature"])
def test_wide_heads_of_any_size(decay: str) -> None:
    given = inputs(3, decay, K=19, V=17)
    agree(run(triton, given), run(step, given))


@pytest.mark.parametrize("strength", [0.0, 1e-9, 3000.0], ids=str)
def test_decays_near_one_and_near_zero(strength: float) -> None:
    for given in (inputs(18, "time", strength=strength), inputs(18, "feature", strength=strength), channels(18, C=3)):
        got = run(triton, given)
        assert all(t.isfinite().all() for t in got.values())
        agree(got, run(step, given))


def test_forgetting_everything_at_a_documents_start() -> None:
    starts = (torch.arange(20, device=DEVICE) % 7 == 5)[None]
    for scan, given in ((delta_scan, inputs(20, "time")), (delta_scan, inputs(20)), (channel_scan, channels(20, C=3))):
        forms = [
            run(lambda scan=scan, form=form, **z: scan(**z, starts=starts, form=form), given)
            for form in ("triton", "step")
        ]
        agree(*forms)


def test_keys_that_are_alike() -> None:
    """Powers of the chunk's matrix grow beyond any float32's digits here; row by row nothing is lost."""
    given = {k: t.float() for k, t in inputs(64, K=4, V=4).items()}
    given["k"], given["beta"] = torch.ones_like(given["k"]) / 2, torch.ones_like(given["beta"])
    old = triton_scan.LARGEST
    try:
        triton_scan.LARGEST = 128  # chunks of 64
        got, want = triton(**given), step(**{k: t.double() for k, t in given.items()})
    finally:
        triton_scan.LARGEST = old
    assert float((got.out - want.out).abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_lower_precision(dtype: torch.dtype) -> None:
    """No worse than the recurrence in float32, rounded to the inputs' dtype; the state stays wide."""
    for given in (inputs(17, "time"), channels(17, B=1, C=4)):
        given = {k: t.to(dtype) for k, t in given.items()}
        given |= {k: given[k].float() for k in ("state", "decay")}
        got, naive = run(triton, given), run(step, given)
        want = run(step, {k: t.double() for k, t in given.items()})
        assert got["final"].dtype == torch.float32
        for key in want:
            near(got[key], want[key], naive[key], key, grad=key not in ("out", "final"))


def test_split_equals_whole() -> None:
    for given in (inputs(21, "time"), channels(21, C=3)):
        whole, state, outs, axis = run(triton, given), given.pop("state"), [], 1 if "x" in given else 2
        for a, b in ((0, 4), (4, 21)):
            out, state = triton(**{k: t.narrow(axis, a, b - a) for k, t in given.items()}, state=state)
            outs.append(out)
        agree({"out": torch.cat(outs, axis), "final": state}, {k: whole[k] for k in ("out", "final")})


def test_no_tokens_no_batch() -> None:
    for given, shape in ((inputs(0, "time"), (1, 1, 0, 3)), (channels(0), (2, 0, 19))):
        got = run(triton, given)
        assert got["out"].shape == shape
        same(got["final"], given["state"])
    assert triton(**{k: t[:0] for k, t in inputs(7, "time").items()}).out.shape == (0, 1, 7, 3)
    assert triton(**{k: t[:0] for k, t in channels(7).items()}).out.shape == (0, 7, 19)


def test_inputs_in_any_memory_order() -> None:
    for given, axes in ((inputs(3, "feature"), (1, 2)), (channels(3, C=3), (0, 1))):
        turned = {k: t.transpose(*axes).contiguous().transpose(*axes) for k, t in given.items()}
        agree(run(triton, turned), run(triton, given))


# --- refusals, torch.compile, and the real compiler ---------------------------------------------------------------


def test_reasons_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    for who, given in (("delta_scan", inputs(3)), ("channel_scan", channels(3))):
        with pytest.raises(ValueError, match=f'{who}: form "triton" cannot run: tensors are on cpu: only CUDA devices'):
            triton(**{k: t.cpu() for k, t in given.items()})
    wide = torch.zeros(1, 1, 1, 1, device=DEVICE)
    assert "keys are 257 wide: at most 256" in triton_delta.why_not(wide.expand(1, 1, 1, 257), wide)
    assert any("channels: at most" in why for why in triton_channels.why_not(wide[0].expand(1, 1, 2**23)))


def test_no_second_derivative() -> None:
    for given, name in ((inputs(3), "v"), (channels(3), "x")):
        leaves = {k: t.requires_grad_() for k, t in given.items()}
        (grad,) = torch.autograd.grad(triton(**leaves).out.square().sum(), leaves[name], create_graph=True)
        with pytest.raises(NotImplementedError, match='"triton" has no second derivatives; expected form="chunked"'):
            grad.sum().backward()


def test_the_operators_keep_torchs_rules() -> None:
    static = ("test_schema", "test_faketensor", "test_autograd_registration")
    z = {k: t.requires_grad_() for k, t in inputs(2, "feature").items()}
    args = (z["k"], z["v"], z["beta"][..., None], z["decay"], z["state"])
    torch.library.opcheck(triton_delta._missing, args, test_utils=static)
    torch.library.opcheck(
        triton_channels._forward, tuple(t.requires_grad_() for t in channels(2, C=3).values()), test_utils=static
    )


def test_compiled_whole() -> None:
    """One graph for all lengths from the second on, gradients too."""
    for make in (lambda T: inputs(T, "time"), lambda T: channels(T, C=3)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(triton, backend="aot_eager", fullgraph=True)
        for T in (3, 4, 6):
            agree(run(compiled, make(T)), run(step, make(T)))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


COMPILE = """
import re
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from regard.kernels import _triton_channels, _triton_delta
from regard.kernels.triton_scan import FEATURE, NONE, TIME, _Run

def build(program, options):
    options = {"num_warps": 4, "num_stages": 2} | options
    names = program.arg_names
    kinds = {n: "constexpr" if n in options else "i32" if n == "T" else "*fp32" for n in names}
    fixed = {(n,): options[name] for n, name in enumerate(names) if name in options}
    flags = {name: options[name] for name in ("num_warps", "num_stages")}
    made = triton.compile(ASTSource(program, kinds, fixed), target=GPUTarget("cuda", 90, 32), options=flags)
    print(len(made.asm["cubin"]) > 0, bool(re.search("mma", made.asm["ptx"])), made.metadata.shared)

like, state = torch.zeros(1, 1, 128, 128), torch.zeros(1, 1, 128, 128)
for kind, width in ((NONE, 0), (TIME, 1), (FEATURE, 128)):
    run = _Run(like, like, torch.zeros(1, 1, 128, width) if width else None, state)
    names = ("K", "V", "DECAY", "EXACT", "C", "BV")
    options = {name: run.options[name] for name in names}
    for reverse in (False, True):
        build(_triton_delta.run_solve, options | {"BK": 128, "REVERSE": reverse})
for reverse in (False, True):
    build(_triton_delta.run_inverse, {"C": 32, "REVERSE": reverse})
build(_triton_channels.run_channels, {"C": 100, "BLOCK": 64})
build(_triton_channels.run_channels_backward, {"C": 100, "BLOCK": 64})
"""


@pytest.mark.slow
def test_compiles_for_cuda() -> None:
    """Without a device: machine code that uses the matrix units, and fits into a multiprocessor's shared memory."""
    env = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=env, timeout=280)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["True"] * 10
    assert [line[1] for line in lines] == ["True"] * 6 + ["False"] * 4, "products are in run_solve alone"
    assert all(int(line[2]) <= 99 * 1024 for line in lines), lines
