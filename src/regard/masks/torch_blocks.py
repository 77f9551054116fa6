"""A mask as torch's BlockMask: lists of the blocks that hold something, and of those that hold nothing masked.

Dong, Feng, Guessous, Liang, He 2024, https://arxiv.org/abs/2412.05496 (abstract; torch's own code).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

if TYPE_CHECKING:
    from regard.masks.algebra import Mask
    from regard.masks.layout import BlockLayout

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def block_mask(
    mask: "Mask", T: int, S: int, block: int | tuple[int, int], device: torch.device | str | None = None
) -> Any:
    """torch's BlockMask of the mask's layout, its `mask_mod` the mask's own predicate."""
    device = torch.device("cpu" if device is None else device)
    return of_layout(mask.layout(T, S, block=block), mask.to(device).mask_mod(T, S), device)


def of_layout(layout: "BlockLayout", mask_mod: MaskMod, device: torch.device) -> Any:
    """torch's BlockMask of these blocks."""
    from torch.nn.attention.flex_attention import BlockMask

    full = layout.to_dense_full()
    # As torch has it, which fills ragged blocks up with pairs that are masked: those are never full.
    full[..., layout.T // layout.block[0] :, :] = False
    full[..., layout.S // layout.block[1] :] = False
    return BlockMask.from_kv_blocks(
        *_ordered(layout.to_dense_blocks() & ~full, device),
        *_ordered(full, device),
        BLOCK_SIZE=layout.block,
        mask_mod=mask_mod,
        seq_lengths=(layout.T, layout.S),
    )


def _ordered(blocks: Tensor, device: torch.device) -> tuple[Int[Tensor, "B H nq"], Int[Tensor, "B H nq nk"]]:
    """How many blocks each row has, and their columns, ascending, before those it has not."""
    columns = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32).to(device), columns.int().to(device)
