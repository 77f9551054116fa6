"""Unidirectional block attention: blocks see themselves and those left, above and left above.

Layer by layer the view grows by a block, and no block ever needs a later one: an image of any height is made block
after block, from the keys and values of one row of blocks a layer.
"""

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, divides, fits, flag, refuse, whole
from regard.kernels.check import check_inputs
from regard.masks import Mask, predicate
from regard.pipeline.function import attention
from regard.positions.axial import AxialRotary
from regard.vision.maps import to_map, to_tokens

CARD = Card(
    "unidirectional_block",
    equation="""block (I, J) of b x b pixels:  softmax(q [K_0 | K_1 | K_2 | K_3]^T / sqrt(D)) [V_0 | V_1 | V_2 | V_3]
K_n = rotary(norm(k)) of block (I, J), (I-1, J-1), (I, J-1), (I-1, J), plus R_n, for n = 0 .. 3
blocks beyond the border are those at it;   "right-bottom": (I, J), (I+1, J+1), (I+1, J), (I, J+1)
rotary by the pixel's row (first half of the channels) and column in the whole image""",
    papers=(
        Paper(
            "Inf-DiT: Upsampling Any-Resolution Image with Memory-Efficient Diffusion Transformer",
            "Yang, Jiang, Hong, Teng, Zheng, Dong, Ding, Tang",
            2024,
            "2405.04312",
            "abstract; official code",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    cost=Cost("8*B*Y*X*M*block**2", ""),
    claim="Made block by block it is what it is at once, from one row of blocks whatever the height, and each layer "
    "reaches one block further: "
    "tests/vision/test_unidirectional_block.py::test_block_by_block_from_one_row_is_all_at_once, "
    "tests/vision/test_unidirectional_block.py::test_each_layer_reaches_one_block_further.",
    differs=(
        "One norm for queries and keys, as the code has it, which makes a second for keys and never uses it.",
        "A stream gives what all blocks at once give; in the code's way of one block at a time, offsets meet other "
        "neighbours.",
        "A sample keeps its direction; the code can draw one each time while training.",
        "The cross attention to the image of low resolution, and the layers around, are left to the model.",
    ),
    verified="third-party",
    example={"block": 2},
    defaults={
        "block": "code, 128 pixels of patches of 4",
        "direction": "code",
        "block_position": "code, the released scripts",
        "rotary": "code",
        "qk_norm": "code, the released scripts",
        "bias": "code",
    },
)

Direction = Literal["left-top", "right-bottom"]
NEIGHBOURS: dict[str, tuple[tuple[int, int], ...]] = {
    "left-top": ((0, 0), (-1, -1), (0, -1), (-1, 0)),
    "right-bottom": ((0, 0), (1, 1), (1, 0), (0, 1)),
}
"""How many blocks below and right of itself a block sees, in the order of the offsets R."""


def block_mask(sizes: tuple[int, int], block: int, direction: Direction = "left-top") -> Mask:
    """Which pixels of a map of (Y, X), row by row, see which: all that this attention is without offsets."""
    Y, X = sizes
    whole("block_mask", Y=Y, X=X, block=block)
    choice("block_mask", NEIGHBOURS, direction=direction)
    sign = 1 if direction == "right-bottom" else -1

    def sees(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        down = (j // X // block - i // X // block) * sign
        right = (j % X // block - i % X // block) * sign
        return (down >= 0) & (down <= 1) & (right >= 0) & (right <= 1)

    return predicate(sees)


def to_blocks(z: Float[Tensor, "B H Y X D"], block: int) -> Float[Tensor, "B I J H n D"]:
    """Maps as b x b pixels of each block."""
    parts = z.unflatten(3, (-1, block)).unflatten(2, (-1, block))
    return parts.permute(0, 2, 4, 1, 3, 5, 6).flatten(4, 5)


def from_blocks(z: Float[Tensor, "B I J H n D"], block: int) -> Float[Tensor, "B H Y X D"]:
    """The reverse."""
    parts = z.unflatten(4, (block, block))
    return parts.permute(0, 3, 1, 4, 2, 5, 6).flatten(4, 5).flatten(2, 3)


@checked()
def unidirectional_block_attention(
    q: Float[Tensor, "B H Y X D"],
    k: Float[Tensor, "B H Y X D"],
    v: Float[Tensor, "B H Y X V"],
    *,
    block: int,
    offsets: Float[Tensor, "4 H D"] | None = None,
    direction: Direction = "left-top",
) -> Float[Tensor, "B H Y X V"]:
    """Attention of each block to itself and three neighbours, in the direction from which blocks come.

    Args:
        block: b, which divides Y and X.
        offsets: R_n, added to the keys of the n-th neighbour.
    """
    who = "unidirectional_block_attention"
    check_inputs(*(z.flatten(2, 3) for z in (q, k, v)))
    choice(who, NEIGHBOURS, direction=direction)
    divides(who, block=block, Y=q.shape[2])
    divides(who, block=block, X=q.shape[3])
    Q, K, V = (to_blocks(z, block) for z in (q, k, v))
    rows, columns = (torch.arange(n, device=q.device) for n in Q.shape[1:3])
    keys, values = [], []
    for n, (down, right) in enumerate(NEIGHBOURS[direction]):
        at = (rows + down).clamp(0, len(rows) - 1)[:, None], (columns + right).clamp(0, len(columns) - 1)
        near = K[:, at[0], at[1]]
        keys.append(near if offsets is None else near + offsets[n, :, None].to(near.dtype))
        values.append(V[:, at[0], at[1]])
    out = attention(*(z.flatten(0, 2) for z in (Q, torch.cat(keys, 4), torch.cat(values, 4))))
    return from_blocks(out.unflatten(0, Q.shape[:3]), block)


class BlockState(NamedTuple):
    """The blocks that later ones see: one row of them and one more at most, the last one last."""

    k: Float[Tensor, "B n H b*b D"]
    v: Float[Tensor, "B n H b*b D"]
    done: int
    """How many blocks there were."""
    sizes: tuple[int, int]
    """Of the whole map in blocks."""
    origin: tuple[int, int]


@CARD.module
class UnidirectionalBlockAttention(nn.Module):
    """`unidirectional_block_attention` with projections, on maps whose sides are multiples of the block.

    Args:
        dim, num_heads: M and H.
        block: b, in tokens of the map.
        direction: where the blocks that a block sees stand.
        block_position: whether there are offsets R, which start at 0.
        rotary: whether queries and keys are turned by rows and columns.
        qk_norm: whether queries and keys go through a LayerNorm, one for both.
        bias: of all projections.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        block: int = 32,
        direction: Direction = "left-top",
        block_position: bool = True,
        rotary: bool = True,
        qk_norm: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads, block=block)
        divides(self, num_heads=num_heads, dim=dim)
        choice(self, get_args(Direction), direction=direction)
        flag(self, block_position=block_position, rotary=rotary, qk_norm=qk_norm, bias=bias)
        D = dim // num_heads
        if rotary:
            divides(self, four=4, head_dim=D)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, D
        self.block, self.direction = block, direction
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim, bias=bias) for _ in range(4))
        self.norm = nn.LayerNorm(D, eps=1e-6) if qk_norm else nn.Identity()
        self.turn = AxialRotary(D, pairs="neighbours") if rotary else None
        self.offsets = nn.Parameter(torch.empty(4, num_heads, D)) if block_position else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.offsets is not None:
            nn.init.zeros_(self.offsets)

    @checked(M="dim")
    def forward(self, x: Float[Tensor, "B M Y X"], origin: tuple[int, int] = (0, 0)) -> Float[Tensor, "B M Y X"]:
        """`origin` is the row and column of the first pixel, by which rotary counts, where x is part of an image."""
        divides(self, block=self.block, Y=x.shape[2])
        divides(self, block=self.block, X=x.shape[3])
        q, k, v = self._heads(x, *origin)
        out = unidirectional_block_attention(q, k, v, block=self.block, offsets=self.offsets, direction=self.direction)
        return self._merged(out)

    def _heads(self, x: Float[Tensor, "B M Y X"], row: int, column: int) -> list[Float[Tensor, "B H Y X D"]]:
        pixels, sizes = to_tokens(x), x.shape[2:]
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (f(pixels).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for f in projections)
        q, k = self.norm(q), self.norm(k)
        if self.turn is not None:
            rows, columns = (torch.arange(n, device=x.device) for n in sizes)
            at = torch.stack(torch.meshgrid(rows + row, columns + column, indexing="ij"), -1).flatten(0, 1)[None]
            q, k = self.turn.rotate(q, at), self.turn.rotate(k, at)
        return [z.to(v.dtype).unflatten(2, sizes) for z in (q, k, v)]

    def _merged(self, out: Float[Tensor, "B H Y X D"]) -> Float[Tensor, "B M Y X"]:
        return to_map(self.o_proj(out.flatten(2, 3).transpose(1, 2).flatten(2)), out.shape[2:4])

    def start(self, sizes: tuple[int, int], origin: tuple[int, int] = (0, 0)) -> BlockState:
        """The state before any block of a map of (Y, X)."""
        Y, X = sizes
        whole(self, Y=Y, X=X)
        divides(self, block=self.block, Y=Y)
        divides(self, block=self.block, X=X)
        none = self.q_proj.weight.new_zeros(0)
        return BlockState(none, none, 0, (Y // self.block, X // self.block), origin)

    def step(self, x: Float[Tensor, "B M b b"], state: BlockState) -> tuple[Float[Tensor, "B M b b"], BlockState]:
        """The next block, row by row from the left top (or from the right bottom, for that direction, backwards).

        What `forward` would give there, and the state with it.
        """
        if not isinstance(state, BlockState):
            got = type(state).__name__
            refuse(self, "state", "has the wrong type", got, "the BlockState of start", error=TypeError)
        fits(self, "B M b b", {"M": self.dim, "b": self.block}, x=x)
        tall, wide = state.sizes
        if state.done == tall * wide:
            refuse(self, "state", "has all blocks already", state.done, f"fewer than {tall} x {wide}")
        first = state.done == 0
        if not first and len(state.k) != len(x):
            refuse(self, "state", "has another batch than x", len(state.k), f"{len(x)} maps")
        (down, right), back = divmod(state.done, wide), self.direction == "right-bottom"
        place = (tall - 1 - down, wide - 1 - right) if back else (down, right)
        q, k, v = self._heads(x, *(o + p * self.block for o, p in zip(state.origin, place, strict=True)))
        q, k, v = (to_blocks(z, self.block)[:, 0] for z in (q, k, v))
        K, V = (new if first else torch.cat([old.to(new.dtype), new], 1) for old, new in ((state.k, k), (state.v, v)))
        keys, values = [], []
        for n, (above, left) in enumerate(NEIGHBOURS[self.direction]):
            ago = (abs(above) if down else 0) * wide + (abs(left) if right else 0)
            near = K[:, -1 - ago]
            keys.append(near if self.offsets is None else near + self.offsets[n, :, None].to(near.dtype))
            values.append(V[:, -1 - ago])
        out = attention(q[:, 0], torch.cat(keys, 2), torch.cat(values, 2))
        kept = slice(-wide - 1, None)
        after = BlockState(K[:, kept], V[:, kept], state.done + 1, state.sizes, state.origin)
        return self._merged(from_blocks(out[:, None, None], self.block)), after

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.num_heads}, block={self.block}, direction={self.direction!r}"
