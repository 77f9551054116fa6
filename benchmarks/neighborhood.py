"""Neighborhood attention against torch's dense attention with the same mask, and against natten where it is installed.

    python -m benchmarks.neighborhood [--sizes 56 56] [--window 7] [--dilation 1] [--stride 1] [--heads 4] [--width 32]
                                      [--batch 1] [--threads 1] [--repeats 5] [--json out.json]

Outputs (and gradients) are compared before anything is timed. The ways take turns, and the fastest of their repeats
counts, so that other work on the machine disturbs all alike. The dense mask is made beforehand; ours is made anew in
every call.
"""

import argparse
import json
import math
import platform
import time
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from regard import masks
from regard.vision import neighborhood_attention

Way = Callable[[Tensor, Tensor, Tensor], Tensor]


def natten(options: dict[str, int], axes: int) -> Way | None:
    """natten's own function, heads last; None where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import natten  # type: ignore[import-not-found]
    except ImportError:
        return None
    function = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[axes]
    named = {"kernel_size": options["window"], "dilation": options["dilation"], "stride": options["stride"]}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(*(z.movedim(1, -2).contiguous() for z in (q, k, v)), **named).movedim(-2, 1)

    return run


def timed(run: Callable[[], object]) -> float:
    """Milliseconds."""
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def step(way: Way, given: list[Tensor], *, train: bool) -> list[Tensor]:
    """The output, and in training the gradients of its sum."""
    if not train:
        with torch.no_grad():
            return [way(*given)]
    leaves = [z.detach().requires_grad_() for z in given]
    out = way(*leaves)
    return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[56, 56])
    for name, default in (("window", 7), ("dilation", 1), ("stride", 1), ("heads", 4), ("width", 32), ("batch", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sizes, N = tuple(args.sizes), math.prod(args.sizes)
    options = {"window": args.window, "dilation": args.dilation, "stride": args.stride}
    given = [torch.randn(args.batch, args.heads, *sizes, args.width) for _ in range(3)]
    allowed = masks.neighborhood(sizes, **options).dense(N)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat_q, flat_k, flat_v = (z.flatten(2, -2) for z in (q, k, v))
        return F.scaled_dot_product_attention(flat_q, flat_k, flat_v, attn_mask=allowed).unflatten(2, sizes)

    ways: dict[str, Way] = {"regard": lambda q, k, v: neighborhood_attention(q, k, v, **options), "SDPA, mask": dense}
    theirs = natten(options, len(sizes))
    if theirs is None:
        print("natten is not installed; pip install natten to compare with it")
    else:
        ways["natten"] = theirs
    density = allowed.float().mean()
    print(f"{sizes}, {options}, B {args.batch}, H {args.heads}, D {args.width}, fp32, {args.threads} thread(s)")
    print(f"{density:.2%} of all pairs; torch {torch.__version__}, {platform.machine()}")
    rows = []
    for train in (False, True):
        want = step(ways["SDPA, mask"], given, train=train)
        able = {}
        for name, way in ways.items():
            try:
                got = step(way, given, train=train)
            except (RuntimeError, NotImplementedError, ValueError) as error:
                print(f"{name}, {'training' if train else 'inference'}: {str(error).splitlines()[0][:90]}")
                continue
            for g, w in zip(got, want, strict=True):
                torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4)
            able[name] = way
        times: dict[str, list[float]] = {name: [] for name in able}
        for _ in range(args.repeats):
            for name, way in able.items():
                times[name].append(timed(lambda way=way, train=train: step(way, given, train=train)))  # type: ignore[misc]
        for name, taken in times.items():
            ratio = min(taken) / min(times["regard"])
            print(f"{'training' if train else 'inference':10} {name:12} {min(taken):10.1f} ms {ratio:8.2f} x regard")
            rows.append({"train": train, "way": name, "ms": min(taken), "of_regard": ratio})
    if args.json:
        with open(args.json, "w") as file:
            json.dump(vars(args) | {"torch": torch.__version__, "rows": rows}, file)


if __name__ == "__main__":
    main()
