"""RoPE-Mixed: on an image, each pair of channels turns along a direction of its own, which is trained."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, divides, number, refuse, whole
from regard.positions._shared import frequencies, work_dtype
from regard.positions.axial import CARD as AXIAL
from regard.positions.axial import checked_sizes, coordinates
from regard.positions.rotary import rotate
from regard.stages import Position

CARD = Card(
    "rotary_mixed",
    equation="""rotary for tokens at (y, x): the a-th pair of head g turns by the angle y u[g, a] + x v[g, a]
u and v are trained;   at the start (v, u)[g, a] = base^(-4a/D) (cos t, sin t) for a < D/4, with one random t in a head;
the other pairs likewise at t + pi/2""",
    papers=(
        Paper(
            "Rotary Position Embedding for Vision Transformer",
            "Heo, Park, Han, Yun",
            2024,
            "2403.13298",
            "abstract; official code, RoPE-Mixed",
        ),
    ),
    traits=AXIAL.traits,
    cost=Cost("2*B*H*T*S*D + 5*(B*H*T*D + B*G*S*D)", "2*S*G*D"),
    claim="Scores depend on the vector between two tokens only, also along diagonals, of which axial rotary knows "
    "nothing: tests/positions/test_axial.py::test_mixed_scores_depend_on_the_vector_between_tokens.",
    differs=(
        "A head of keys and the heads of queries that read it turn alike; the paper has no grouped keys.",
        "Pairs are (2a, 2a+1) as in the authors' code.",
    ),
    verified="third-party",
    tasks=("digits",),
    example={"sizes": (3, 2)},
    tries={"base": {"base": 2.0, "head_dim": 8}},  # of four channels the one frequency is 1
    defaults={"sizes": "ours", "prefix": "ours", "base": "code"},
)


@CARD.fills("position")
class RotaryMixed(Position):
    """Turns queries and keys by trained frequencies; `freqs` is (2, G, D/2), of y and of x.

    Positions are as of `AxialRotary` with two axes.

    Args:
        head_dim: D, a multiple of 4.
        sizes: (Y, X), which tells where counted tokens stand; the first isn't needed for that.
        prefix: how many counted tokens stand before the grid and don't turn.
        base: of the starting frequencies.
    """

    axes = 2

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        sizes: tuple[int, int] = (16, 16),
        prefix: int = 0,
        base: float = 10.0,
    ) -> None:
        super().__init__()
        whole(self, head_dim=head_dim, num_heads=num_heads)
        divides(self, pairs_of_two_directions=4, head_dim=head_dim)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        whole(self, num_kv_heads=num_kv_heads)
        divides(self, num_kv_heads=num_kv_heads, num_heads=num_heads)
        whole(self, 0, prefix=prefix)
        number(self, above=1, base=base)
        self.sizes = checked_sizes(self, sizes)
        if len(self.sizes) != 2:
            refuse(self, "sizes", "are no image's", sizes, "two, (Y, X)")
        self.head_dim, self.num_kv_heads, self.prefix, self.base = head_dim, num_kv_heads, prefix, base
        self.freqs = nn.Parameter(torch.empty(2, num_kv_heads, head_dim // 2))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        speed = frequencies(self.head_dim // 2, self.base, self.freqs.device)
        t = 2 * math.pi * torch.rand(self.num_kv_heads, 1, device=speed.device)
        self.freqs[0] = torch.cat([speed * (t + turn).sin() for turn in (0.0, math.pi / 2)], dim=-1)
        self.freqs[1] = torch.cat([speed * (t + turn).cos() for turn in (0.0, math.pi / 2)], dim=-1)

    @checked(D="head_dim", A="axes")
    def rotate(
        self,
        z: Float[Tensor, "B H T D"],
        positions: Int[Tensor, " T"] | Int[Tensor, "B T"] | Int[Tensor, "#B T A"] | Float[Tensor, "#B T A"],
    ) -> Float[Tensor, "B H T D"]:
        if positions.numel() == 0:
            return z
        x = positions if positions.dim() == 3 else coordinates(positions, self.sizes, self.prefix)
        freqs = self.freqs.to(work_dtype(self.freqs))
        y, x = x.to(freqs.dtype)[..., None, :, None, :].unbind(-1)  # (*b, 1, T, 1)
        angle = y * freqs[0].unsqueeze(-2) + x * freqs[1].unsqueeze(-2)
        angle = angle.repeat_interleave(z.shape[1] // self.num_kv_heads, dim=-3)
        return rotate(z, angle if angle.dim() == 4 else angle[None], interleaved=True)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, sizes={self.sizes}, prefix={self.prefix}, base={self.base:g}"
