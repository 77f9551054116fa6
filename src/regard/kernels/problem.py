"""One attention problem as a value: what every kernel is given, checked once before any work is done."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from regard.kernels.pages import Pages
from regard.kernels.sums import over_keys, summed_to_one
from regard.masks import Mask, causal, full
from regard.slots import SLOTS, Filled
from regard.stages import Made, Rows
from regard.tracing import active, readable, transformed


@dataclass(eq=False)
class Problem(Filled):
    """Queries, keys, values and the stages between them; never written into.

    `None` in a slot means the plain softmax pipeline's.
    """

    q: Float[Tensor, "B H T D"]
    k: Float[Tensor, "B G S D"]
    v: Float[Tensor, "B G S V"]
    scale: float
    mask: Mask | None = None
    bias: Float[Tensor, "#B #H #T #S"] | None = None
    dropout: float = 0.0
    x: Float[Tensor, "B T M"] | None = None
    context: Float[Tensor, "B S M"] | None = None
    made: Mapping[str, Made] | None = None
    """Slot -> what the stage in it made of the tokens."""
    positions: Int[Tensor, "*b T"] | None = None
    """Where queries stand in their own sequences, for stages that ask; None where nobody said."""
    first_key: int = 0
    """Position of the first key handed in: > 0 when a cache has dropped older ones."""
    on: str | None = None
    """The kind of device to plan for with tensors that are on none, those on meta."""
    unturned: Float[Tensor, "B H T D"] | None = None
    """The queries before rotation, for a memory; None where they are as `q`."""
    pages: Pages | None = None
    """Where keys and values lie in a pool; `k` and `v` then have their shapes, and hold nothing."""

    @property
    def device_kind(self) -> str:
        """The kind of device that the tensors are on, or are taken to be on."""
        return self.on or self.q.device.type

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """B, H, G, T, S."""
        B, H, T, _ = self.q.shape
        _, G, S, _ = self.k.shape
        return B, H, G, T, S

    @property
    def readable(self) -> bool:
        """Whether there are numbers to look at; see `regard.tracing`."""
        return readable(self.q, self.k, self.v) and not self.transformed

    @property
    def transformed(self) -> bool:
        """Whether torch.func or forward-mode AD works on any of its tensors, those of its stages among them."""
        if not active():
            return False
        if self.pair_mix is not None:  # its function may read any tensor
            return True
        held = [p for stage in self.stages if isinstance(stage, nn.Module) for p in stage.parameters()]
        return transformed(
            *(t for t in (self.q, self.k, self.v, self.bias, self.x, self.context, *held) if t is not None)
        )

    def gathered(self) -> "Problem":
        """The same with keys and values copied together, if they lie in pages."""
        if self.pages is None:
            return self
        k, v = (z.to(self.q.dtype) for z in self.pages.gathered())
        return replace(self, k=k, v=v, pages=None)

    @property
    def i(self) -> Tensor:
        """Query positions: the last query stands where the last key stands."""
        T, S = self.q.shape[2], self.k.shape[2]
        start = self.first_key + S - T
        return torch.arange(start, start + T, device=self.q.device)

    @property
    def j(self) -> Tensor:
        """Key positions."""
        return torch.arange(self.first_key, self.first_key + self.k.shape[2], device=self.q.device)


def without_pairs(p: Problem) -> Problem:
    """The same without what is done to one pair at a time, for kernels that see to it themselves."""
    return p if p.pair_mix is None else replace(p, score_mix=None)


def beyond_softmax(p: Problem) -> list[str]:
    """The stages that no fused softmax kernel can express, in words: other normalisers, mixes, what adds to values."""
    reasons = []
    if p.normalizer is not None and not p.normalizer.is_softmax:
        reasons.append(f"normalizer {type(p.normalizer).__name__} is not softmax")
    if p.score is not None:
        reasons.append(f"score {type(p.score).__name__} is no scaled dot product")
    reasons += [f"{name} {type(mix).__name__} reads the score matrix" for name, mix in p.mixes]
    if p.position_values is not None:
        reasons.append(f"position {type(p.position).__name__} adds to the values")
    if p.memory is not None:
        reasons.append(f"memory {type(p.memory).__name__} is merged by log-sum-exps, which it does not tell")
    return reasons


def softmaxed(p: Problem) -> Problem:
    """The same with softmax in place of a normaliser that only scales its rows, and no memory; see `scaled`."""
    p = p if p.memory is None else replace(p, memory=None)
    return replace(p, normalizer=None) if p.normalizer is not None and p.normalizer.scales_softmax() else p


def scaled(p: Problem, out: Float[Tensor, "B H T V"], lse: Float[Tensor, "B H T"]) -> Float[Tensor, "B H T V"]:
    """What comes of softmax's outputs and log-sum-exp under the problem's own normaliser and memory."""
    if p.memory is not None:
        keep, remembered = beside_memory(p, lse, slice(0, p.q.shape[2]))
        return (out * keep[..., None] + remembered).to(out.dtype)
    return out if p.normalizer is None else (out * p.normalizer.share(lse)[..., None]).to(out.dtype)


def beside_memory(
    p: Problem, lse: Float[Tensor, "B H t"], at: slice
) -> tuple[Float[Tensor, "B H t"], Float[Tensor, "B H t V"]]:
    """How much a memory leaves of softmax's weights in rows `at`, whose log-sum-exp is given, and what it adds to their
    outputs: softmax over all keys is that over each of two sets, weighted by its sum of exponentials."""
    assert p.memory is not None
    q = (p.q if p.unturned is None else p.unturned)[:, :, at]
    k, v = (z[None].expand(q.shape[0], -1, -1, -1) for z in p.memory())
    scores = dots(q, k) * p.scale
    if p.cap is not None:
        scores = p.cap * (scores / p.cap).tanh()
    least = torch.finfo(scores.dtype).min  # of a memory without keys; beside a row that sees nothing -inf would be NaN
    weights, own = scores.softmax(-1), scores.logsumexp(-1).clamp(min=least)
    if p.dropout:
        weights = torch.nn.functional.dropout(weights, p.dropout)
    lse = lse.to(own.dtype)
    keep, taken = torch.sigmoid(lse - own), torch.sigmoid(own - lse)
    if p.normalizer is not None:
        share = p.normalizer.share(torch.logaddexp(lse, own))
        keep, taken = keep * share, taken * share
    return keep, combine(weights * taken[..., None], v)


def uncapped(p: Problem) -> Problem:
    """The same without a soft cap, for kernels that see to it themselves."""
    return p if p.cap is None else replace(p, score_mix=None)


Keys = slice | Tensor

CAUSAL, FULL = causal(), full()


def rectangle(p: Problem, rows: slice, keys: Keys, *, scored: bool = True) -> Rows:
    """The stages' view of query rows `rows` against keys `keys`; `scored=False` where no stage reads the scores."""
    q, k = p.q[:, :, rows], p.k[:, :, keys]
    i, j = p.i[rows], p.j[keys]
    allowed = None if p.mask is None else p.mask.at(i, j)
    return Rows(
        q=q,
        k=k,
        scores=dots(q, k) * p.scale if scored and _dotted(p) else q.new_empty(0),
        i=i,
        j=j,
        allowed=allowed,
        x=None if p.x is None else p.x[:, rows],
        context=None if p.context is None else p.context[:, keys],
        positions=None if p.positions is None else p.positions[..., rows],
    )


def _dotted(p: Problem) -> bool:
    """Whether anybody reads the dot products."""
    return p.score is None or any("scores" in stage.needs for stage in p.stages)


def told(p: Problem, rows: Rows, slot: str, at: slice, keys: Keys) -> Rows:
    """The same rows with what the stage in `slot` made of the tokens, cut to them."""
    made = None if p.made is None else p.made.get(slot)
    if made is None:
        return rows
    query = None if made.query is None else made.query[:, :, at]
    key = None if made.key is None else made.key[:, :, keys]
    return replace(rows, made=Made(query, key, made.whole))


def position_bias(p: Problem, rows: Rows, at: slice, keys: Keys) -> Float[Tensor, "#B #H t s"]:
    """What the position adds to the scores of these rows; there must be one that does."""
    assert p.position_bias is not None
    return p.position_bias.bias(told(p, rows, "position", at, keys))


def biased_scores(p: Problem, rows: Rows, at: slice, keys: Keys) -> Float[Tensor, "B H t s"]:
    """Scores after position bias, tensor bias and score mixing."""
    scores = rows.scores if p.score is None else p.score(told(p, rows, "score", at, keys), p.scale)
    if p.position_bias is not None:
        scores = scores + position_bias(p, rows, at, keys)
    if p.bias is not None:
        bias = p.bias if p.bias.shape[2] == 1 else p.bias[:, :, at]
        scores = scores + (bias if bias.shape[3] == 1 else bias[..., keys])
    return mixed(p, "scores", scores, rows, at, keys)


def scored(p: Problem, rows: Rows, at: slice, keys: Keys) -> tuple[Float[Tensor, "B H t s"], Tensor | None]:
    """The same, and which of them may be attended to: not those either to which a mix of pairs gives -inf."""
    scores = biased_scores(p, rows, at, keys)
    if p.pair_mix is None:
        return scores, rows.allowed
    gone = scores.detach() == -math.inf
    return scores.masked_fill(gone, 0.0), ~gone if rows.allowed is None else rows.allowed & ~gone


def mixed(p: Problem, site: str, z: Tensor, rows: Rows, at: slice, keys: Keys) -> Float[Tensor, "B H t s"]:
    """Scores or weights after the mixes at that site, in the order of the slots."""
    for slot, mix in p.mixes:
        if SLOTS[slot].site == site:
            z = mix(z, told(p, rows, slot, at, keys))
    return z


def attend(p: Problem, rows: slice, keys: Keys) -> Float[Tensor, "B H t V"]:
    """Outputs of query rows `rows`, given that they may attend to no key outside `keys`. The whole pipeline."""
    if p.k[:, :, keys].shape[2] == 0:  # as everywhere where there is no key: zeros, whatever stages make of nothing
        none = nothing(p, *p.q[:, :, rows].shape[:3], p.v.shape[3])
        unseen = none.new_full(none.shape[:3], -math.inf)
        return none if p.memory is None else (none + beside_memory(p, unseen, rows)[1]).to(none.dtype)
    first = max(0, rows.start - p.halo)
    at = slice(first, rows.stop)
    part = rectangle(p, at, keys)
    scores, allowed = scored(p, part, at, keys)
    weights, remembered = normalised(p, scores, allowed, at)
    weights = mixed(p, "weights", weights, part, at, keys)
    if p.dropout:
        weights = torch.nn.functional.dropout(weights, p.dropout)
    out = combine(weights, p.v[:, :, keys])
    if p.position_values is not None:
        out = out + p.position_values.values(weights, told(p, part, "position", at, keys))
    if remembered is not None:
        out = out + remembered
    return out[:, :, rows.start - first :].to(p.v.dtype)


def normalised(
    p: Problem, scores: Float[Tensor, "B H t s"], allowed: Tensor | None, at: slice
) -> tuple[Float[Tensor, "B H t s"], Float[Tensor, "B H t V"] | None]:
    """Weights of the keys of rows `at`, and what a memory adds to their outputs."""
    if p.memory is None:
        return (p.normalizer or softmax)(scores, allowed), None
    keep, remembered = beside_memory(p, _log_sum(scores, allowed), at)
    return softmax(scores, allowed) * keep[..., None], remembered


def log_sums(p: Problem) -> Float[Tensor, "B H T"]:
    """log sum_j exp(score) of each row over what it sees, from the whole score matrix; -inf where that is nothing."""
    rows, keys = slice(0, p.q.shape[2]), slice(0, p.k.shape[2])
    part = rectangle(p, rows, keys)
    return _log_sum(biased_scores(p, part, rows, keys), part.allowed)


def _log_sum(scores: Float[Tensor, "B H t s"], allowed: Tensor | None) -> Float[Tensor, "B H t"]:
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    empty = scores.detach().amax(-1, keepdim=True) == -math.inf  # exp(-inf - -inf) would be NaN
    return scores.masked_fill(empty, 0).logsumexp(-1).masked_fill(empty[..., 0], -math.inf)


def nothing(p: Problem, *shape: int) -> Tensor:
    """Zeros with a graph behind them, so that gradients are zero and not missing."""
    # Sums of nothing: sums of all could overflow, and 0 * inf is NaN.
    return p.q.new_zeros(shape) + sum(t[..., :0].sum() for t in (p.q, p.k, p.v))


def softmax(scores: Float[Tensor, "B H t S"], allowed: Tensor | None) -> Float[Tensor, "B H t S"]:
    """Softmax over the allowed keys in at least fp32; a row that may see nothing is 0, with zero gradient."""
    if scores.shape[-1] == 0:
        return scores
    if allowed is None:
        return summed_to_one(scores.softmax(-1))
    alive = allowed.any(-1, keepdim=True)
    weights = summed_to_one(scores.masked_fill(~allowed & alive, -math.inf).softmax(-1))
    return torch.where(alive, weights, weights.new_zeros(()))


def by_rows(p: Problem, run: Callable[[slice], Tensor], rows: int) -> Tensor:
    """`run` on about `rows` query rows at a time, each chunk computed again in backward instead of kept."""
    T = p.q.shape[2]
    size = chunk_rows(T, rows)
    if size >= T:
        return run(slice(0, T))
    chunks = [slice(start, min(start + size, T)) for start in range(0, T, size)]
    if not torch.is_grad_enabled() or p.transformed:  # torch.func knows no checkpoints
        return torch.cat([run(chunk) for chunk in chunks], 2)
    # Dropout is the only randomness; without it there is no generator state worth saving.
    outs = [checkpoint(run, c, use_reentrant=False, preserve_rng_state=p.dropout > 0) for c in chunks]
    return torch.cat(outs, 2)


def chunk_rows(T: int, rows: int) -> int:
    """How many rows at a time `by_rows` takes where about `rows` are wanted."""
    return min(max(1, T), max(16, min(1024, rows)))


def key_range(p: Problem, rows: slice) -> slice:
    """The keys that these rows may reach at all, as the mask's bounds tell."""
    S = p.k.shape[2]
    if p.mask is None:
        return slice(0, S)
    offset = S - p.q.shape[2]  # both counted from the first key handed in
    first, last = max(0, rows.start - p.halo) + offset, rows.stop - 1 + offset
    back, ahead = p.mask.span
    start = 0 if back == math.inf else min(S, max(0, first - int(back)))
    stop = S if ahead == math.inf else max(start, min(S, last + int(ahead) + 1))
    return slice(start, stop)


def dots(q: Float[Tensor, "B H t D"], k: Float[Tensor, "B G s D"]) -> Float[Tensor, "B H t s"]:
    """q . k of each query head with its key head, in at least fp32, without repeating keys."""
    B, H, t, D = q.shape
    G = k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    return (q.to(wide).reshape(B, G, H // G * t, D) @ k.to(wide).mT).view(B, H, t, k.shape[2])


def combine(weights: Float[Tensor, "B H t s"], v: Float[Tensor, "B G s V"]) -> Float[Tensor, "B H t V"]:
    """Weights times values of each head's group."""
    B, H, t, s = weights.shape
    G = v.shape[1]
    return over_keys(weights.reshape(B, G, H // G * t, s), v.to(weights.dtype)).view(B, H, t, v.shape[3])
