"""The Triton scan and Triton decoding on a GPU, against what torch runs there.

python -m benchmarks.gpu_scan
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from benchmarks.harness import Benchmark, Figure, agree, arguments, compared, finish, forward_backward, race
from regard.cache import PrefixTree
from regard.kernels.linear_scan import linear_scan

HEADS, WIDTH, LENGTH = 16, 64, 16384
DECAYS = ("none", "head", "time", "feature")
PROMPTS = ((16, 4096, 64), (64, 8192, 64), (16, 64, 8192))
"""Sequences, tokens that all share, and tokens of each one's own."""
MISSING = "no GPU here: not measured"


def main() -> None:
    args = arguments(__doc__)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    about = f"Triton kernels on {device}: linear scan of T = {LENGTH}, and decoding, H = {HEADS}, D = {WIDTH}, bf16"
    result = Benchmark("gpu_scan", about)
    for kind in DECAYS:
        for backward in (False, True):
            scan(result, kind, backward, args.repeats)
    for shape in PROMPTS:
        decoding(result, *shape, args.repeats)
    finish(result, args)


def scan(result: Benchmark, kind: str, backward: bool, repeats: int) -> None:
    """Times faster than the scan's torch form, and than flash attention, which keeps everything."""
    what = f"scan, decay {kind}, {'with' if backward else 'no'} backward"
    peers = {"torch": f"{what}: against the torch form", "sdpa": f"{what}: against causal SDPA"}
    if not torch.cuda.is_available():
        return missing(result, *peers.values())
    q, k, v = torch.randn(3, 1, HEADS, LENGTH, WIDTH, device="cuda", dtype=torch.bfloat16).mul_(0.3)
    rates = torch.rand(1, HEADS, LENGTH, WIDTH, device="cuda")
    decay = {"none": None, "head": -rates[0, :, 0, 0], "time": -rates[..., 0], "feature": -rates}[kind]
    given = tuple(z.requires_grad_(backward) for z in (q, k, v))
    forms: dict[str, Callable[[], torch.Tensor]] = {
        "triton": lambda: linear_scan(q, k, v, decay, form="triton").out,
        "torch": lambda: linear_scan(q, k, v, decay).out,
        "sdpa": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    }
    want = forms["torch"]().detach().float()
    agree(forms["triton"]().float(), want, within=0.02 * float(want.abs().max()))
    runs = {name: forward_backward(run, *given) if backward else run for name, run in forms.items()}
    if backward:
        for got, wanted in zip(runs["triton"](), runs["torch"](), strict=True):
            agree(got.float(), wanted.float(), within=0.02 * float(wanted.float().abs().max()))
    times = race({name: finished(run) for name, run in runs.items()}, repeats=repeats)
    for peer, line in peers.items():
        result.add(compared(line, times, "triton", peer, better="higher", note="times faster"))


@torch.no_grad()
def decoding(result: Benchmark, N: int, prompt: int, own: int, repeats: int) -> None:
    """One token of each sequence: times faster than the tree's torch form, and than SDPA over separate caches."""
    what = f"decode, N = {N}, prompt {prompt}, {own} own"
    peers = {"torch": f"{what}: against the torch form", "sdpa": f"{what}: against SDPA over separate caches"}
    if not torch.cuda.is_available():
        return missing(result, *peers.values())
    half = {"device": "cuda", "dtype": torch.bfloat16}
    tree = PrefixTree(HEADS, WIDTH, **half)
    whole = tree.add(*torch.randn(2, HEADS, prompt, WIDTH, **half))
    ids = [tree.fork(whole) for _ in range(N)]
    tree.append(ids, *torch.randn(2, N, HEADS, own, WIDTH, **half))
    q = torch.randn(N, HEADS, WIDTH, **half)
    k, v = (torch.stack(z) for z in zip(*(tree.keys(i) for i in ids), strict=True))
    runs: dict[str, Callable[[], torch.Tensor]] = {
        "triton": lambda: tree.attend(q, ids, kernel="triton"),
        "torch": lambda: tree.attend(q, ids),
        "sdpa": lambda: F.scaled_dot_product_attention(q[:, :, None], k, v)[:, :, 0],
    }
    agree(runs["triton"]().float(), runs["torch"]().float(), within=0.02)
    times = race({name: finished(run) for name, run in runs.items()}, repeats=repeats)
    for peer, line in peers.items():
        result.add(compared(line, times, "triton", peer, better="higher", note="times faster"))


def missing(result: Benchmark, *lines: str) -> None:
    result.add(*(Figure(line, None, better="higher", note=MISSING) for line in lines))


def finished(run: Callable[[], object]) -> Callable[[], object]:
    """The same, back only when the GPU is."""

    def waited() -> object:
        out = run()
        torch.cuda.synchronize()
        return out

    return waited


if __name__ == "__main__":
    main()
