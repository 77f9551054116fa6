"""One query a head against a long cache: two products over keys and values, which fetch each of them once.

    out = softmax(scale q k^T) v

Scores and outputs are small here, and both are finite only if every query, key and value is (0 times NaN is NaN): they
vouch for the inputs, which need not be read once more to know.
"""

import torch
from torch import Tensor

from regard.kernels.cost import Cost, io, products
from regard.kernels.finite import all_finite, honest
from regard.kernels.problem import CAUSAL, Problem, softmax, softmaxed
from regard.kernels.sums import over_keys


def why_not(p: Problem) -> list[str]:
    """It is for decoding in full precision."""
    reasons = []
    if p.q.shape[2] != 1:
        reasons.append(f"{p.q.shape[2]} queries, not one")
    if p.q.dtype not in (torch.float32, torch.float64):
        reasons.append(f"scores would be rounded to {p.q.dtype}")
    if softmaxed(p).stages or p.memory is not None or p.bias is not None or p.dropout:
        reasons.append("it does plain softmax attention: no bias, stages or dropout")
    return reasons


def run(p: Problem) -> Tensor:
    """(B, H, 1, V), honest about NaN by itself."""
    if p.readable:
        scores, out = _attend(p)
        if not p.q.is_cpu or (all_finite(scores) and all_finite(out)):
            return out
    return honest(p, lambda clean: _attend(clean)[1])


def _attend(p: Problem) -> tuple[Tensor, Tensor]:
    """Scores before the mask (B G, H / G, S), and the outputs."""
    B, H, G, _, _ = p.shape
    q = (p.q * p.scale).reshape(B * G, H // G, p.q.shape[3])
    scores = torch.bmm(q, p.k.flatten(0, 1).mT)
    allowed = None
    if p.mask is not None and p.mask != CAUSAL:  # the one query is the last: it sees all keys
        allowed = p.mask.at(p.i, p.j)
    weights = (p.normalizer or softmax)(scores.view(B, H, 1, -1), allowed)
    out = over_keys(weights.reshape(scores.shape), p.v.flatten(0, 1))
    return scores, out.view(B, H, 1, p.v.shape[3])


def cost(p: Problem) -> Cost:
    """Keys and values are read once."""
    return Cost(products(p, p.k.shape[2]), 0, 15, "one query: two products with the cache", io(p), "unfused")
