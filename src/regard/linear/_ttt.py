"""What TTT-Linear does with mini-batches: places of tokens in them, the inner gradient, and one after another."""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.checks import refuse
from regard.kernels.blocks import from_blocks, in_blocks
from regard.linear._shared import hide
from regard.tracing import exporting

EPS = 1e-6
"""Added to the variance."""
Residual = Literal["query", "output"]
Affine = tuple[Float[Tensor, "H 1 D"], Float[Tensor, "H 1 D"]]


class TTTState(NamedTuple):
    """What has been learnt since the start, and the mini-batch that is not full yet. Its size does not grow."""

    gained: Float[Tensor, "B H D1 D"]
    """What full mini-batches have added to W, and to b in the last row."""
    open: Float[Tensor, "B H D1 D"]
    """sum_j writing_j k_j^T g_j of the open one."""
    rate: Float[Tensor, "B H"]
    """The rate with which the last token read them."""
    filled: Int[Tensor, " B"]
    """Tokens in the open mini-batch."""
    inputs: Float[Tensor, "B past C"]
    """The last inputs of the layer's convolutions."""

    def learnt(self) -> Float[Tensor, "B H D1 D"]:
        """What the last token read has gained on the start."""
        return self.gained - self.rate[..., None, None] * self.open


def standard(z: Float[Tensor, "*b D"]) -> tuple[Float[Tensor, "*b D"], Float[Tensor, "*b 1"]]:
    """LN(z) without affine, and the deviation it was divided by."""
    z = z - z.mean(-1, keepdim=True)
    deviation = (z.square().mean(-1, keepdim=True) + EPS).sqrt()
    return z / deviation, deviation


def layer_norm(z: Float[Tensor, "*b D"], affine: Affine | None) -> Float[Tensor, "*b D"]:
    """LN(z) * w + c; z where there is neither."""
    return z if affine is None else standard(z)[0] * affine[0] + affine[1]


def slope(z: Float[Tensor, "*b D"], target: Float[Tensor, "*b D"], affine: Affine | None) -> Float[Tensor, "*b D"]:
    """The gradient of |LN(z) * w + c - target|^2 / 2 with respect to z."""
    if affine is None:
        return z - target
    y, deviation = standard(z)
    r = (y * affine[0] + affine[1] - target) * affine[0]
    return (r - r.mean(-1, keepdim=True) - y * (r * y).mean(-1, keepdim=True)) / deviation


def places(
    filled: Int[Tensor, " B"] | None, keep: Bool[Tensor, "B T"] | None, T: int, n: int, device: torch.device
) -> Int[Tensor, "#B T"]:
    """Where each token stands in its mini-batch; hidden ones stand where the real one before does."""
    at = torch.arange(T, device=device)[None] if keep is None else (keep.cumsum(1) - 1).clamp(min=0)
    return (at if filled is None else at + filled[:, None]) % n


def taught(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T D"],
    reading: Float[Tensor, "B H T"],
    writing: Float[Tensor, "B H T"],
    affine: Affine | None,
    start: Float[Tensor, "H D1 D"] | None,
    n: int,
    residual: Residual,
    keep: Bool[Tensor, "B T"] | None,
    state: TTTState | None,
) -> tuple[Float[Tensor, "B H T D"], TTTState]:
    """Mini-batch after mini-batch, each at once. All are as wide as sums have to be."""
    B, H, T, D = q.shape
    fresh = state is None
    if state is None:
        none = q.new_zeros(B, H, D + 1, D)
        count = torch.zeros(B, dtype=torch.long, device=q.device)
        state = TTTState(none, none, none[..., 0, 0], count, none[:, 0, :0])
    if exporting():
        told = "its mini-batches follow one another, and no graph holds any number of them"
        refuse("taught_linear", "export", told, f"{T} tokens", "torch.compile", error=NotImplementedError)
    if T == 0:
        return q, state
    k, v = hide(k, keep), hide(v, keep)
    writing = writing if keep is None else writing.masked_fill(~keep[:, None], 0)
    rates = torch.stack([reading, writing], -1)
    total = state.filled + (T if keep is None else keep.sum(1))
    to = None
    C = n if torch.compiler.is_compiling() else min(n, T)  # no columns that stay empty
    if T == 1 or (fresh and keep is None):
        cut = [in_blocks(z, C if T > 1 else 1, 2) for z in (q, k, v, rates)]
    else:  # the open mini-batch's tokens end where its columns do if they fill it up; hidden tokens go behind all
        N = -(-(T + (0 if fresh else n - 1)) // n)
        at = (torch.arange(T, device=q.device) if keep is None else keep.cumsum(1) - 1).expand(B, -1)
        count, place = state.filled[:, None], at + state.filled[:, None]
        to = torch.where(place < n, at + (count - n + C).clamp(min=0), place // n * C + place % n)
        to = to if keep is None else torch.where(keep, to, N * C)
        spread = (z.new_zeros(B, H, N * C + 1, z.shape[3]).scatter(2, _wide(to, z), z) for z in (q, k, v, rates))
        cut = [z[:, :, :-1].unflatten(2, (N, C)) for z in spread]
    qs, ks, vs, (reads, writes) = *cut[:3], cut[3].unsqueeze(-2).unbind(-1)
    asking, keys = (torch.cat([z, torch.ones_like(z[..., :1])], -1) for z in (qs, ks))
    weights = (asking @ keys.mT).tril()

    gained, pending, rate, outs = state.gained.to(q.dtype), state.open.to(q.dtype), state.rate.to(q.dtype), []
    for m in range(qs.shape[2]):
        now = gained if start is None else start + gained
        g = writes[:, :, m] * slope(keys[:, :, m] @ now, vs[:, :, m] - ks[:, :, m], affine)
        taken = weights[:, :, m] @ g
        if m == 0 and not fresh:
            taken = taken + asking[:, :, m] @ pending  # later on nothing is pending where tokens are left
        z = asking[:, :, m] @ now - reads[:, :, m] * taken
        outs.append((z if residual == "output" else qs[:, :, m]) + layer_norm(z, affine))
        pending = pending + keys[:, :, m].mT @ g
        full = (total >= (m + 1) * n)[:, None, None, None]
        gained = torch.where(full, gained - reads[:, :, m, -1:] * pending, gained)
        pending = torch.where(full, 0.0, pending)
    last = reading[..., -1] if keep is None else _last(reading, keep, rate)
    out = torch.stack(outs, 2)
    if to is None:
        out = from_blocks(out, T, 2)
    else:
        out = out.flatten(2, 3).gather(2, _wide(to.clamp(max=N * C - 1), out[..., 0, :]))
    return out, TTTState(gained, pending, last, total % n, state.inputs)


def _wide(at: Int[Tensor, "B T"], z: Float[Tensor, "B H t D"]) -> Int[Tensor, "B H T D"]:
    return at[:, None, :, None].expand(-1, z.shape[1], -1, z.shape[-1])


def _last(reading: Float[Tensor, "B H T"], keep: Bool[Tensor, "B T"], before: Float[Tensor, "B H"]) -> Tensor:
    """That of the last real token, or what was before it."""
    at = torch.where(keep, torch.arange(keep.shape[1], device=keep.device), -1).amax(1)
    found = reading.gather(2, at.clamp(min=0)[:, None, None].expand(-1, reading.shape[1], 1))[..., 0]
    return torch.where(at[:, None] >= 0, found, before)
