"""Score biases formed on the fly (ALiBi, KERPLE) against torch's kernel with the bias ready in memory.

    python -m benchmarks.bias

Memory by length is `python -m benchmarks.memory`.
"""

import torch
import torch.nn.functional as F

import regard
from benchmarks.harness import Benchmark, agree, arguments, compared, finish, forward_backward, race
from regard.masks import causal
from regard.positions import Alibi, Kerple

LENGTH, HEADS = 4096, 4


def main() -> None:
    args = arguments(__doc__)
    torch.manual_seed(0)
    result = Benchmark("bias", f"Score biases at T = {LENGTH}, H = {HEADS}, D = 64, fp32, causal")
    q, k, v = (torch.randn(1, HEADS, LENGTH, 64) for _ in range(3))
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    for position in (Alibi(HEADS), Kerple(HEADS)):
        name = type(position).__name__
        from regard.kinds import Rows

        rows = Rows(q=q, k=k, scores=q.new_empty(0), i=i[:, 0], j=j)
        ready = position.bias(rows).detach().masked_fill(j > i, -torch.inf).expand(1, HEADS, LENGTH, LENGTH)
        given = [x.clone().requires_grad_() for x in (q, k, v)]

        def ours(x=(q, k, v), position=position):
            return regard.attention(*x, position=position, mask=causal())

        def theirs(x=(q, k, v), ready=ready):
            return F.scaled_dot_product_attention(*x, ready)

        agree(ours(), theirs())
        with torch.no_grad():
            times = race({"regard": ours, "SDPA + bias": theirs}, repeats=args.repeats)
        result.add(compared(f"{name}, forward", times, "regard", "SDPA + bias", goal=1.3))
        training = {
            "regard": forward_backward(lambda given=given, ours=ours: ours(given), *given),
            "SDPA + bias": forward_backward(lambda given=given, theirs=theirs: theirs(given), *given),
        }
        times = race(training, repeats=max(3, args.repeats // 2))
        result.add(compared(f"{name}, forward and backward", times, "regard", "SDPA + bias", goal=1.3))
    finish(result, args)


if __name__ == "__main__":
    main()
