"""What NAtS computes: types of tokens, the mask that they make, and attention under it, with a gradient for them."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard.checks import fits
from regard.kernels.check import check_inputs

GLOBAL, LOCAL, SLIDING = range(3)
BEYOND = 2**52
"""A place that no token has."""
ELEMENTS = 2**22
"""About so many weights are formed at once."""


def token_types(
    logits: Float[Tensor, "B G T 3"],
    *,
    noise: Float[Tensor, "B G T 3"] | None = None,
    tau: float = 1.0,
    forced: Bool[Tensor, "B T"] | None = None,
) -> Float[Tensor, "B G T 3"]:
    """One hot of the largest, with the gradient of the softmax of (logits + noise) / tau.

    Args:
        forced: these are global, and have no gradient.
    """
    z = (logits if noise is None else logits + noise) / tau
    soft = z.softmax(-1)
    types = F.one_hot(z.argmax(-1), 3).to(z.dtype) + (soft - soft.detach())
    if forced is None:
        return types
    return torch.where(forced[:, None, :, None], torch.tensor([1.0, 0, 0], dtype=z.dtype, device=z.device), types)


def next_global(
    is_global: Bool[Tensor, "*b n"], at: Int[Tensor, "*b n"], *, after: bool = False
) -> Int[Tensor, "*b n"]:
    """Where the first global token from each on stands, or after it; where there is none, beyond every place."""
    here = at.masked_fill(~is_global, BEYOND)
    if after and at.shape[-1]:
        here = F.pad(here[..., 1:], (0, 1), value=BEYOND)
    return here.flip(-1).cummin(-1).values.flip(-1)


def nats_mask(types: Float[Tensor, "B G T 3"], window: int) -> Bool[Tensor, "B G T T"]:
    """Which query sees which key."""
    at = torch.arange(types.shape[2], device=types.device).expand(types.shape[:3])
    return _mask(types.detach(), at, at[0, 0], window, _until(types, at, "own")) > 0.5


def _until(types: Tensor, at: Tensor, local_end: Literal["own", "next"]) -> Tensor:
    is_global = types[..., GLOBAL] > 0.5
    return next_global(is_global, at, after=local_end == "next")


def _mask(types: Tensor, at: Tensor, rows: Int[Tensor, " t"], window: int, until: Tensor) -> Float[Tensor, "B G t n"]:
    """M of these query positions, with the gradient of the types."""
    i, j = rows[:, None], at[..., None, :]
    share = types[..., None, :, GLOBAL] + types[..., None, :, LOCAL] * (i <= until[..., None, :])
    return (share + types[..., None, :, SLIDING] * (i <= j + window)) * (j <= i)


def nats_attention(
    q: Float[Tensor, "B H t D"],
    k: Float[Tensor, "B G n D"],
    v: Float[Tensor, "B G n V"],
    types: Float[Tensor, "B G n 3"],
    *,
    window: int,
    at: Int[Tensor, "B G n"] | None = None,
    local_end: Literal["own", "next"] = "own",
    scale: float | None = None,
) -> Float[Tensor, "B H t V"]:
    """Attention of the last t tokens under the mask of the types, and the gradient for these.

    Args:
        types: one hot; all 0 for a key that is hidden.
        at: where keys stand, in order; default one after the other.
        local_end: where a global token would end as a local one: at itself, or at the "next" global one.
    """
    check_inputs(q, k, v)
    fits("nats_attention", "B G n 3", {"B": k.shape[0], "G": k.shape[1], "n": k.shape[2]}, types=types)
    (B, H, t, D), (G, n), V = q.shape, k.shape[1:3], v.shape[3]
    if at is None:
        at = torch.arange(n, device=q.device).expand(B, G, n)
    scale = D**-0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v, types = q.to(wide).view(B, G, H // G, t, D) * scale, k.to(wide), v.to(wide), types.to(wide)
    learns, found = torch.is_grad_enabled() and types.requires_grad, []
    hard, until = _until(types, at, "own"), _until(types, at, local_end)
    places = at.amax((0, 1))[n - t :] if at.numel() else torch.arange(t, device=q.device)
    size = max(1, ELEMENTS // max(1, B * H * n))
    for rows in torch.arange(t, device=q.device).split(size) if t else ():
        last = n - t + int(rows[-1]) + 1
        part = [x[:, :, :last] for x in (k, v, types, at, hard, until)]
        keys, values, kinds = part[:3]
        s = torch.einsum("bgrtd,bgnd->bgrtn", q[:, :, :, rows], keys)
        seen = (_mask(kinds.detach(), part[3], places[rows], window, part[4]) > 0.5)[:, :, None]
        weights = s.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0.0)
        out = torch.einsum("bgrtn,bgnv->bgrtv", weights, values)
        if learns:
            soft = _mask(kinds, part[3], places[rows], window, part[5])
            there = ((kinds.detach().sum(-1) > 0.5)[:, :, None] & (part[3][:, :, None] <= places[rows, None]))[
                :, :, None
            ]
            every = s.detach().masked_fill(~there, -torch.inf).softmax(-1).masked_fill(~there, 0.0)
            share = every * (soft - soft.detach())[:, :, None]
            steps = torch.einsum("bgrtn,bgnv->bgrtv", share, values.detach())
            out = out + steps - share.sum(-1, keepdim=True) * out.detach()
        found.append(out)
    out = torch.cat(found, 3) if found else v.new_zeros(B, G, H // G, 0, V)
    return out.reshape(B, H, t, V)


class _Priced(torch.autograd.Function):
    """Types as they are, with a price added to their gradient."""

    @staticmethod
    def forward(ctx: Any, types: Tensor, price: Tensor) -> Tensor:
        ctx.save_for_backward(price)
        return types.view_as(types)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] + ctx.saved_tensors[0], None


def priced_types(types: Float[Tensor, "B G T 3"], sparsity: float) -> Float[Tensor, "B G T 3"]:
    """The types, with a gradient against those that live long: for the share of the sequence that each still lives."""
    T = types.shape[2]
    at = torch.arange(T, device=types.device).expand(types.shape[:3])
    hard = types.detach() > 0.5
    lives = (next_global(hard[..., GLOBAL], at).clamp(max=max(T - 1, 0)) - at) * hard[..., LOCAL]
    price = torch.stack([(T - at) * hard[..., GLOBAL], lives, torch.zeros_like(at)], -1).to(types.dtype)
    return _Priced.apply(types, price * (sparsity / max(T, 1)))  # type: ignore[no-any-return, no-untyped-call]
