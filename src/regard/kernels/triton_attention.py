"""Softmax attention over the blocks that a mask leaves, as Triton kernels for GPUs, forward and backward.

Any mask runs: full blocks ask no mask, empty ones are never visited, and of each partial block a small bool tile is
kept (see `_triton_walk`; the programs are in `_triton_attention`). Without a mask all blocks are visited. Keys are not
repeated for grouped queries, nothing of size T x S is formed, sums and the softmax are in float32.

Never run on a GPU yet: tested in Triton's interpreter only, and compiled for CUDA without a device.
"""

import math
import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from regard.kernels import block_sparse
from regard.kernels._triton_walk import Walk, walk
from regard.kernels.cost import Cost, io, products
from regard.kernels.problem import Problem, scaled, softmaxed

LARGEST = 64
"""Queries or keys a block."""
SMALLEST = 16
"""The least that a GPU's matrix unit takes."""
ENTRIES = {torch.float16: 2**13, torch.bfloat16: 2**13, torch.float32: 2**11}
"""Entries of a block of queries, keys or values at most, of which a program holds up to six. No matrix unit keeps
float32 whole, so there a product's terms fill registers too."""
WIDEST = 256
"""Head widths beyond this leave no room for a block of 16."""
BEHIND = 1.25
"""A pair is taken to cost so many times what it costs torch's flash kernel: an assumption, measured nowhere yet."""
PROGRAMS = 2**31 - 1
"""The largest grid, along its only axis."""


def why_not(p: Problem) -> list[str]:
    """It is softmax attention with a mask, on a GPU (or anywhere in Triton's interpreter)."""
    reasons = [f"{type(stage).__name__}: only plain softmax" for stage in softmaxed(p).stages if not _softmax(stage)]
    if p.bias is not None:
        reasons.append("bias: only masks")
    if p.dropout:
        reasons.append(f"dropout {p.dropout}: it draws no random numbers")
    if p.first_key and p.mask is not None:
        reasons.append("the cache has dropped keys already; its mask has no block layout")
    if p.mask is not None and torch.compiler.is_compiling():
        reasons.append("torch.compile can't look into the mask's layout: make it before and call triton_attention.over")
    if p.q.dtype not in ENTRIES:
        reasons.append(f"dtype {p.q.dtype}: only float16, bfloat16 and float32")
    if max(p.q.shape[3], p.v.shape[3]) > WIDEST:
        reasons.append(f"heads are {max(p.q.shape[3], p.v.shape[3])} wide: at most {WIDEST}")
    if not installed():
        reasons.append('triton is not installed: pip install "regard[triton]"')
    elif p.device_kind != "cuda" and not (p.device_kind == "cpu" and interpreted()):
        reasons.append(f"tensors are on {p.device_kind}: only CUDA devices, or TRITON_INTERPRET=1 in the environment")
    if not reasons and (programs := max(launch(p.q.shape, p.k.shape, p.v.shape, block_of(p)).programs)) > PROGRAMS:
        reasons.append(f"{programs} programs exceed the grid limit {PROGRAMS}: split the batch")
    return reasons


def run(p: Problem) -> Float[Tensor, "B H T V"]:
    """What `attention` gives for this problem."""
    return scaled(p, *attend(softmaxed(p)))


def cost(p: Problem) -> Cost:
    """The blocks that the mask stores; in the interpreter some milliseconds for each program of the grid."""
    block = block_of(p)
    density = block_sparse.facts(p, *block).density
    B, H, _, T, S = p.shape
    words = f"{density:.0%} of the blocks hold an allowed pair"
    flops = BEHIND * products(p, T * S * density)
    if p.device_kind != "cuda":
        return Cost(flops, 0, 1e4 * B * H * -(-T // block[0]), "Triton's interpreter", io(p))
    return Cost(flops, 0, 5, words, io(p))


def attend(p: Problem) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H T"]]:
    """Outputs and the natural log-sum-exp of each row's scores (-inf where it sees nothing), both differentiable."""
    block = block_of(p)
    found = None if p.mask is None else walk(p.mask, p.q.shape[2], p.k.shape[2], block, p.q.device)
    return over(p.q, p.k, p.v, found, scale=p.scale, block=block)


def over(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    found: Walk | None,
    *,
    scale: float,
    block: tuple[int, int],
) -> tuple[Float[Tensor, "B H T V"], Float[Tensor, "B H T"]]:
    """The same over lists of these blocks, made before; None visits all blocks."""
    from regard.kernels._triton_attention_op import forward  # imports triton

    lists, shape = ([], [1, 1]) if found is None else (found.tensors, [found.batch, found.heads])
    out, bound = forward(q, k, v, lists, scale, list(block), shape)
    return out, bound * math.log(2)


@cache
def installed() -> bool:
    """Whether there is a triton to import."""
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter; it must be said before triton is first imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _softmax(stage: object) -> bool:
    return bool(getattr(stage, "is_softmax", False))


# --- how the work is cut ------------------------------------------------------------------------------------------

Pair = tuple[int, int]


class Launch(NamedTuple):
    """How the programs are started."""

    width: Pair
    """D and V, filled up to powers of two."""
    warps: int
    stages: int
    programs: Pair
    """By blocks of queries (forward and dq), and by blocks of keys (dk and dv); both along the grid's first axis."""


def launch(q: Sequence[int], k: Sequence[int], v: Sequence[int], block: Pair) -> Launch:
    """The launch for tensors of these shapes, cut into these blocks."""
    (B, H, T, D), (_, G, S, V) = q, v
    width, (bq, bk) = (_power(D), _power(V)), block
    programs = B * H * -(-T // bq), B * G * -(-S // bk)
    return Launch(width, 4 if bq * bk <= 64 * 64 else 8, 2 if max(width) > 64 else 3, programs)


def block_of(p: Problem) -> Pair:
    """Queries and keys a block: the mask's own grain where the hardware takes it, no more than fits or than there are.

    The matrix units want powers of two from 16 up; other grains are cut across, which only makes more partial blocks.
    """
    T, S = p.q.shape[2], p.k.shape[2]
    fits = ENTRIES.get(p.q.dtype, 0) // _power(max(p.q.shape[3], p.v.shape[3]))
    most = max(SMALLEST, min(LARGEST, fits))
    own = (p.mask.grain if p.mask is not None else None) or (most, most)
    bq, bk = (n if SMALLEST <= n <= most and n & (n - 1) == 0 else most for n in own)
    return min(bq, _power(T)), min(bk, _power(S))


def _power(n: int) -> int:
    """The next power of two, at least `SMALLEST`."""
    return max(SMALLEST, 1 << (n - 1).bit_length())
