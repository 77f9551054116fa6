"""A causal window of 512 over 16k tokens, against torch's causal kernel, compiled FlexAttention and local-attention.

python -m benchmarks.window
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import regard
from benchmarks.goals import goal
from benchmarks.harness import Benchmark, Figure, Run, able, agree, command, compared, forward_backward, race, share
from regard import masks

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def flex(length: int, window: int) -> Attend:
    """Compiled FlexAttention with the same mask; it needs a C++ compiler and has no backward on the CPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    near = (masks.causal() & masks.window(window)).mask_mod(length)
    block = create_block_mask(near, None, None, length, length, device="cpu")
    run = torch.compile(flex_attention)
    return lambda q, k, v: run(q, k, v, block_mask=block)


def local(window: int) -> Attend:
    """The local-attention package. Its exact window of w also sees the w-th key back, so w = window - 1."""
    from local_attention import LocalAttention

    return LocalAttention(window - 1, causal=True, exact_windowsize=True, autopad=True, use_rotary_pos_emb=False)


def ways(mask: masks.Mask) -> dict[str, Attend]:
    """Ours: the kernel that `plan` chooses, and those made for it by name."""
    named: dict[str, Attend] = {name: partial(regard.attention, mask=mask, kernel=name) for name in KERNELS}
    return named | {"SDPA causal": partial(F.scaled_dot_product_attention, is_causal=True)}


KERNELS = ("auto", "window", "block_sparse")


def check(mask: masks.Mask, names: list[str], window: int, length: int) -> None:
    """The gradients of all, against torch's kernel with the mask as a tensor, at a length that allows for it."""
    x = [torch.randn(1, 2, length, 64, requires_grad=True) for _ in range(3)]
    dense = partial(F.scaled_dot_product_attention, attn_mask=mask.dense(length))
    want = forward_backward(partial(dense, *x), *x)()
    for name in names:
        run = local(window) if name == "local-attention" else ways(mask)[name]
        for got, right in zip(forward_backward(partial(run, *x), *x)(), want, strict=True):
            agree(got, right)


def measure(*, repeats: int, length: int = 16384, window: int = 512, heads: int = 4) -> Benchmark:
    torch.manual_seed(0)
    shape = {"B": 1, "H": heads, "T": length, "D": 64, "window": window, "dtype": "fp32"}
    result = Benchmark("window", f"A causal window of {window} at T = {length}", shape=shape)
    q, k, v = x = [torch.randn(1, heads, length, 64) for _ in range(3)]
    mask = masks.causal() & masks.window(window)
    note = f"auto is {regard.plan(q, k, v, mask=mask).kernel}"
    flops = 4 * heads * 64 * mask.count(length)
    peers = {"FlexAttention": lambda: flex(length, window), "local-attention": lambda: local(window)}

    with torch.no_grad():
        contenders: dict[str, Run] = {name: partial(run, *x) for name, run in ways(mask).items()}
        others, why = able({name: lambda make=make: partial(make(), *x) for name, make in peers.items()})
        contenders |= others
        last = slice(max(0, length - 1000), length)
        allowed = mask.at(torch.arange(length)[last], torch.arange(length))
        want = F.scaled_dot_product_attention(q[:, :, last], k, v, allowed)
        for name in (*KERNELS, *others):
            agree(contenders[name]()[:, :, last], want)
        times = race(contenders, repeats=repeats)
    done = share(flops, min(times["auto"]))
    result.add(compared("forward / SDPA causal", times, "auto", "SDPA causal", note=note, share=done, **goal("window")))
    result.add(Figure("forward, of the matrix peak", done, "", **goal("window peak")))
    for name in KERNELS[1:]:
        done = share(flops, min(times[name]))
        result.add(compared(f"{name} kernel, forward / SDPA causal", times, name, "SDPA causal", share=done))
    flexed = compared("times faster than FlexAttention", times, "auto", "FlexAttention", why=why, **goal("window flex"))
    result.add(flexed)
    what = "times faster than local-attention"
    result.add(compared(what, times, "auto", "local-attention", why=why, better="higher"))

    given = [z.clone().requires_grad_() for z in x]
    training = {name: forward_backward(partial(run, *given), *given) for name, run in ways(mask).items()}
    others, why = able({"local-attention": lambda: forward_backward(partial(local(window), *given), *given)})
    check(mask, [*KERNELS, *others], window, min(length, 2048))
    times = race(training | others, repeats=max(3, repeats // 2) if repeats > 1 else 1, seconds=30)
    what, done = "forward and backward / SDPA causal", share(3.5 * flops, min(times["auto"]))
    result.add(compared(what, times, "auto", "SDPA causal", note=note, share=done, **goal("window training")))
    what = "times faster than local-attention, forward and backward"
    result.add(compared(what, times, "auto", "local-attention", why=why, better="higher"))
    return result


if __name__ == "__main__":
    command(measure, __doc__)
