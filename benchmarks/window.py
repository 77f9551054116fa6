"""A causal window of 512 over 16k tokens, against torch's causal kernel and compiled FlexAttention.

python -m benchmarks.window
"""

import torch
import torch.nn.functional as F

import regard
from benchmarks.harness import Benchmark, Figure, agree, arguments, compared, finish, forward_backward, peak, race
from regard import masks

LENGTH, WINDOW, HEADS = 16384, 512, 4


def flex(q, k, v):
    """Compiled FlexAttention with the same mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    near = (masks.causal() & masks.window(WINDOW)).mask_mod(LENGTH)
    block = create_block_mask(near, None, None, LENGTH, LENGTH, device="cpu")
    run = torch.compile(flex_attention)
    return lambda: run(q, k, v, block_mask=block)


def main() -> None:
    args = arguments(__doc__)
    torch.manual_seed(0)
    result = Benchmark("window", f"A causal window of {WINDOW} at T = {LENGTH}, H = {HEADS}, D = 64, fp32")
    q, k, v = (torch.randn(1, HEADS, LENGTH, 64) for _ in range(3))
    mask = masks.causal() & masks.window(WINDOW)
    rows = slice(LENGTH - 1000, LENGTH)
    allowed = mask.at(torch.arange(LENGTH)[rows], torch.arange(LENGTH))
    want = F.scaled_dot_product_attention(q[:, :, rows], k, v, allowed)
    contenders = {
        name: lambda name=name: regard.attention(q, k, v, mask=mask, kernel=name) for name in ("window", "block_sparse")
    }
    contenders["SDPA causal"] = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    flex_note = ""
    try:
        contenders["flex"] = flex(q, k, v)
        contenders["flex"]()
    except Exception as error:  # the compiler needs a C++ toolchain
        contenders.pop("flex", None)
        flex_note = f"{type(error).__name__}: {str(error).splitlines()[0][:60]}"
    for name in ("window", "block_sparse", *(["flex"] if "flex" in contenders else [])):
        agree(contenders[name]()[:, :, rows], want)
    with torch.no_grad():
        times = race(contenders, repeats=args.repeats)
    done = 4 * HEADS * 64 * mask.count(LENGTH)
    note = f"{done / min(times['window']) / peak():.0%} of the matrix-product peak"
    result.add(compared("window kernel / SDPA causal, forward", times, "window", "SDPA causal", goal=0.10, note=note))
    result.add(compared("block_sparse / SDPA causal, forward", times, "block_sparse", "SDPA causal"))
    if "flex" in times:
        result.add(compared("times faster than FlexAttention", times, "window", "flex", goal=3, better="higher"))
    else:
        result.add(Figure("times faster than FlexAttention", None, goal=3, better="higher", note=flex_note))
    given = [x.clone().requires_grad_() for x in (q, k, v)]
    training = {
        "window": forward_backward(lambda: regard.attention(*given, mask=mask, kernel="window"), *given),
        "SDPA causal": forward_backward(lambda: F.scaled_dot_product_attention(*given, is_causal=True), *given),
    }
    times = race(training, repeats=max(3, args.repeats // 2))
    result.add(compared("window / SDPA causal, forward and backward", times, "window", "SDPA causal"))
    finish(result, args)


if __name__ == "__main__":
    main()
