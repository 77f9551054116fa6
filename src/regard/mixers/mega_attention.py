"""Mega's attention: one head, over all tokens or inside chunks, with weights and biases of its own."""

import math
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.checks import choice, number, refuse, whole
from regard.kernels.blocks import from_blocks, in_blocks
from regard.masks import causal, padding
from regard.mixers.exponential import work_dtype
from regard.pipeline.function import attention
from regard.positions._shared import angles, frequencies
from regard.positions.rotary import rotate
from regard.stages import Normalizer, Position, Rows
from regard.tracing import exporting

Weighting = Literal["softmax", "laplace", "relu2"]

MEAN, DEVIATION = 0.707107, 0.282095
"""sqrt(1/2) and sqrt(1 / (4 pi)), to the digits that the authors' models were trained with."""


class Laplace(Normalizer):
    """(1 + erf((s - m) / (sigma sqrt 2))) / 2 for each score by itself."""

    def forward(
        self, scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None
    ) -> Float[Tensor, "B H t S"]:
        s = scores.to(work_dtype(scores))
        weights = 0.5 * (1 + torch.erf((s - MEAN) / (DEVIATION * math.sqrt(2))))
        return _kept(weights, allowed).to(scores.dtype)


class SquaredRelu(Normalizer):
    """relu(s)^2 for each score by itself."""

    def forward(
        self, scores: Float[Tensor, "B H t S"], allowed: Bool[Tensor, "#B #H t S"] | None
    ) -> Float[Tensor, "B H t S"]:
        return _kept(F.relu(scores).square(), allowed)


def _kept(weights: Tensor, allowed: Tensor | None) -> Tensor:
    return weights if allowed is None else weights.masked_fill(~allowed, 0)


class DistanceBias(Position):
    """b_ij = table[j - i + P - 1], for up to P positions."""

    def __init__(self, positions: int):
        super().__init__()
        whole(self, positions=positions)
        self.positions = positions
        self.table = nn.Parameter(torch.empty(2 * positions - 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table, std=0.02)

    def bias(self, rows: Rows) -> Float[Tensor, "1 1 t s"]:
        return self.table[rows.j - rows.i[:, None] + self.positions - 1][None, None]


class TurnedBias(Position):
    """b_ij = R_i a . R_j b: two vectors of width Z, turned by their positions; so of j - i, for any length."""

    def __init__(self, width: int):
        super().__init__()
        whole(self, width=width)
        if width % 2:
            refuse(self, "width", "is odd", width, "an even int, channels are used in pairs")
        self.a = nn.Parameter(torch.empty(width))
        self.b = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.a, std=0.02)
        nn.init.normal_(self.b, std=0.02)

    def bias(self, rows: Rows) -> Float[Tensor, "1 1 t s"]:
        work = work_dtype(rows.q)
        w = frequencies(self.a.shape[0], 10000.0, rows.q.device)
        sides = ((self.a, rows.i), (self.b, rows.j))
        a, b = (rotate(p.to(work).expand(1, 1, n.shape[0], -1), angles(n, w)) for p, n in sides)
        return a @ b.mT


class ChunkAttention(nn.Module):
    """A v for queries and keys of width `qk_dim`; see `Mega` for the options."""

    def __init__(
        self,
        qk_dim: int,
        *,
        chunk: int | None,
        causal: bool,
        weighting: Weighting,
        max_positions: int | None,
        dropout: float,
    ) -> None:
        super().__init__()
        normalizers = {"softmax": None, "laplace": Laplace(), "relu2": SquaredRelu()}
        choice("Mega", normalizers, weighting=weighting)
        number("Mega", least=0, most=1, dropout=dropout)
        if chunk is not None:
            whole("Mega", chunk=chunk)
        if max_positions is not None:
            whole("Mega", chunk or 1, max_positions=max_positions)
        self.qk_dim, self.chunk, self.causal, self.weighting, self.dropout = qk_dim, chunk, causal, weighting, dropout
        self.position = TurnedBias(qk_dim) if max_positions is None else DistanceBias(max_positions)
        self.normalizer = normalizers[weighting]

    def forward(
        self,
        q: Float[Tensor, "B T Z"],
        k: Float[Tensor, "B T Z"],
        v: Float[Tensor, "B T E"],
        keep: Bool[Tensor, "B T"] | None,
    ) -> Float[Tensor, "B T E"]:
        """Chunk by chunk, each as a batch row of its own. `keep` is True at real keys."""
        T, C = q.shape[1], self.chunk
        if C is None or (not exporting() and T <= C):
            return self.whole(q, k, v, keep)
        if not self.causal and keep is None and (exporting() or T % C):
            keep = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
        q, k, v = (in_blocks(z, C, 1) for z in (q, k, v))
        keep = None if keep is None else in_blocks(keep, C, 1).flatten(0, 1)
        out = self.whole(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), keep)
        return from_blocks(out.unflatten(0, q.shape[:2]), T, 1)

    def whole(
        self,
        q: Float[Tensor, "B T Z"],
        k: Float[Tensor, "B S Z"],
        v: Float[Tensor, "B S E"],
        keep: Bool[Tensor, "B S"] | None,
    ) -> Float[Tensor, "B T E"]:
        """Without chunks; the last query stands where the last key stands."""
        T, S = q.shape[1], k.shape[1]
        if isinstance(self.position, DistanceBias) and self.position.positions < S:
            refuse("Mega", "x", "is too long", f"{S} tokens", f"at most max_positions = {self.position.positions}")
        mask = causal() if self.causal else None
        if keep is not None:
            mask = padding(keep) if mask is None else mask & padding(keep)
        scale = self.qk_dim**-0.5
        if self.normalizer is not None:
            if keep is None:
                seen = torch.arange(S - T + 1, S + 1, device=q.device) if self.causal else q.new_full((T,), S)
            else:
                seen = keep.cumsum(1)[:, S - T :] if self.causal else keep.sum(1, keepdim=True)
            q, scale = (q / seen.clamp(min=1)[..., None]).to(q.dtype), 1.0
        dropout = self.dropout if self.training else 0.0
        options: dict[str, Any] = {"position": self.position, "normalizer": self.normalizer, "dropout": dropout}
        return attention(q[:, None], k[:, None], v[:, None], mask=mask, scale=scale, **options)[:, 0]
