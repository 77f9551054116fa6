"""Sparse normalisers against the `entmax` package, forward and backward.

python -m benchmarks.normalizers
"""

import torch

from benchmarks.harness import Benchmark, Figure, agree, arguments, compared, finish, forward_backward, race
from regard.normalizers import Entmax, Sparsemax

ROWS, KEYS = 4096, 1024


def main() -> None:
    args = arguments(__doc__)
    result = Benchmark("normalizers", f"Normalising {ROWS} rows of {KEYS} scores, fp32")
    try:
        import entmax
    except ModuleNotFoundError:
        result.add(Figure("entmax 1.5", None, goal=4, better="higher", note="the entmax package is not installed"))
        return finish(result, args)
    torch.manual_seed(0)
    scores = (2 * torch.randn(ROWS, KEYS)).requires_grad_()
    for what, ours, theirs, goal in (
        ("entmax 1.5", lambda x: Entmax()(x, None), lambda x: entmax.entmax15(x, -1), 4),
        ("sparsemax", lambda x: Sparsemax()(x, None), lambda x: entmax.sparsemax(x, -1), None),
    ):
        agree(ours(scores), theirs(scores), within=1e-5)
        contenders = {
            "regard": forward_backward(lambda ours=ours: ours(scores), scores),
            "entmax": forward_backward(lambda theirs=theirs: theirs(scores), scores),
            "softmax": forward_backward(lambda: scores.softmax(-1), scores),
        }
        times = race(contenders, repeats=args.repeats)
        result.add(
            compared(f"{what}: times faster than the package", times, "regard", "entmax", goal=goal, better="higher")
        )
        result.add(compared(f"{what}: against torch's softmax", times, "regard", "softmax"))
    finish(result, args)


if __name__ == "__main__":
    main()
