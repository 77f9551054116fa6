"""regard's own layers: what stood between their projections is worked out again from what they were called with."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.inspect.capture.recorder import Recorder
from regard.inspect.effective import measured_weights, projected, undisturbed
from regard.inspect.layers import LayerTrace, Measured
from regard.kernels import Problem
from regard.kernels.finite import all_finite, cleaned
from regard.kernels.problem import biased_scores, mixed, normalised, rectangle, scored
from regard.masks import dense
from regard.pipeline.head_mixer import HeadMixer
from regard.pipeline.layer import Attention
from regard.pipeline.tokens import quarantine
from regard.slots import IN_KERNELS, SLOTS


def record(recorder: Recorder, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Record one call of a layer that `effective.reads` says yes to."""
    call = dict(zip(("x", "context"), args)) | kwargs
    x, context = call["x"], call.get("context")
    place = recorder.place(recorder.names[module], "self" if context is None else "cross")
    if not recorder.wants(place["index"]):
        return
    with torch.no_grad(), undisturbed(module):
        if isinstance(module, Attention):
            p, *_, bad = module._prepare(x, context, call.get("mask"), call.get("positions"))
            recorder.keep(of_problem(place, replace(p, **_as_given(p.q, p.k, p.v, *bad))))
        elif isinstance(module, HeadMixer):
            recorder.keep(_of_mixer(place, module, x, context, call.get("mask")))


def of_problem(place: dict[str, Any], p: Problem) -> LayerTrace:
    """What a pipeline does with these queries, keys and values."""
    layer = LayerTrace(
        **place,
        q=p.q,
        k=p.k,
        v=p.v,
        scale=p.scale,
        mask=None if p.mask is None else p.mask.at(p.i, p.j),
        bias=p.bias,
    )
    sites = {SLOTS[name].site for name in IN_KERNELS if getattr(p, name) is not None}
    if p.position_bias is None:  # what it adds to outputs is no weight
        sites.discard("position")
    if not sites:
        return layer
    x = None if p.x is None else p.x.clone()  # the model may write into its tokens later
    context = x if p.context is p.x or p.context is None else p.context.clone()
    # The layer's own copies stand in for q, k and v, which would double what is held.
    stages = Stages(replace(p, q=p.q.new_empty(0), k=p.k.new_empty(0), v=p.v.new_empty(0), x=x, context=context))
    return replace(layer, logit_rule=stages.logits, weight_rule=stages.weights if sites & AFTER else None)


AFTER = {"normalise", "weights"}
"""Sites of the stages behind the scores; where none is filled, weights are a softmax of them."""


@dataclass(frozen=True, eq=False)
class Stages:
    """The stages of a pipeline between queries and weights, for a layer's own q, k and v."""

    problem: Problem
    """Its q, k and v tell only their dtype."""

    def logits(self, layer: LayerTrace, heads: Tensor, rows: Tensor) -> Tensor:
        return self._by_runs(layer, heads, rows, self._logits)

    def weights(self, layer: LayerTrace, heads: Tensor, rows: Tensor) -> Tensor:
        return self._by_runs(layer, heads, rows, self._weights)

    def _logits(self, p: Problem, at: slice) -> Tensor:
        part = rectangle(p, at, _all(p))
        scores = biased_scores(p, part, at, _all(p))
        return scores if part.allowed is None else scores.masked_fill(~part.allowed, -torch.inf)

    def _weights(self, p: Problem, at: slice) -> Tensor:
        part = rectangle(p, at, _all(p))
        weights, _ = normalised(p, *scored(p, part, at, _all(p)), at)
        return mixed(p, "weights", weights, part, at, _all(p))

    def _by_runs(
        self, layer: LayerTrace, heads: Tensor, rows: Tensor, run: Callable[[Problem, slice], Tensor]
    ) -> Tensor:
        """Each run of neighbouring rows at once, with the earlier ones that it needs."""
        q, k, v = (z.to(self.problem.q.dtype) for z in (layer.q, layer.k, layer.v))
        p, hit = _cleaned(replace(self.problem, q=q, k=k, v=v, dropout=0.0))
        parts = [q.new_empty(q.shape[0], q.shape[1], 0, k.shape[2], dtype=torch.float32)] * (not len(rows))
        with torch.no_grad():
            for start, stop in _runs(rows):
                first = max(0, start - p.halo)
                parts.append(run(p, slice(first, stop))[:, :, start - first :])
        found = torch.cat(parts, 2)
        if hit is not None:
            found = found.masked_fill(hit.index_select(2, rows)[..., None], torch.nan)
        return found.index_select(1, heads)


def _cleaned(p: Problem) -> tuple[Problem, Tensor | None]:
    """The problem as kernels see it, and which rows (B, H, T) see what is not finite; None where all is."""
    return (p, None) if all(map(all_finite, (p.q, p.k, p.v))) else cleaned(p)


def _all(p: Problem) -> slice:
    return slice(0, p.k.shape[2])


def _runs(rows: Tensor) -> list[tuple[int, int]]:
    numbers = rows.tolist()
    cuts = [n for n in range(len(numbers)) if n == 0 or numbers[n] != numbers[n - 1] + 1]
    return [(numbers[a], numbers[b - 1] + 1) for a, b in zip(cuts, [*cuts[1:], len(numbers)])]


def _of_mixer(place: dict[str, Any], module: HeadMixer, x: Tensor, context: Tensor | None, mask: Any) -> LayerTrace:
    q, k, v, keep = projected(module, x, context, mask)
    T, S = q.shape[2], k.shape[2]
    i, j = torch.arange(S - T, S, device=q.device), torch.arange(S, device=q.device)
    allowed = module.receptive_field().at(i, j)
    if keep is not None:
        allowed = allowed & keep[:, None, None]
    keep = None if keep is None else keep.clone()
    bad = quarantine(x)[1], quarantine(x if context is None else context)[1]

    def measure(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p, hit = _cleaned(Problem(q, k, v, 1.0, mask=dense(allowed)))
        with undisturbed(module):
            weights = measured_weights(lambda values: module.mixed(p.q, p.k, values, keep, alone=context is None), p.v)
        return weights if hit is None else weights.masked_fill(hit[..., None], torch.nan)

    given = place | _as_given(q, k, v, *bad)
    return LayerTrace(**given, scale=1.0, mask=allowed, weight_rule=Measured(measure, q.dtype))


def _as_given(q: Tensor, k: Tensor, v: Tensor, bad: Tensor | None, bad_source: Tensor | None) -> dict[str, Any]:
    """NaN again where a layer put zeros for tokens that held NaN or infinity."""

    def spoilt(z: Tensor, bad: Tensor | None) -> Tensor:
        return z if bad is None else z.masked_fill(bad[:, None, :, None], torch.nan)

    return {"q": spoilt(q, bad), "k": spoilt(k, bad_source), "v": spoilt(v, bad_source)}
