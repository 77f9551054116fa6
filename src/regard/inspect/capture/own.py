"""regard's own layers: what stood between their projections is worked out again from what they were called with."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from regard.inspect.capture.recorder import Recorder
from regard.inspect.effective import Values, measured_weights, undisturbed
from regard.inspect.layers import LayerTrace, Measured
from regard.kernels import Problem, execute
from regard.kernels.problem import biased_scores, rectangle, softmax
from regard.masks import Mask
from regard.pipeline.head_mixer import HeadMixer
from regard.pipeline.layer import Attention
from regard.pipeline.tokens import key_padding, quarantine


def reads(module: nn.Module) -> bool:
    """Whether the module is a layer whose forward is the one that this file knows."""
    kind = type(module)
    return (isinstance(module, Attention) and kind.forward is Attention.forward) or (
        isinstance(module, HeadMixer) and kind.forward is HeadMixer.forward
    )


def values_of(
    layer: nn.Module, x: Tensor, context: Tensor | None = None, *, mask: Mask | Tensor | None = None
) -> tuple[Values, Tensor]:
    """The layer as a function of its values, and the values that it computes itself."""
    if isinstance(layer, Attention) and reads(layer):
        p = layer._prepare(x, context, mask, None)[0]
        return lambda v: execute(replace(p, v=v), layer.kernel), p.v
    if isinstance(layer, HeadMixer) and reads(layer):
        q, k, v, keep = _split(layer, x, context, mask)
        return lambda values: layer.mix(q, k, values, keep), v
    raise TypeError(
        f"effective_weights: {type(layer).__name__} is no layer of queries, keys and values that regard knows; "
        "wrap it as a function of its values and use regard.inspect.effective.measured_weights"
    )


def record(recorder: Recorder, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Record one call of a layer that `reads` says yes to."""
    call = dict(zip(("x", "context"), args)) | kwargs
    x, context = call["x"], call.get("context")
    place = recorder.place(recorder.names[module], "self" if context is None else "cross")
    if not recorder.wants(place["index"]):
        return
    with torch.no_grad(), undisturbed(module):
        if isinstance(module, Attention):
            recorder.keep(_of_pipeline(place, module, x, context, call.get("mask"), call.get("positions")))
        elif isinstance(module, HeadMixer):
            recorder.keep(_of_mixer(place, module, x, context, call.get("mask")))


def _of_pipeline(
    place: dict[str, Any], module: Attention, x: Tensor, context: Tensor | None, mask: Any, positions: Tensor | None
) -> LayerTrace:
    return of_problem(place, module._prepare(x, context, mask, positions)[0])


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
    if p.position_bias is None and p.score_mix is None and p.normalizer is None and p.weight_mix is None:
        return layer
    # The layer's own copies stand in for these, which would double what is held.
    stages = Stages(replace(p, q=p.q.new_empty(0), k=p.k.new_empty(0), v=p.v.new_empty(0)))
    softmax = p.normalizer is None and p.weight_mix is None
    return replace(layer, logit_rule=stages.logits, weight_rule=None if softmax else stages.weights)


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
        weights = (p.normalizer or softmax)(biased_scores(p, part, at, _all(p)), part.allowed)
        return weights if p.weight_mix is None else p.weight_mix(weights, part)

    def _by_runs(
        self, layer: LayerTrace, heads: Tensor, rows: Tensor, run: Callable[[Problem, slice], Tensor]
    ) -> Tensor:
        """Each run of neighbouring rows at once, with the earlier ones that it needs."""
        q, k, v = (z.to(self.problem.q.dtype) for z in (layer.q, layer.k, layer.v))
        p = replace(self.problem, q=q, k=k, v=v, dropout=0.0)
        parts = [q.new_empty(q.shape[0], q.shape[1], 0, k.shape[2], dtype=torch.float32)] * (not len(rows))
        with torch.no_grad():
            for start, stop in _runs(rows):
                first = max(0, start - p.halo)
                parts.append(run(p, slice(first, stop))[:, :, start - first :])
        return torch.cat(parts, 2).index_select(1, heads)


def _all(p: Problem) -> slice:
    return slice(0, p.k.shape[2])


def _runs(rows: Tensor) -> list[tuple[int, int]]:
    numbers = rows.tolist()
    cuts = [n for n in range(len(numbers)) if n == 0 or numbers[n] != numbers[n - 1] + 1]
    return [(numbers[a], numbers[b - 1] + 1) for a, b in zip(cuts, [*cuts[1:], len(numbers)])]


def _of_mixer(place: dict[str, Any], module: HeadMixer, x: Tensor, context: Tensor | None, mask: Any) -> LayerTrace:
    q, k, v, keep = _split(module, x, context, mask)
    T, S = q.shape[2], k.shape[2]
    i, j = torch.arange(S - T, S, device=q.device), torch.arange(S, device=q.device)
    allowed = module.receptive_field().at(i, j)
    if keep is not None:
        allowed = allowed & keep[:, None, None]
    keep = None if keep is None else keep.clone()

    def measure(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with undisturbed(module):
            return measured_weights(lambda values: module.mix(q, k, values, keep), v)

    return LayerTrace(**place, q=q, k=k, v=v, scale=1.0, mask=allowed, weight_rule=Measured(measure, q.dtype))


def _split(
    module: HeadMixer, x: Tensor, context: Tensor | None, mask: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys, values and which keys are real, as the mixer's forward makes them."""
    source = x if context is None else context
    keep = key_padding(module._who, mask, source)
    return (*module.split(quarantine(x)[0], quarantine(source)[0]), keep)
