"""Rotary positions (RoPE): pairs of query and key channels are turned by angles proportional to the position.

    w_a = base^(-2a/D),  a = 0 .. D/2 - 1
    (z_a, z_b)' = m (z_a cos(p w_a) - z_b sin(p w_a),  z_a sin(p w_a) + z_b cos(p w_a))

so that q'_i . k'_j depends on positions through i - j only. (a, b) is the a-th pair of channels: (2a, 2a+1)
as the paper prints it (`interleaved=True`), or (a, a + D/2) as GPT-NeoX and Llama store it (the default);
`to_half_split` and `to_interleaved` convert between them. m = 1 unless a scaling (see rotary_scaling.py) sets
another; it multiplies queries and keys, so scores by m^2.

Su et al. 2021, "RoFormer: Enhanced Transformer with Rotary Position Embedding" (arXiv 2104.09864), section 3.
Differs from the paper: the default pairing of channels, a fixed permutation of D.
"""

from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard._former import PLAIN, Card, Cost, Paper, register
from regard.positions._shared import angles, check_above, check_even, check_width, frequencies, work_dtype
from regard.shapes import HeadShape
from regard.stages import Position


class Scaling(Protocol):
    """How a rotary part trained at one length is stretched to another."""

    @property
    def follows_length(self) -> bool:
        """Whether frequencies depend on the length at hand, so that rotated keys can't be cached."""
        ...

    def frequencies(self, w: Float[Tensor, "half"], base: float, length: Int[Tensor, ""]) -> Float[Tensor, "half"]:
        """The new w; `length` is the largest position present plus one, as a tensor."""
        ...

    def multiplier(self) -> float:
        """m, on queries and keys alike."""
        ...

    def check(self, head_dim: int) -> None:
        """Raise ValueError where the scaling can't serve this width."""
        ...


def rotate(
    z: Float[Tensor, "B H T D"],
    angle: Float[Tensor, "*b T half"],
    *,
    multiplier: float = 1.0,
    interleaved: bool = False,
) -> Float[Tensor, "B H T D"]:
    """Turn each pair of channels of z by its angle. Computed in at least float32, returned in z's dtype."""
    if angle.dim() == 3:
        angle = angle.unsqueeze(1)
    work = work_dtype(z)
    cos, sin = (angle.cos() * multiplier).to(work), (angle.sin() * multiplier).to(work)
    if interleaved:
        first, second = z.to(work).unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-1).flatten(-2)
    else:
        first, second = z.to(work).chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
    return turned.to(z.dtype)


def to_half_split(z: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
    """Reorder channels from pairs (2a, 2a+1) to pairs (a, a + D/2).

    Rotating commutes with it: to_half_split(rotate(z, interleaved=True)) = rotate(to_half_split(z)). To
    convert a checkpoint, apply it to the output channels of each head of q_proj and k_proj.
    """
    return z.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def to_interleaved(z: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
    """The inverse of `to_half_split`."""
    return z.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


class Rotary(Position):
    """Turns queries and keys of width `head_dim`. No parameters; angles come from the integer positions."""

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10000.0,
        scaling: Scaling | None = None,
        interleaved: bool = False,
    ) -> None:
        super().__init__()
        check_even("Rotary", "head_dim", head_dim)
        check_above("Rotary", "base", base, 1.0)
        if scaling is not None:
            scaling.check(head_dim)
        self.head_dim = head_dim
        self.base = base
        self.scaling = scaling
        self.interleaved = interleaved
        self.streams = scaling is None or not scaling.follows_length

    def rotate(self, z: Float[Tensor, "B H T D"], positions: Int[Tensor, "*b T"]) -> Float[Tensor, "B H T D"]:
        check_width("Rotary", "z", z, self.head_dim)
        if positions.numel() == 0:
            return z
        w = frequencies(self.head_dim, self.base, z.device)
        multiplier = 1.0
        if self.scaling is not None:
            w = self.scaling.frequencies(w, self.base, positions.max() + 1)
            multiplier = self.scaling.multiplier()
        return rotate(z, angles(positions, w), multiplier=multiplier, interleaved=self.interleaved)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base:g}, scaling={self.scaling}, interleaved={self.interleaved}"


def _slots(shape: HeadShape, *, base: float = 10000.0, interleaved: bool = False) -> dict[str, object]:
    return {"position": Rotary(shape.head_dim, base=base, interleaved=interleaved)}


TRAITS = PLAIN - {"position_free"}
COST = Cost("2*B*H*T*S*D + 3*(B*H*T*D + B*G*S*D)", "2*S*G*D")

CARD = register(
    Card(
        name="rotary",
        family="positions",
        gist="Pairs of query and key channels are turned by angles proportional to position.",
        equation="q'[i] = R(i) q[i], k'[j] = R(j) k[j]; R(p) turns pair a by p base^(-2a/D)",
        paper=Paper(
            "RoFormer: Enhanced Transformer with Rotary Position Embedding",
            "Su et al.",
            2021,
            "2104.09864",
            "section 3",
        ),
        slots=_slots,
        traits=TRAITS,
        cost=COST,
        claim="Scores depend on positions through i - j only, and norms are kept: tests/positions.",
        differs=("Pairs channels (a, a + D/2) by default; the paper's (2a, 2a+1) is interleaved=True.",),
        verified="third-party",
        tasks=("text", "retrieval", "copying", "selective_copying", "imputation"),
    )
)
