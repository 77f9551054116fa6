"""L1's second oracle: every kernel against the formula, written out in Python floats."""

import math

import pytest
import torch
from torch import Tensor

import regard
from regard import masks
from regard.kernels import KERNELS
from regard.laws.agreement import close, says
from regard.laws.subject import small_tiles


def formula(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v, entry by entry."""
    (n, H, Q, D), (_, G, S, _) = q.shape, k.shape
    out = q.new_zeros(n, H, Q, v.shape[3])
    for b in range(n):
        for h in range(H):
            g = h // (H // G)
            for t in range(Q):
                seen = [s for s in range(S) if allowed is None or allowed[b % len(allowed), h % allowed.shape[1], t, s]]
                logits = [
                    sum(float(q[b, h, t, d]) * float(k[b, g, s, d]) for d in range(D)) / math.sqrt(D)
                    + (0.0 if bias is None else float(bias.expand(n, H, Q, S)[b, h, t, s]))
                    for s in seen
                ]
                top = max(logits, default=0.0)
                total = sum(math.exp(z - top) for z in logits)
                for s, z in zip(seen, logits, strict=True):
                    out[b, h, t] += math.exp(z - top) / total * v[b, g, s]
    return out


def cases() -> dict[str, masks.Mask | None]:
    generator = torch.Generator().manual_seed(0)
    ragged = torch.rand(2, 4, 6, 9, generator=generator) < 0.5
    ragged[0, 1, 2] = False  # a query that may see nothing
    return {
        "none": None,
        "causal": masks.causal(),
        "window": masks.causal() & masks.window(3),
        "padding": masks.padding(lengths=torch.tensor([9, 4])),
        "dense": masks.dense(ragged),
    }


@pytest.mark.parametrize("kernel", [*KERNELS, "auto"])
@pytest.mark.parametrize("case", [*cases()])
def test_kernel_is_the_formula(kernel: str, case: str) -> None:
    """The second oracle: Python floats, written without the pipeline. T != S, grouped keys, V != D."""
    mask = cases()[case]
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, h, n, w, generator=generator, dtype=torch.float64)
        for h, n, w in ((4, 6, 3), (2, 9, 3), (2, 9, 5))
    )
    bias = torch.randn(1, 4, 1, 9, generator=generator, dtype=torch.float64)
    allowed = None if mask is None else mask.dense(6, 9)
    ran = []
    with small_tiles():
        for given in (None, bias):
            try:
                got = regard.attention(q, k, v, mask=mask, bias=given, kernel=kernel)
            except ValueError as error:
                reason = "only plain softmax" if case == "window" else "how far a query sees"
                words = {
                    "block_sparse": "no mask",
                    "window": reason,
                    "neighborhood": "neighborhood",
                    "decode": "not one",
                }
                words |= {
                    "native": "float64",
                    "grouped": "every query chose",
                    "listed": "single keys",
                    "triton": "float64",
                    "flex": "float64",
                    "few": "float64",
                    "paged": "pages of a pool",
                }
                says(error, f"kernel {kernel!r} can't run this", words[kernel])
                continue
            close(got, formula(q, k, v, allowed, given))
            ran.append((case, given is not None))
    never = dict.fromkeys(("few", "paged", "neighborhood", "decode", "native", "grouped", "listed", "triton"), False)
    able = (never | {"block_sparse": case != "none", "window": case == "window"}).get(kernel, True)
    assert len(ran) == able * (1 if kernel == "window" else 2)
