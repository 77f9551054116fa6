"""Masks made of chosen blocks: what a selector, looking at queries and keys, returns."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from regard.masks import checks
from regard.masks.algebra import Index, Mask
from regard.masks.layout import BlockLayout, pair
from regard.masks.stamp import made_of
from regard.masks.verdict import Tiles, Verdict, corners, counted


@dataclass(frozen=True, eq=False, repr=False)
class Chosen(Mask):
    """tiles[b, h, t // bq, j // bk], where t = i - (S - T) counts the queries."""

    tiles: Bool[Tensor, "B H nq nk"]
    T: int
    S: int
    block: tuple[int, int]

    def __call__(self, b: Index, h: Index, i: Index, j: Index) -> Bool[Tensor, "..."]:
        (B, H, nq, nk), (bq, bk) = self.tiles.shape, self.block
        tiles, t = self.tiles.to(j.device), i - (self.S - self.T)
        in_row, in_column = (t >= 0) & (t < self.T), (j >= 0) & (j < self.S)
        if nq == 0 or nk == 0:
            return in_row & in_column & False
        row, column = (t // bq).clamp(0, nq - 1), (j // bk).clamp(0, nk - 1)
        if i.dim() and i.shape[-1] == 1 and j.dim() and (j.dim() < 2 or j.shape[-2] == 1) and nk <= 8 * j.shape[-1]:
            # Rows against columns, as kernels ask: no index is made for every pair, but whole rows of tiles are.
            rows = tiles[b if B > 1 else 0, h if H > 1 else 0, row].squeeze(-2) & in_row
            return rows.gather(-1, column.expand(*rows.shape[:-1], column.shape[-1])) & in_column
        index = row * nk + column
        if H > 1:
            index = h * (nq * nk) + index
        if B > 1:
            index = b * (H * nq * nk) + index
        return tiles.reshape(-1)[index] & in_row & in_column

    def judge(self, tiles: Tiles) -> Verdict:
        return counted(self._before, tiles, self.T, self.S, self.block)

    @made_of("tiles")
    def _before(self) -> Tensor:
        """(B, H, nq + 1, nk + 1): how many tiles above and left of a corner are chosen."""
        return corners(self.tiles)

    @property
    def batch(self) -> int:
        return self.tiles.shape[0]

    @property
    def heads(self) -> int:
        return self.tiles.shape[1]

    @property
    def grain(self) -> tuple[int, int]:
        return self.block

    def to(self, device: torch.device | str) -> Mask:
        return (
            self
            if self.tiles.device == torch.device(device)
            else Chosen(self.tiles.to(device), self.T, self.S, self.block)
        )

    def __repr__(self) -> str:
        return f"chosen(<{'x'.join(map(str, self.tiles.shape))}>, block={self.block})"


def chosen(
    tiles: BlockLayout | Bool[Tensor, "#B #H nq nk"],
    T: int | None = None,
    S: int | None = None,
    block: int | tuple[int, int] | None = None,
) -> Mask:
    """Query block r may see key block c where tiles[b, h, r, c]: a BlockLayout, or a tensor with T, S and block.

    The last T of S positions are the queries. Blocks are (queries, keys) long, the last ones may be ragged.
    """
    if isinstance(tiles, BlockLayout):
        return Chosen(tiles.to_dense_blocks(), tiles.T, tiles.S, tiles.block)
    if T is None or S is None or block is None:
        raise ValueError(f"chosen: tiles need their T, S and block (got T={T}, S={S}, block={block})")
    (bq, bk) = pair(block)
    want = (-(-T // bq), -(-S // bk))
    if checks.tensor("chosen: tiles", tiles, (4,), "bool").shape[2:] != want:
        raise ValueError(
            f"chosen: tiles must be (B, H, {want[0]}, {want[1]}) for T={T}, S={S}, block={(bq, bk)} "
            f"(got {tuple(tiles.shape)})"
        )
    return Chosen(tiles, T, S, (bq, bk))
