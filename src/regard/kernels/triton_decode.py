"""One new query per sequence against keys of which several sequences share some, as Triton kernels for GPUs.

The keys of all sequences lie in one pool. They are cut into pieces; a piece that several sequences share is read once
for the queries of all of them (chunk first), other pieces for their own sequence (sequence first); the parts of each
query are merged by their largest scores. Without sharing this is split-KV decoding. Grouped keys are not repeated; sums
are in float32. There is no backward.

Never run on a GPU yet: tested in Triton's interpreter only, and compiled for CUDA without a device.

Ye et al. 2024, "ChunkAttention: Efficient Self-Attention with Prefix-Aware KV Cache and Two-Phase Partition"
(https://arxiv.org/abs/2402.15220), as `regard.cache.PrefixTree` has it. Differs: own chunks are written out in parts
and merged with the shared ones by one kernel, not in the second phase itself.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from regard.checks import checked
from regard.kernels.triton_attention import installed, interpreted

SPLIT = 512
"""Tokens of a piece at most. Not measured."""
LARGEST = 64
"""Queries or keys a tile."""
ENTRIES = 4096
"""Entries of a tile of queries, keys or values at most."""
SMALLEST = 16
"""The least that a GPU's matrix unit takes."""


class Pieces(NamedTuple):
    """Which keys are read for which rows. Good for as long as rows grow within their last stretch only.

    A row's parts are written to slots: piece p fills slots slot[p] to slot[p] + rows[p].
    """

    start: Int[Tensor, " P"]
    """Where in the pool a piece begins."""
    tokens: Int[Tensor, " P"]
    position: Int[Tensor, " P"]
    """Of its first token in the row; what lies beyond the row's length is not read."""
    slot: Int[Tensor, " P"]
    rows: Int[Tensor, " P"]
    row_of: Int[Tensor, " slots"]
    order: Int[Tensor, " slots"]
    """The slots of row 0, then those of row 1, ..."""
    bounds: Int[Tensor, " N_plus_1"]
    """Where in `order` the slots of each row begin, and end."""
    most_rows: int
    """Rows of one shared piece at most: the first `shared` pieces."""
    shared: int


def pieces(
    shared: Sequence[tuple[Sequence[int], Sequence[slice]]],
    own: Sequence[Sequence[slice]],
    before: Sequence[int],
    *,
    rows_at_once: int,
    split: int = SPLIT,
    device: torch.device | str | None = None,
) -> Pieces:
    """Cut stretches of the pool into pieces of at most `split` tokens and `rows_at_once` rows.

    Args:
        shared: rows, and the stretches that they share, all of which every one of them sees.
        own: the other stretches of each row; the last may be used in part.
        before: how many tokens of each row are shared.
    """
    found: list[tuple[int, int, int, int, int]] = []
    row_of: list[int] = []

    def cut(rows: Sequence[int], stretches: Sequence[slice], position: int) -> None:
        for at in stretches:
            for start in range(at.start, at.stop, split):
                tokens = min(split, at.stop - start)
                found.append((start, tokens, position, len(row_of), len(rows)))
                row_of.extend(rows)
                position += tokens

    for rows, stretches in shared:
        for n in range(0, len(rows), rows_at_once):
            cut(rows[n : n + rows_at_once], stretches, 0)  # nothing is cut off, wherever it stands
    count, most = len(found), max((f[4] for f in found), default=1)
    for row, (stretches, position) in enumerate(zip(own, before, strict=True)):
        cut([row], stretches, position)
    columns = torch.tensor(found, dtype=torch.int32, device="cpu").view(-1, 5).T.contiguous().to(device)
    of = torch.tensor(row_of, dtype=torch.int32, device="cpu")
    ends = torch.bincount(of, minlength=len(own)).cumsum(0)
    bounds = torch.cat([ends.new_zeros(1), ends])
    of, order, bounds = (z.to(torch.int32).to(device) for z in (of, of.argsort(stable=True), bounds))
    first, tokens, position, slot, rows_of = columns
    return Pieces(first, tokens, position, slot, rows_of, of, order, bounds, most, count)


def rows_at_once(heads: int) -> int:
    """How many rows' queries fill a tile, with so many query heads to a key head."""
    return max(1, LARGEST // heads)


def why_not(q: Tensor) -> list[str]:
    """It is for GPUs (or for Triton's interpreter)."""
    if not installed():
        return ['triton is not installed: pip install "regard[triton]"']
    if not q.is_cuda and not (q.is_cpu and interpreted()):
        return [f"tensors are on {q.device.type}: only CUDA devices, or TRITON_INTERPRET=1 in the environment"]
    return []


@checked()
def triton_decode(
    q: Float[Tensor, "N H D"],
    k: Float[Tensor, "G P D"],
    v: Float[Tensor, "G P V"],
    cut: Pieces,
    lengths: Int[Tensor, " N"],
    *,
    scale: float,
) -> Float[Tensor, "N H V"]:
    """softmax(scale q k^T) v over the keys that `cut` gives each row, up to its length; 0 where there are none.

    Raises:
        ValueError: it can't run here (see `why_not`).
    """
    if reasons := why_not(q):
        raise ValueError(f'attend: kernel "triton" cannot run: {"; ".join(reasons)}')
    return _decode(q, k, v, list(cut[:8]), cut.most_rows, cut.shared, lengths, scale)


@checked()
def decode_batch(
    q: Float[Tensor, "B H D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S V"],
    lengths: Int[Tensor, " B"],
    *,
    scale: float | None = None,
    split: int = SPLIT,
) -> Float[Tensor, "B H V"]:
    """The same for caches that share nothing, of which row b's first lengths[b] tokens count; scale is 1 / sqrt(D)."""
    B, G, S, D = k.shape
    cut = pieces([], [[slice(b * G * S, b * G * S + S)] for b in range(B)], [0] * B, rows_at_once=1, split=split,
                 device=q.device)  # fmt: skip
    pool = max(0, (B - 1) * G + 1) * S  # heads lie S tokens apart, rows G S
    k, v = (z.contiguous().as_strided((G, pool, z.shape[3]), (S * z.shape[3], z.shape[3], 1)) for z in (k, v))
    return triton_decode(q, k, v, cut, lengths, scale=D**-0.5 if scale is None else scale)


class Tiles(NamedTuple):
    """Queries of a shared and of an own piece, keys, and features of a tile."""

    shared: int
    own: int
    keys: int
    features: int
    values: int


def tiles(heads: int, most_rows: int, D: int, V: int) -> Tiles:
    """For so many query heads to a key head, and rows to a piece."""
    features, values = _power(D), _power(V)
    keys = max(SMALLEST, min(LARGEST, ENTRIES // max(features, values)))
    return Tiles(_power(most_rows * heads), _power(heads), keys, features, values)


def _power(n: int) -> int:
    """The next power of two, at least `SMALLEST`."""
    return max(SMALLEST, 1 << (n - 1).bit_length())


@torch.library.custom_op("regard::triton_decode", mutates_args=())
def _decode(
    q: Tensor, k: Tensor, v: Tensor, cut: Sequence[Tensor], most_rows: int, shared: int, lengths: Tensor, scale: float
) -> Tensor:
    from regard.kernels import _triton_decode as programs

    (N, H, D), (G, _, V), dtype = q.shape, v.shape, q.dtype
    wide, (start, *of_piece, row_of, order, bounds) = torch.promote_types(dtype, torch.float32), cut
    q, k, v = _readable(q).contiguous(), _readable(k), _readable(v)
    m, z = torch.empty(2, len(row_of), H, device=q.device, dtype=wide)
    o, out = q.new_empty(len(row_of), H, V, dtype=wide), q.new_empty(N, H, V)
    tile = tiles(H // G, most_rows, D, V)
    exact = "tf32x3" if torch.version.hip is None else "ieee"  # AMD's matrix units have no TF32
    precision = "tf32" if exact == "tf32x3" and dtype.itemsize == 2 else exact
    for first, last, queries in ((0, shared, tile.shared), (shared, len(start), tile.own)):
        programs.run_pieces[last - first, G](
            q, k, v, start, *of_piece, row_of, lengths, m, z, o, first, *k.stride()[:2], *v.stride()[:2],
            H=H, R=H // G, D=D, V=V, SCALE=scale, PRECISION=precision,
            BM=queries, BN=tile.keys, BD=tile.features, BV=tile.values, num_warps=4, num_stages=2,
        )  # fmt: skip
    programs.run_merge[N * H,](m, z, o, order, bounds, out, H=H, V=V, BV=tile.values)
    return out.to(dtype)


@_decode.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cut: Sequence[Tensor], most_rows: int, shared: int, lengths: Tensor, scale: float
) -> Tensor:
    return q.new_empty(*q.shape[:2], v.shape[2])


def _readable(z: Tensor) -> Tensor:
    """Features without gaps. The interpreter doesn't round to bfloat16, so there it gets float32."""
    z = z.float() if z.dtype == torch.bfloat16 and interpreted() else z
    return z if z.stride(-1) == 1 else z.contiguous()


def _refuse(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError('attend: kernel "triton" has no derivatives; expected kernel="torch" for them')


_decode.register_autograd(_refuse)
