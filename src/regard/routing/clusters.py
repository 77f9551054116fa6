"""Tokens in clusters: who is near which centroid, and attention inside clusters, gathered into one batch."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from regard import masks
from regard.kernels.check import check_inputs
from regard.masks import Mask
from regard.pipeline.function import attention


def nearest(
    x: Float[Tensor, "B H T D"],
    centroids: Float[Tensor, "H C D"],
    *,
    size: int,
    keep: Bool[Tensor, "B T"] | None = None,
) -> Int[Tensor, "B H C w"]:
    """The `size` tokens (or all, if fewer) nearest to each centroid by dot product, in order of time. No gradient."""
    near = torch.einsum("bhtd,hcd->bhct", x.detach().to(centroids.dtype), centroids)
    if keep is not None:
        near = near.masked_fill(~keep[:, None, None], -math.inf)
    return near.topk(min(size, x.shape[2]), sorted=False).indices.sort().values


def clustered_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S V"],
    queries: Int[Tensor, "B H C w"],
    keys: Int[Tensor, "B H C u"],
    *,
    causal: bool = False,
    keep: Bool[Tensor, "B S"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "B H T V"]:
    """Attention from each cluster's queries to its keys; the mean over the clusters that hold a query, else 0.

    `queries` and `keys` are each cluster's tokens in order of time, as `nearest` gives them.
    """
    check_inputs(q, k, v)
    (B, H, T, _), C = q.shape, queries.shape[2]

    def gathered(z: Tensor, index: Tensor) -> Tensor:
        """(B, H C, width of index, width of z)."""
        rows = z.gather(2, index.flatten(2)[..., None].expand(-1, -1, -1, z.shape[3]))
        return rows.unflatten(2, index.shape[2:]).flatten(1, 2)

    mask: Mask | Tensor | None = None
    if causal and keys is queries and keep is None:
        mask = masks.causal()  # clusters stand in order of time
    elif causal or keep is not None:
        last = queries if causal else torch.full_like(queries, k.shape[2])
        allowed = keys[..., None, :] <= last[..., None]
        if keep is not None:
            allowed = allowed & keep[:, None, None].expand(-1, H, C, -1).gather(3, keys)[..., None, :]
        mask = allowed.flatten(1, 2)
    out = attention(
        gathered(q, queries),
        gathered(k, keys),
        gathered(v, keys),
        mask=mask,
        scale=scale,
    )
    out = out.unflatten(1, (H, C)).flatten(2, 3)
    index = queries.flatten(2)[..., None]
    total = out.new_zeros(B, H, T, v.shape[3]).scatter_add(2, index.expand_as(out), out)
    count = out.new_zeros(B, H, T, 1).scatter_add(2, index, torch.ones_like(out[..., :1]))
    return total / count.clamp(min=1)


def gathered_tokens(
    x: Float[Tensor, "B H T D"], centroids: Float[Tensor, "H C D"], keep: Bool[Tensor, "B T"] | None = None
) -> tuple[Float[Tensor, "H C"], Float[Tensor, "H C D"]]:
    """How many tokens are nearest to each centroid, and their sum."""
    x = x.detach().to(centroids.dtype)
    near = F.one_hot(torch.einsum("bhtd,hcd->bhtc", x, centroids).argmax(-1), centroids.shape[1]).to(x.dtype)
    if keep is not None:
        near = near * keep[:, None, :, None]
    return near.sum((0, 2)), torch.einsum("bhtc,bhtd->hcd", near, x)
