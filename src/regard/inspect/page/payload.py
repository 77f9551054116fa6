"""A trace as the page reads it: facts as JSON; maps, vectors and pictures as named chunks of base64."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from regard.checks import refuse
from regard.inspect import analyses
from regard.inspect.layers import LayerTrace
from regard.inspect.page import embedding, labels, pack
from regard.inspect.page.table import columns, table
from regard.inspect.traced import Traced

THUMBNAIL = 48
"""Points of a thumbnail's side."""
POINTS = 600
"""Queries, and as many keys, that a head's embedding shows at most."""
VECTORS = 0.3
"""Which part of the limit queries and keys may take; maps have the rest."""

Chunks = dict[str, str]
Facts = dict[str, Any]


def payload(
    trace: Traced, key: str, *, maps: Mapping[str, Float[Tensor, "B T S"]], planes: Sequence[str], limit: int
) -> tuple[Facts, Chunks]:
    """The facts of one trace, and its chunks, whose names begin with `key`.

    `maps` are further maps to paint on the text, by name; `limit` is in bytes of text.
    """
    chunks: Chunks = {}
    found = labels.lists(trace)
    batch = max(layer.shape[0] for layer in trace.layers)
    sample = trace.layers[len(trace.layers) // 2].weights(heads=0)[0].detach().float().cpu()
    shapes = [layer.shape[1:] for layer in trace.layers]
    plan = pack.plan(shapes, batch=batch, sample=sample, limit=int((1 - VECTORS) * limit))
    layers, means = [], []
    masks: dict[str, str] = {}
    for number, layer in enumerate(trace.layers):
        queries, keys = labels.named(trace, layer, found)
        facts, mean = _layer(layer, f"{key}-{number}", plan, chunks)
        seen = _mask(layer, f"{key}-{number}", plan, chunks, masks)
        layers.append(facts | {"queries": queries, "keys": keys, "mask": seen})
        means.append(mean)
    return {
        "model": labels.label(trace.model),
        "tokens": found,
        "batch": batch,
        "rows": plan.rows,
        "pool": plan.pool,
        "top": plan.top,
        "layers": layers,
        "vectors": _vectors(trace, key, plan, chunks, VECTORS * limit),
        "columns": columns(),
        "table": table(trace),
        "planes": _embedding(trace, key, planes, chunks),
        "paint": _paint(trace, key, plan, means, maps, chunks),
        "picture": _pictures(trace, key, plan, chunks),
    }, chunks


def _layer(layer: LayerTrace, key: str, plan: pack.Plan, chunks: Chunks) -> tuple[Facts, Float[Tensor, "B T S"]]:
    """Packs one layer's maps, a head at a time; also their mean over heads."""
    B, H, T, S = layer.shape
    rows = min(B, plan.rows)
    thumbs, signed, lost = [], [], []
    mean = torch.zeros(B, T, S)
    for head in range(H):
        weights = layer.weights(heads=head)[:, 0].detach().float().cpu()
        signed.append(bool((weights < 0).any()))
        lost.append(int((~weights.isfinite()).any(-1).sum()))
        mean += weights / H
        thumbs.append(pack.thumbnails(weights[:rows], THUMBNAIL))
        for row in range(rows):
            chunks[f"{key}-{head}-{row}"] = pack.packed(weights[row], plan, signed=signed[-1])
    pictures = torch.stack(thumbs, 1)
    for row in range(rows):
        chunks[f"{key}-thumbs-{row}"] = pack.compressed(pictures[row].contiguous().numpy().tobytes())
    facts = {
        "name": labels.label(layer.name),
        "index": layer.index,
        "kind": layer.kind,
        "side": layer.side,
        "batch": B,
        "heads": list(layer.heads) or list(range(H)),
        "keyHeads": layer.k.shape[1],
        "shape": [H, -(-T // plan.pool), -(-S // plan.pool)],
        "thumb": list(pictures.shape[-2:]),
        "signed": signed,
        "lost": lost,
        "scored": layer.has_logits and layer.logit_rule is None,
        "scale": float(layer.scale),
        "extras": _extras(layer),
    }
    return facts, mean


def _extras(layer: LayerTrace) -> list[str]:
    """What else than the scaled dot product and the mask decides this layer's weights."""
    named = {
        "a soft cap on the scores": layer.softcap,
        "a bias added to the scores": layer.bias,
        "a sink that takes its share of every row": layer.sinks,
        "weights that are no softmax of the scores": layer.weight_rule,
    }
    return [words for words, value in named.items() if value is not None]


def _mask(layer: LayerTrace, key: str, plan: pack.Plan, chunks: Chunks, known: dict[str, str]) -> Facts | None:
    """Packs which keys may be seen, once for all layers that agree; names the chunk of each batch row."""
    if layer.mask is None or plan.pool > 1:
        return None
    names = []
    for row in range(min(layer.shape[0], plan.rows)):
        mask = layer.mask[row if len(layer.mask) > 1 else 0].expand(-1, *layer.shape[2:])
        text = pack.bits(mask.cpu().contiguous())
        names.append(known.setdefault(text, f"{key}-mask-{row}"))
        chunks[names[-1]] = text
    return {"heads": layer.mask.shape[1], "chunks": names}


def _vectors(trace: Traced, key: str, plan: pack.Plan, chunks: Chunks, limit: float) -> int:
    """Packs queries and keys; for how many batch rows they fit."""
    scored = [(n, x) for n, x in enumerate(trace.layers) if x.has_logits and x.logit_rule is None]
    size = sum((x.q[0].numel() + x.k[0].numel()) * 4 / 3 for _, x in scored)
    if plan.pool > 1 or not scored:
        return 0
    rows = min(plan.rows, int(limit / max(1.0, size)))
    for number, layer in scored:
        for name, tensor in (("q", layer.q), ("k", layer.k)):
            for row in range(min(rows, len(tensor))):
                for head in range(tensor.shape[1]):
                    chunks[f"{key}-{number}-{name}-{head}-{row}"] = pack.vectors(tensor[row, head].detach().cpu())
    return rows


def _embedding(trace: Traced, key: str, planes: Sequence[str], chunks: Chunks) -> dict[str, list[Facts | None]]:
    """For each plane and layer, which queries and keys its points are: [batch row, token] each."""
    made: dict[str, list[Facts | None]] = {plane: [] for plane in planes}
    for number, layer in enumerate(trace.layers):
        if not layer.has_logits or min(layer.q.shape[-1], *layer.shape) < 1:
            for plane in planes:
                made[plane].append(None)
            continue
        queries, keys = embedding.visible(layer)
        places = [embedding.spread(x, POINTS) for x in (queries, keys)]
        for plane in planes:
            near = []
            for head in range(layer.shape[1]):
                flat, agreement = embedding.flat(layer, head, *places, plane=plane)
                chunks[f"{key}-{number}-{plane}-{head}"] = pack.compressed(flat.numpy().astype("<u2").tobytes())
                near.append(round(agreement, 3))
            made[plane].append({"queries": places[0].tolist(), "keys": places[1].tolist(), "agreement": near})
    return made


def _paint(
    trace: Traced,
    key: str,
    plan: pack.Plan,
    means: Sequence[Float[Tensor, "B T S"]],
    maps: Mapping[str, Float[Tensor, "B T S"]],
    chunks: Chunks,
) -> list[Facts]:
    """Packs the rollout of each stack that attends to itself, and the maps that were handed in."""
    painted: list[tuple[str, int, Float[Tensor, "B T S"]]] = []
    for side in dict.fromkeys(x.side for x in trace.layers if x.kind == "self"):
        stack = [n for n, x in enumerate(trace.layers) if x.kind == "self" and x.side == side]
        if len({tuple(means[n].shape) for n in stack}) == 1 and means[stack[0]].shape[-2] == means[stack[0]].shape[-1]:
            through = analyses.attention_rollout([means[n][:, None] for n in stack])[-1]
            painted.append((f"rollout{f' of the {side}' if side else ''}", stack[-1], through))
    for name, one in maps.items():
        fitting = [n for n, mean in enumerate(means) if mean.shape == one.shape]
        if not fitting:
            shapes = sorted({tuple(mean.shape) for mean in means})
            refuse("render", f"maps[{name!r}]", "fits no layer", tuple(one.shape), f"one of {shapes}")
        painted.append((labels.label(name), fitting[-1], one.detach().float().cpu()))
    made = []
    for number, (name, layer, one) in enumerate(painted):
        signed = bool((one < 0).any())
        for row in range(min(len(one), plan.rows)):
            chunks[f"{key}-paint-{number}-{row}"] = pack.packed(one[row], plan, signed=signed)
        made.append({"name": name, "layer": layer, "signed": signed})
    return made


def _pictures(trace: Traced, key: str, plan: pack.Plan, chunks: Chunks) -> Facts | None:
    """Packs the pictures; None where there are none or their patches were pooled together."""
    if trace.images is None or trace.grid is None or plan.pool > 1:
        return None
    shown = trace.images[: plan.rows]
    lost = int((~shown.isfinite()).any(1).sum())
    for row, image in enumerate(shown):
        drawn = labels.picture(image.detach().cpu())
        chunks[f"{key}-picture-{row}"] = pack.compressed(drawn.numpy().tobytes())
    return {"size": list(drawn.shape[:2]), "grid": list(trace.grid), "extra": trace.extra_tokens, "lost": lost}
