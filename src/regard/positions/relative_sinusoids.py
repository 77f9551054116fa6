"""Transformer-XL's scores by distance, between frames or groups of them.

As angles of a difference split into those of its ends, no table of distances need be formed: a query, brought to sines
and cosines and turned by its own position, meets those of the key's position.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.checks import divides, whole
from regard.positions._shared import angles, frequencies, work_dtype
from regard.stages import Position, Rows


class RelativeSinusoids(Position):
    """Transformer-XL's scores by distance, between groups: ((q + u) k + (q + w) e) / sqrt(d) in place of q k / sqrt(d).

    As angles of a difference split into those of its ends, e need not be formed: a head's (q + w) W_p turned by the
    query's position meets the sines of the key's.

    Args:
        dim, num_heads: M, which is even, and H.
        group: g; 1 is Transformer-XL's own form, for single frames, and may stand in `regard.Attention`.
        causal: for queries that see no later group, whose positions are counted from another frame.
    """

    def __init__(self, dim: int, num_heads: int, *, group: int = 1, causal: bool = False) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads, group=group)
        divides(self, num_heads=num_heads, dim=dim)
        divides(self, two=2, dim=dim)
        self.dim, self.num_heads, self.group, self.causal = dim, num_heads, group, causal
        self.proj = nn.Linear(dim, dim)
        self.content_bias = nn.Parameter(torch.empty(dim))
        self.position_bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """u and w Glorot uniform, as matrices (H, M / H)."""
        for z in (self.content_bias, self.position_bias):
            nn.init.xavier_uniform_(z.detach().view(self.num_heads, -1))

    def _heads(self, z: Float[Tensor, "*n M"]) -> Float[Tensor, "*n H 1 d"]:
        """What all frames of a group have, by heads."""
        return z.repeat(*(1,) * (z.dim() - 1), self.group).unflatten(-1, (self.num_heads, 1, -1))

    def bias(self, rows: Rows) -> Float[Tensor, "B H t s"]:
        dtype, g = work_dtype(rows.q), self.group
        w = frequencies(self.dim, 10000.0, rows.q.device)
        at = rows.i if rows.positions is None else rows.positions
        of_query, of_key = (angles(g * n, w).unsqueeze(-3) for n in (at, rows.j))
        q = rows.q.to(dtype) + self._heads(self.position_bias.to(dtype))
        keys = torch.cat((of_key.cos(), of_key.sin()), -1).to(dtype)
        sin, cos = of_query.sin().to(dtype), of_query.cos().to(dtype)

        def turned(part: Int[Tensor, " g"]) -> tuple[Tensor, Tensor]:
            """(q + w) W_p, in sines and cosines of g D, if frame r of a group stands at g D + part[r]."""
            maps = self.proj.weight.to(dtype)
            angle = angles(part, w)[:, None]
            s, c = angle.sin().to(dtype), angle.cos().to(dtype)
            a, b = maps[:, 0::2], maps[:, 1::2]  # of sin(p w) and of cos(p w)
            both = torch.cat((a * c - b * s, a * s + b * c), -1).flatten(0, 1)
            y = q @ both.unflatten(0, (self.num_heads, -1))
            return y.chunk(2, -1)  # type: ignore[return-value]

        def scores(part: Int[Tensor, " g"]) -> Float[Tensor, "B H t s"]:
            y_sin, y_cos = turned(part)
            return torch.cat((y_sin * sin + y_cos * cos, y_cos * sin - y_sin * cos), -1) @ keys.mT

        r = torch.arange(g, device=q.device)
        if self.causal or g % 2:
            found = scores(g - 1 - r if self.causal else (g - 1) // 2 - r)
        else:  # the table has position 0 twice
            ahead = g // 2 - 1 - r
            same = turned(ahead + (ahead < 0))[1].sum(-1, keepdim=True)
            distance = (at.unsqueeze(-1) - rows.j).unsqueeze(-3)
            found = torch.where(distance > 0, scores(ahead), scores(ahead + 1))
            found = torch.where(distance == 0, same, found)
        content = self._heads(self.content_bias.to(dtype)) @ rows.k.to(dtype).mT
        found = found + content + (q * self._heads(self.proj.bias.to(dtype))).sum(-1, keepdim=True)
        return (found * int(q.shape[-1]) ** -0.5).to(rows.q.dtype)
