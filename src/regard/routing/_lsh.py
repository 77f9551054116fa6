"""Locality-sensitive hashing: buckets by random rotations, and which tokens meet once they are sorted into chunks."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MOST = 128
"""Directions on which the sides are told apart at once."""
Halves = tuple[Int[Tensor, " #B"], Int[Tensor, " #B"]]
"""Half of each factor of the number of buckets, one for each sequence or one for all; 0 where there is one factor."""


def _split(power: int, chunk: int) -> tuple[int, int]:
    """Halves for 2^power buckets: two factors if there are more than 2 chunk."""
    if 2**power <= 2 * min(chunk, MOST):
        return 2 ** (power - 1), 0
    return 2 ** (power // 2 - 1), 2 ** (power - power // 2 - 1)


def _powers(chunk: int) -> range:
    return range(1, 2 * int(math.log2(2 * min(chunk, MOST))) + 1)


def halves(buckets: int | tuple[int, int] | None, count: Int[Tensor, " #B"], chunk: int) -> Halves:
    """By default the power of two below 2 count / chunk."""
    if buckets is not None:
        first, second = (buckets, 0) if isinstance(buckets, int) else buckets
        return torch.full_like(count, first // 2), torch.full_like(count, second // 2)
    table = torch.tensor([(2**p, *_split(p, chunk)) for p in _powers(chunk)], device=count.device)
    at = ((2 * (count // chunk))[:, None] >= table[:, 0]).sum(1).clamp(min=1) - 1
    return table[at, 1], table[at, 2]


def columns(buckets: int | tuple[int, int] | None, T: int | None, chunk: int) -> int:
    """Random directions a round that T tokens need; without T, as many as any number of tokens does."""
    if buckets is not None:
        return buckets // 2 if isinstance(buckets, int) else sum(buckets) // 2
    if T is None:
        return 2 * min(chunk, MOST)
    return sum(_split(max([p for p in _powers(chunk) if 2**p <= 2 * (T // chunk)], default=1), chunk))


@torch.no_grad()
def hashed(
    z: Float[Tensor, "B H T D"], rotations: Float[Tensor, "H D R C"], number: Halves, real: Bool[Tensor, "#B T"]
) -> Int[Tensor, "B H R T"]:
    """The bucket of each token in each round; what is not real has one of its own, behind all others."""
    turned = torch.einsum("bhtd,hdrc->bhrtc", z.detach(), rotations.to(z.dtype))
    column = torch.arange(turned.shape[4], device=z.device)
    start, factor = torch.zeros_like(number[0]), torch.ones_like(number[0])
    bucket = torch.zeros_like(turned[..., 0], dtype=torch.long)
    for half in number:
        inside = (column >= start[:, None]) & (column < (start + half)[:, None])
        # The greatest of x and -x is where |x| is, on the side of its sign.
        at = turned.abs().masked_fill(~inside[:, None, None, None], -1.0).argmax(4, keepdim=True)
        behind = turned.gather(4, at)[..., 0] < 0
        start_, half_, factor_ = (n.view(-1, 1, 1, 1) for n in (start, half, factor))
        bucket = bucket + torch.where(half_ > 0, factor_ * (at[..., 0] - start_ + half_ * behind), 0)
        start, factor = start + half, factor * (2 * half).clamp(min=1)
    return torch.where(real[:, None, None], bucket, factor.view(-1, 1, 1, 1))


def near_chunks(
    count: Int[Tensor, " #B"], R: int, N: int, chunk: int, before: int = 1, after: int = 0
) -> tuple[Int[Tensor, "#B n w"], Bool[Tensor, "#B n w"]]:
    """The chunks that each chunk sees, each once: those with real tokens stand in a circle, round after round.

    The second: which of them count, where a row's circle is shorter than the window.
    """
    before = min(before, R * N - 1)
    after = min(after, R * N - 1 - before)
    used = ((count + chunk - 1) // chunk).clamp(min=1)[:, None, None]
    at = torch.arange(R * N, device=count.device)[:, None]
    steps = torch.arange(-before, after + 1, device=count.device)
    near = (at // N * used + at % N + steps) % (R * used)
    once = (steps > -R * used) & (steps + (R * used - 1).clamp(max=before) < R * used)
    return near // used * N + near % used, once.expand(near.shape)


def _of(table: Int[Tensor, "B H R T"], r: Int[Tensor, " n"], index: Int[Tensor, "B H n w"]) -> Int[Tensor, "B H n w"]:
    """table[r] at the tokens in index."""
    at = index + (r * table.shape[3])[:, None]
    return table.flatten(2).gather(2, at.flatten(2)).view(index.shape)


def together(bucket: Tensor, r: Tensor, i: Tensor, j: Tensor) -> Bool[Tensor, "B H n c k"]:
    """Whether the tokens share a bucket in round r."""
    return _of(bucket, r, i)[..., None] == _of(bucket, r, j)[..., None, :]


def met(bucket: Tensor, chunk: Tensor, near: Tensor, i: Tensor, j: Tensor, same: bool) -> Int[Tensor, "B H n c k"]:
    """How often i sees j, all rounds and all places of j in a window counted. `chunk`: each token's in each round."""
    (_, _, R, _), N = chunk.shape, near.shape[1] // chunk.shape[2]
    near, total = near.expand(i.shape[0], -1, -1)[:, None].expand(-1, i.shape[1], -1, -1), i.new_zeros(())
    rounds = [(r, o) for r in range(R) for o in range(R) if r == o or not same]
    for r, o in rounds:
        here, there = (torch.full_like(i[0, 0, :, 0], n) for n in (r, o))
        seen = _of(chunk, here, i).flatten(2) + r * N
        its = _of(chunk, there, j)[..., None, :] + o * N
        for w in range(near.shape[3]):
            found = near[..., w].gather(2, seen).view(i.shape)[..., None] == its
            total = total + (found & together(bucket, here, i, j) if same else found)
    return total


def gathered(z: Float[Tensor, "B H T D"], index: Int[Tensor, "B H n w"]) -> Float[Tensor, "B H n w D"]:
    return z.gather(2, index.flatten(2)[..., None].expand(-1, -1, -1, z.shape[3])).unflatten(2, index.shape[2:])


def one_softmax(
    parts: list[tuple[Tensor, Tensor, Tensor]], rank: Int[Tensor, "B H R T"]
) -> tuple[Float[Tensor, "B H T 1"], Float[Tensor, "B H T V"]]:
    """Sums of weights, and of weights times values, of all rounds; `rank`: where each token was sorted to.

    `parts`, of some chunks each: the largest score of each row, and both sums relative to it.
    """
    R, T = rank.shape[2:]
    joined = (torch.cat(z, 2).flatten(2, 3).unflatten(2, (R, T)) for z in zip(*parts, strict=True))
    top, total, mixed = (z.gather(3, rank[..., None].expand(-1, -1, -1, -1, z.shape[4])) for z in joined)
    most = top.amax(2, keepdim=True)
    share = (top - most.masked_fill(most == -math.inf, 0)).exp()
    return (share * total).sum(2), (share * mixed).sum(2)
