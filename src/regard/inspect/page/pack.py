"""Maps as the page carries them: eight bits a weight and a scale for each row, compressed, in base64.

A weight w is kept as the level round(255 sqrt(w / m)) of its row's largest weight m, so that small weights keep
their digits: what the page shows differs from w by at most 0.4 % of m.
"""

import base64
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Int8, Integer
from torch import Tensor

ENTRY = 3
"""Bytes of a weight that is kept with its place: a level and a key's number in 16 bits."""
FEWEST = 16
"""Weights of a row that are worth keeping; where fewer would fit, the page drops batch rows instead."""


@dataclass(frozen=True)
class Plan:
    """What of the maps goes on the page: the first `rows` batch rows, of each query the `top` weights, pooled."""

    rows: int
    top: int | None = None
    pool: int = 1


def compressed(raw: bytes, strategy: int = zlib.Z_RLE) -> str:
    """gzip in base64. Levels hold runs of zeros but few repeats, so that looking for runs alone packs them best."""
    packer = zlib.compressobj(4, zlib.DEFLATED, 31, 9, strategy)
    return base64.b64encode(packer.compress(raw) + packer.flush()).decode("ascii")


def levels(
    weights: Float[Tensor, "*N T S"], *, signed: bool
) -> tuple[Integer[Tensor, "*N T S"], Float32[Tensor, "*N T"]]:
    """Levels and each row's largest size. A row with a NaN keeps NaN as its size, so that the page can say so."""
    peak = weights.abs().amax(-1)
    size = (weights.abs() / peak.clamp_min(torch.finfo(weights.dtype).tiny)[..., None]).nan_to_num().clamp(0, 1).sqrt()
    if signed:
        return (size * weights.sign().nan_to_num() * 127).round().to(torch.int8), peak.float()
    return (size * 255).round().to(torch.uint8), peak.float()


def packed(weights: Float[Tensor, "T S"], plan: Plan, *, signed: bool) -> str:
    """One head's map: the rows' sizes, then all levels, or the kept keys' numbers and their levels."""
    level, peak = levels(pooled(weights, plan.pool), signed=signed)
    parts = [peak.numpy().astype("<f4").tobytes()]
    if plan.top is not None and plan.top < level.shape[-1]:
        kept = level.int().abs().topk(plan.top, dim=-1).indices
        kept = kept.sort(-1).values
        parts.append(kept.numpy().astype("<u2").tobytes())
        level = level.gather(-1, kept)
    parts.append(level.contiguous().numpy().tobytes())
    return compressed(b"".join(parts))


def pooled(weights: Float[Tensor, "*N T S"], side: int) -> Float[Tensor, "*N t s"]:
    """The weight of largest size in each square of `side` queries and keys."""
    if side == 1:
        return weights
    maps = weights.reshape(-1, 1, *weights.shape[-2:])
    most, least = (F.max_pool2d(sign * maps, side, ceil_mode=True) for sign in (1, -1))
    chosen = torch.where(most >= least, most, -least)
    return chosen.reshape(*weights.shape[:-2], *chosen.shape[-2:])


def bits(mask: Bool[Tensor, "H T S"]) -> str:
    """A mask, eight entries a byte, the first in the lowest bit."""
    return compressed(np.packbits(mask.numpy(), axis=None, bitorder="little").tobytes(), zlib.Z_DEFAULT_STRATEGY)


def thumbnails(weights: Float[Tensor, "*N T S"], side: int) -> Integer[Tensor, "*N t s"]:
    """Small pictures of the maps, in levels of sqrt |w| up to 254; 255 is no number."""
    small = pooled(weights, max(1, math.ceil(max(weights.shape[-2:]) / side)))
    levels = (small.abs().nan_to_num().clamp(0, 1).sqrt() * 254).round()
    return torch.where(small.isfinite(), levels, 255).to(torch.uint8)


def vectors(x: Float[Tensor, "N D"]) -> str:
    """Vectors in eight bits a number, each with its own scale: the scales, then the numbers."""
    scale = x.float().abs().amax(-1) / 127
    level: Int8[Tensor, "N D"] = (x.float() / scale.clamp_min(1e-30)[:, None]).nan_to_num().round().to(torch.int8)
    return compressed(scale.numpy().astype("<f4").tobytes() + level.contiguous().numpy().tobytes())


def plan(shapes: Sequence[tuple[int, int, int]], *, batch: int, sample: Float[Tensor, "H T S"], limit: int) -> Plan:
    """The fullest plan whose maps take about `limit` bytes of text.

    `shapes` are the (H, T, S) of the layers; `sample` is one layer's maps, from which is read how well they compress.
    """
    entries = sum(H * T * S for H, T, S in shapes)
    queries = sum(H * T for H, T, _ in shapes)
    level = levels(sample, signed=False)[0].contiguous()
    dense = entries * min(4 / 3, len(compressed(level.numpy().tobytes())) / max(1, level.numel()))
    if batch * dense <= limit:
        return Plan(batch)
    cost = queries * ENTRY * 4 / 3
    if (top := int(limit / (batch * cost))) >= FEWEST:
        return Plan(batch, top)
    if dense <= limit:
        return Plan(int(limit / dense))
    if limit >= FEWEST * cost:
        rows = int(limit / (FEWEST * cost))
        return Plan(rows, int(limit / (rows * cost)))
    return Plan(1, pool=math.ceil(math.sqrt(dense / limit)))
