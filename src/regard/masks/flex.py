"""FlexAttention's masks: mask_mod functions and BlockMask as masks of this library. `Mask.block_mask` is the way back.

torch's q_idx counts from the first query that is handed in, the positions of `Mask` from the first key. They are the
same where T = S; else the last query stands where the last key stands, and q_idx = i - (S - T).

Dong, Feng, Guessous, Liang, He 2024, https://arxiv.org/abs/2412.05496 (abstract; torch's own code).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from regard.checks import refuse
from regard.masks.algebra import Mask
from regard.masks.checks import lengths
from regard.masks.selection import chosen
from regard.masks.tensors import Predicate, predicate

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def from_mask_mod(
    mask_mod: MaskMod, T: int, S: int | None = None, *, batch: int | None = None, heads: int | None = None
) -> Mask:
    """torch's `mask_mod(b, h, q_idx, kv_idx)`, whose q_idx counts T queries from 0, as the last T of S positions.

    Args:
        batch, heads: for how many batch rows (heads) it is made, if it reads b (h), as in `predicate`.
    """
    T, S = lengths("from_mask_mod", T, S)
    rule: Any = predicate(mask_mod, batch=batch, heads=heads)
    return replace(rule, shift=S - T)


def from_block_mask(block_mask: Any) -> Mask:
    """torch's BlockMask: its full blocks, and what its mask_mod allows in the partial ones.

    It is made for the T queries and S keys that the BlockMask was made for. One with a batch (or head) size of 1
    serves every batch row (head); a mask_mod that tells them apart needs one of their number, in torch too.
    """
    if type(block_mask).__name__ != "BlockMask":
        wanted = "torch's BlockMask, as create_block_mask gives"
        refuse(
            "from_block_mask", "block_mask", "has the wrong type", type(block_mask).__name__, wanted, error=TypeError
        )
    (T, S), block = block_mask.seq_lengths, tuple(block_mask.BLOCK_SIZE)
    nq, nk = -(-T // block[0]), -(-S // block[1])
    partial = _grid(block_mask.kv_num_blocks, block_mask.kv_indices)[..., :nq, :nk]
    sizes = tuple(partial.shape[:2])
    rule = Predicate(block_mask.mask_mod, (sizes[0], sizes[1]), S - T)
    mask: Mask = chosen(partial, T, S, block) & rule
    if block_mask.full_kv_num_blocks is None:
        return mask
    full = _grid(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)[..., :nq, :nk]
    return chosen(full, T, S, block) | mask


def _grid(count: Int[Tensor, "*b nq"], columns: Int[Tensor, "*b nq n"]) -> Bool[Tensor, "B H nq n"]:
    """True at the first `count` columns of each row."""
    n = columns.shape[-1]
    listed = torch.arange(n, device=columns.device) < count[..., None]
    # What stands behind the listed ones means nothing, and may repeat them: it goes to a column of its own.
    grid = torch.zeros(*columns.shape[:-1], n + 1, dtype=torch.bool, device=columns.device)
    grid = grid.scatter(-1, torch.where(listed, columns.long(), n), True)[..., :n]
    return grid.reshape((1,) * (4 - grid.dim()) + grid.shape)
