"""The flows of Flow-Attention and what conservation makes of them, at once or one token after another.

The equation is on the card, in `flow.py`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from regard.checks import checked
from regard.kernels.check import check_inputs
from regard.kernels.linear_scan import linear_scan
from regard.kernels.sums import over_keys
from regard.linear._shared import repeat_heads
from regard.normalizers.softmax import softmax


class FlowState(NamedTuple):
    """All that earlier tokens leave behind: sums over them, whose size does not grow."""

    tokens: Float[Tensor, "B 1 1 1"]
    """How many there were."""
    keys: Float[Tensor, "B H 1 D"]
    queries: Float[Tensor, "B H 1 D"]
    refined_keys: Float[Tensor, "B H 1 D"]
    """Sum of k_j / O_j."""
    refined_queries: Float[Tensor, "B H 1 D"]
    """Sum of q_i / I_i."""
    competition: Float[Tensor, "B H 1 1"]
    """Sum of exp(Oh_j)."""
    context: Float[Tensor, "B H D V"]
    """Sum of k_j (c_j v_j)^T."""


def flow_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    *,
    keep: Bool[Tensor, "B S"] | None = None,
    query_keep: Bool[Tensor, "B T"] | None = None,
    bound: float = 1.0,
    eps: float = 1e-6,
) -> Float[Tensor, "B H T V"]:
    """Every sink sees every source. `keep` is True at real sources, `query_keep` at real sinks; the rest adds nothing.

    Oh has mean T / S: where T > S the default bound of 1 makes most sources equal.
    """
    sinks, sources, values = _flows(q, k, v, keep, query_keep)
    n_sources, n_sinks = _count(keep, k.shape[2]), _count(query_keep, q.shape[2])
    incoming = _through(sinks, sources.sum(2, keepdim=True), eps)
    outgoing = _through(sources, sinks.sum(2, keepdim=True), eps)
    refined_in = _through(sinks, (sources / outgoing).sum(2, keepdim=True), eps)
    refined_out = _through(sources, (sinks / incoming).sum(2, keepdim=True), eps).clamp(-bound, bound)
    competition = n_sources * softmax(refined_out.mT, None if keep is None else keep[:, None, None]).mT
    allocation = torch.sigmoid(refined_in * n_sinks / n_sources)
    return (allocation * ((sinks / incoming) @ over_keys(sources.mT, competition * values))).to(v.dtype)


@checked()
def causal_flow_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G T D"],
    v: Float[Tensor, "B G T V"],
    *,
    keep: Bool[Tensor, "B T"] | None = None,
    state: FlowState | None = None,
    bound: float = 1.0,
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "B H T V"], FlowState]:
    """No sink sees a later source. Hand `state` back in to go on with a sequence."""
    sinks, sources, values = _flows(q, k, v, keep, keep)
    old = flow_state(sinks, values) if state is None else state
    one = sinks.new_ones(1, 1, q.shape[2], 1) if keep is None else keep[:, None, :, None].to(sinks.dtype)
    so_far = old.tokens + one.cumsum(2)
    n = so_far.clamp(min=1)
    keys, queries = old.keys + sources.cumsum(2), old.queries + sinks.cumsum(2)
    incoming, outgoing = _through(sinks, keys, eps) / n, _through(sources, queries, eps) / n
    refined_keys = old.refined_keys + (sources / outgoing).cumsum(2)
    refined_queries = old.refined_queries + (sinks / incoming).cumsum(2)
    refined_in = _through(sinks, refined_keys, eps) / n
    strength = one * torch.exp((_through(sources, refined_queries, eps) / n).clamp(-bound, bound))
    total = old.competition + strength.cumsum(2)
    # Only in front of the first real token is there nothing to compete with.
    competition = n * strength / torch.where(total > 0, total, 1.0)
    moved, context = linear_scan(sinks / (incoming * n), sources, competition * values, state=old.context)
    out = (torch.sigmoid(refined_in) * moved).to(v.dtype)
    if q.shape[2] == 0:
        return out, old

    def last(sums: Tensor) -> Tensor:
        return sums[:, :, -1:].clone()  # a view would keep the sums at all tokens alive

    sums = (so_far, keys, queries, refined_keys, refined_queries, total)
    return out, FlowState._make([*map(last, sums), context])


def flow_state(sinks: Float[Tensor, "B H T D"], values: Float[Tensor, "B H T V"]) -> FlowState:
    """The sums over no tokens."""
    (B, H, _, D), V = sinks.shape, values.shape[3]
    one, each, matrix = (sinks.new_zeros(shape) for shape in ((B, 1, 1, 1), (B, H, 1, D), (B, H, D, V)))
    return FlowState(one, each, each, each, each, each[..., :1], matrix)


def _flows(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, query_keep: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """sigmoid(q), sigmoid(k) and v in at least fp32, one source head for every sink head, zero at hidden tokens."""
    check_inputs(q, k, v)
    wide = torch.promote_types(v.dtype, torch.float32)
    sinks = torch.sigmoid(q.to(wide))
    sources, values = (repeat_heads(z.to(wide), q.shape[1]) for z in (k, v))
    sources = torch.sigmoid(sources)
    if query_keep is not None:
        sinks = sinks.masked_fill(~query_keep[:, None, :, None], 0)
    if keep is not None:
        sources, values = (z.masked_fill(~keep[:, None, :, None], 0) for z in (sources, values))
    return sinks, sources, values


def _through(nodes: Float[Tensor, "B H t D"], total: Float[Tensor, "B H #t D"], eps: float) -> Float[Tensor, "B H t 1"]:
    """The flow through each node, given the sum of all nodes that it is joined to."""
    return ((nodes + eps) * (total + eps)).sum(-1, keepdim=True)


def _count(keep: Bool[Tensor, "B n"] | None, n: int) -> Tensor | int:
    """How many are real, at least 1."""
    return max(n, 1) if keep is None else keep.sum(1).clamp(min=1)[:, None, None, None]
