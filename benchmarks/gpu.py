"""On a CUDA device: our Triton kernels and compiled FlexAttention against torch's fused kernels.

python -m benchmarks.gpu

Causal, a causal window, and random blocks at several densities, forward and with all gradients, in bfloat16. Peers are
flash attention over all pairs, causal or not (what torch can do without a mask tensor), and the same mask as a tensor.
Without such a device every figure is written down as not measured.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import regard
from benchmarks.harness import Benchmark, Figure, Run, able, agree, command, compared, forward_backward, race
from regard import masks
from regard.masks import Mask

NONE = "no GPU here: not measured"
OURS = ("triton", "flex")
PEERS = ("SDPA flash", "SDPA with the mask as a tensor")


class Case(NamedTuple):
    words: str
    mask: Mask
    causal: bool
    """Whether torch's causal kernel is the one to beat; else that over all pairs."""


def cases(length: int, block: int, densities: tuple[float, ...]) -> list[Case]:
    found = [
        Case("causal", masks.causal(), True),
        Case("causal, window 512", masks.causal() & masks.window(512), True),
    ]
    blocks = -(-length // block)
    for density in densities:
        tiles = torch.rand(1, 1, blocks, blocks, generator=torch.Generator().manual_seed(0)) < density
        tiles |= torch.eye(blocks, dtype=torch.bool)
        share = float(tiles.float().mean())
        found.append(Case(f"blocks at density {share:.2f}", masks.chosen(tiles, length, length, block), False))
    return found


def contenders(case: Case, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Each as a function that gives the output."""
    whole = case.mask.dense(q.shape[2], device=q.device)

    def flash() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal)

    ours = {name: lambda name=name: regard.attention(q, k, v, mask=case.mask, kernel=name) for name in OURS}
    return ours | dict(zip(PEERS, (flash, lambda: F.scaled_dot_product_attention(q, k, v, whole)), strict=True))


def timed(run: Callable[[], object]) -> Run:
    """Ended only when the device has."""

    def whole() -> None:
        run()
        torch.cuda.synchronize()

    return whole


def measure(
    *,
    repeats: int,
    length: int = 8192,
    heads: int = 16,
    width: int = 64,
    block: int = 128,
    densities: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5),
) -> Benchmark:
    shape = {"B": 1, "H": heads, "T": length, "D": width, "block": block, "dtype": "bf16"}
    result = Benchmark("gpu", f"Attention kernels on a GPU at T = {length}", shape=shape)
    for case in cases(length, block, densities):
        for trained, what in ((False, "forward"), (True, "forward and backward")):
            result.add(*figures(case, f"{case.words}, {what}", (heads, length, width), trained, repeats))
    if torch.cuda.is_available():
        result.shape["device"] = torch.cuda.get_device_name()
    return result


def figures(case: Case, what: str, size: tuple[int, int, int], trained: bool, repeats: int) -> list[Figure]:
    """Ours over each peer's time."""
    pairs = [(ours, theirs) for ours in OURS for theirs in PEERS]
    if not torch.cuda.is_available():
        return [Figure(f"{what}: {ours} / {theirs}", None, note=NONE) for ours, theirs in pairs]
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, *size, device="cuda", dtype=torch.bfloat16, requires_grad=trained) for _ in "qkv")
    runs = contenders(case, q, k, v)
    with torch.no_grad():
        want = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), case.mask.dense(size[1], device="cuda"))
        for name in OURS:
            agree(runs[name]().float(), want, within=0.02)
    if trained:
        runs = {name: forward_backward(run, q, k, v) for name, run in runs.items()}
    ready, why = able({name: lambda run=run: timed(run) for name, run in runs.items()})
    with torch.set_grad_enabled(trained):
        times = race(ready, repeats=repeats, warmup=2)
    return [
        compared(f"{what}: {ours} / {theirs}", times, ours, theirs, why=why) for ours, theirs in pairs if ours in times
    ]


if __name__ == "__main__":
    command(measure, __doc__)
