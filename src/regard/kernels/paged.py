"""One query a head against keys and values in pages of a pool, each read once where it lies.

    out = softmax(scale q k^T) v,    k[n] = pages[table[n // page], n % page]

Kwon et al. 2023, PagedAttention (https://arxiv.org/abs/2309.06180): a block table says where a sequence's pages lie.
The paper's text was not to be had; what a block table means is as in flash-attention's documentation. For every other
kernel the keys are gathered first.
"""

import torch
from torch import Tensor

from regard.kernels import decode
from regard.kernels.cost import Cost, io, products
from regard.kernels.finite import honest
from regard.kernels.native import build
from regard.kernels.native.paged import attend
from regard.kernels.problem import CAUSAL, Problem


def why_not(p: Problem) -> list[str]:
    """Plain softmax attention of one query on a CPU, in fp32."""
    if p.pages is None:
        return ["keys and values don't lie in pages of a pool"]
    reasons = []
    if p.q.shape[2] != 1:
        reasons.append(f"{p.q.shape[2]} queries, not one")
    if p.device_kind != "cpu" or not build.readable(p.q):
        reasons.append("it reads the CPU's memory: no other device, no tensor subclass, no torch.func or torch.compile")
    if {p.q.dtype, p.pages.k.dtype} != {torch.float32}:
        reasons.append(f"queries are {p.q.dtype} and pages {p.pages.k.dtype}, not float32")
    if p.stages or p.bias is not None or p.dropout:
        reasons.append("it does plain softmax attention: no bias, stages or dropout")
    if p.q.requires_grad and torch.is_grad_enabled():
        reasons.append("queries want a gradient, which it can't give")
    return reasons or build.why_not()


def cost(p: Problem) -> Cost:
    """Keys and values are read once."""
    return Cost(products(p, p.k.shape[2]), 0, 5, "C++, pages read where they lie", io(p), "native")


def run(p: Problem) -> Tensor:
    """(B, H, 1, V), honest about NaN by itself: scores and outputs are finite only if all that is seen is."""
    assert p.pages is not None
    allowed = None if p.mask is None or p.mask == CAUSAL else p.mask.at(p.i, p.j)
    out, odd = attend(p.q, p.pages, p.scale, allowed)
    return honest(p.gathered(), lambda clean: decode.run(clean)) if odd else out
