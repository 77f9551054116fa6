"""Rotary positions (RoPE): pairs of query and key channels turn by angles proportional to position.

A pair is (a, a + D/2), as GPT-NeoX and Llama store it, or (2a, 2a+1), as the paper prints it (`interleaved=True`);
`to_half_split` and `to_interleaved` convert between them. A scaling (see rotary_scaling.py) changes the w_a, and may
multiply queries and keys by some m, so scores by m^2. Where only the first channels turn (`partial_rotary_factor`), D
is their number in all of this, and m is theirs alone. Images and video are turned by axial.py and mrope.py.
"""

from functools import cache, lru_cache
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch._C import _len_torch_dispatch_stack

from regard.cards import PLAIN, Card, Cost, Paper
from regard.checks import checked, divides, number, whole
from regard.positions._shared import angles, frequencies, work_dtype
from regard.stages import Position
from regard.tracing import readable

CARD = Card(
    "rotary",
    equation="""q'_i = R(i) q_i,   k'_j = R(j) k_j,   so that q'_i . k'_j depends on positions through i - j only
R(p) turns the a-th pair of channels:   (z, y)' = (z cos(p w_a) - y sin(p w_a),  z sin(p w_a) + y cos(p w_a))
w_a = base^(-2a/D),   a = 0 .. D/2 - 1""",
    papers=(
        Paper(
            "RoFormer: Enhanced Transformer with Rotary Position Embedding",
            "Su et al.",
            2021,
            "2104.09864",
            "section 3",
        ),
        Paper(
            "GPT-NeoX-20B: An Open-Source Autoregressive Language Model",
            "Black et al.",
            2022,
            "2204.06745",
            "not its own text, but its code in transformers, where the first quarter of the channels turns",
        ),
    ),
    traits=PLAIN - {"position_free"},
    cost=Cost("2*B*H*T*S*D + 3*(B*H*T*D + B*G*S*D)", "2*S*G*D"),
    claim="Scores depend on positions through i - j only, and norms are kept: "
    "tests/positions/test_rotary.py::test_scores_depend_on_distance_and_lengths_stay.",
    differs=(
        "Pairs channels (a, a + D/2) by default, a fixed permutation of D; the paper's (2a, 2a+1) is interleaved=True.",
    ),
    verified="third-party",
    tasks=("text", "retrieval", "copying", "selective_copying", "imputation"),
    defaults={"base": "paper", "interleaved": "code, transformers' Llama", "partial_rotary_factor": "paper"},
)


KEPT = 64
"""Positions whose sines are worked out together."""


class Scaling(Protocol):
    """How a rotary part trained at one length is stretched to another."""

    @property
    def follows_length(self) -> bool:
        """Whether frequencies depend on the length at hand, so that rotated keys can't be cached."""
        ...

    def frequencies(self, w: Float[Tensor, " half"], base: float, length: Int[Tensor, ""]) -> Float[Tensor, " half"]:
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
    blocks: int = 1,
) -> Float[Tensor, "B H T D"]:
    """Turn each pair of the first channels of z by its angle; those beyond the pairs stay as they are.

    Computed in at least float32, returned in z's dtype.

    Args:
        angle: (T, half) or (B, T, half), the same for all heads, or (B, H, T, half).
        blocks: the channels that turn are cut into so many, and pairs are half a block apart; `interleaved` is blocks
            of two channels.
    """
    if angle.dim() == 3:
        angle = angle.unsqueeze(1)
    half, work = angle.shape[-1], work_dtype(z)
    blocks = half if interleaved else blocks
    cos, sin = ((m * multiplier).to(work).unflatten(-1, (blocks, -1)) for m in (angle.cos(), angle.sin()))
    first, second = z[..., : 2 * half].to(work).unflatten(-1, (blocks, 2, -1)).unbind(-2)
    turned = torch.stack((first * cos - second * sin, first * sin + second * cos), dim=-2).flatten(-3).to(z.dtype)
    return turned if 2 * half == z.shape[-1] else torch.cat((turned, z[..., 2 * half :]), dim=-1)


@lru_cache(maxsize=32)
def turns(width: int, base: float, block: int) -> list[tuple[Float[Tensor, " D"], Float[Tensor, " D"]]]:
    """(cos, cos) and (-sin, sin) of `KEPT` positions: the next tokens of all layers need the same ones."""
    with torch.inference_mode(False), torch.no_grad():
        at = torch.arange(block * KEPT, (block + 1) * KEPT, device="cpu")
        angle = angles(at, frequencies(width, base, at.device))
        cos, sin = (x.to(torch.float32) for x in (angle.cos(), angle.sin()))
        return list(zip(torch.cat((cos, cos), 1).unbind(), torch.cat((-sin, sin), 1).unbind(), strict=True))


def to_half_split(z: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
    """Reorder channels from pairs (2a, 2a+1) to pairs (a, a + D/2).

    Rotating commutes with it: to_half_split(rotate(z, interleaved=True)) = rotate(to_half_split(z)). To
    convert a checkpoint, apply it to the output channels of each head of q_proj and k_proj.
    """
    return z.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def to_interleaved(z: Float[Tensor, "*n D"]) -> Float[Tensor, "*n D"]:
    """The inverse of `to_half_split`."""
    return z.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


@CARD.fills("position", closed=("scaling",))
class Rotary(Position):
    """Turns queries and keys of width `head_dim`. No parameters; angles come from the integer positions.

    Args:
        head_dim: of queries and keys.
        base: of the geometric w_a; the paper's 10000. A larger one turns all pairs but the first more slowly.
        scaling: how the w_a are stretched.
        interleaved: whether pairs are neighbours.
        partial_rotary_factor: the part of the channels that turns, the first ones; transformers' name. An even number
            D = int(head_dim * partial_rotary_factor) of them must be left.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10000.0,
        scaling: Scaling | None = None,
        interleaved: bool = False,
        partial_rotary_factor: float = 1.0,
    ) -> None:
        super().__init__()
        whole(self, head_dim=head_dim)
        number(self, above=0, most=1, partial_rotary_factor=partial_rotary_factor)
        rotary_dim = int(head_dim * partial_rotary_factor)
        self.partial_rotary_factor = partial_rotary_factor
        divides(self, pair=2, **{"head_dim" if rotary_dim == head_dim else "rotary_dim": rotary_dim})
        whole(self, 2, rotary_dim=rotary_dim)
        number(self, above=1, base=base)
        if scaling is not None:
            scaling.check(rotary_dim)
        self.head_dim = head_dim
        self.rotary_dim = rotary_dim
        self.base = base
        self.scaling = scaling
        self.interleaved = interleaved
        self.streams = scaling is None or not scaling.follows_length

    @checked(D="head_dim")
    def rotate(self, z: Float[Tensor, "B H T D"], positions: Int[Tensor, "*b T"]) -> Float[Tensor, "B H T D"]:
        return self._turned(z, positions)

    def _turned(self, z: Tensor, positions: Tensor) -> Tensor:
        if positions.numel() == 0:
            return z
        w = frequencies(self.rotary_dim, self.base, z.device)
        multiplier = 1.0
        if self.scaling is not None:
            w = self.scaling.frequencies(w, self.base, positions.max() + 1)
            multiplier = self.scaling.multiplier()
        return rotate(z, self.angles(positions, w), multiplier=multiplier, interleaved=self.interleaved)

    def angles(self, positions: Int[Tensor, "*b T"], w: Float[Tensor, " half"]) -> Float[Tensor, "*b T half"]:
        """By how much each pair turns at each position."""
        return angles(positions, w)

    def turn(self, q: Tensor, k: Tensor, at: Int[Tensor, "*b T"], keys: Int[Tensor, "*b S"]) -> tuple[Tensor, Tensor]:
        if not (at is keys and at.shape == (1,) and self._one_by_one(q, k, at)):
            return super().turn(q, k, at, keys)
        if (kept := self.sines(int(at))) is None:
            return super().turn(q, k, at, keys)
        cos, sin = kept
        z = torch.cat((q, k), 1)  # heads are alike
        z = torch.addcmul(z * cos, z.roll(self.head_dim // 2, -1), sin)
        return z[:, : q.shape[1]], z[:, q.shape[1] :]

    def sines(self, at: int) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]] | None:
        """(cos, cos) and (-sin, sin) of position `at` where they are all that `turn` does; else None."""
        usual = self.scaling is None and not self.interleaved and _turns_as_usual(type(self))  # type: ignore[arg-type]
        if not usual or self.rotary_dim != self.head_dim:
            return None
        return turns(self.head_dim, self.base, at // KEPT)[at % KEPT]

    def _one_by_one(self, q: Tensor, k: Tensor, at: Tensor) -> bool:
        """Whether this is a step of decoding that kept sines can serve."""
        fits = q.dtype is k.dtype is torch.float32 and q.is_cpu and q.shape[3] == k.shape[3] == self.head_dim
        return fits and at.is_cpu and readable(q, k, at) and not _len_torch_dispatch_stack()

    def extra_repr(self) -> str:
        part = "" if self.rotary_dim == self.head_dim else f", rotary_dim={self.rotary_dim}"
        return f"{self.head_dim}{part}, base={self.base:g}, scaling={self.scaling}, interleaved={self.interleaved}"


@cache
def _turns_as_usual(kind: Any) -> bool:
    return all(getattr(kind, name) is getattr(Rotary, name) for name in ("turn", "rotate", "_turned", "angles"))
