"""What layers of latents share: keys and values made of one, or queries brought to its side."""

from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn


def expand(
    c: Float[Tensor, "B S C"], k_r: Float[Tensor, "B S R"], up: Float[Tensor, "H NV C"], nope_dim: int
) -> tuple[Float[Tensor, "B H S D"], Float[Tensor, "B H S V"]]:
    """Keys and values of every head."""
    k, v = torch.einsum("bsc,hnc->bhsn", c, up).tensor_split((nope_dim,), -1)
    return torch.cat([k, k_r[:, None].expand(-1, len(up), -1, -1)], -1), v


def absorb(q: Float[Tensor, "B H t D"], up: Float[Tensor, "H NV C"], nope_dim: int) -> Float[Tensor, "B H t CR"]:
    """Queries that score [c | k_r] as q scores the keys that are made of them."""
    q_n, q_r = q.tensor_split((nope_dim,), -1)
    return torch.cat([q_n @ up[:, :nope_dim], q_r], -1)


def normed(norm: nn.RMSNorm, z: Tensor) -> Tensor:
    """In the dtype of its weight, as autocast projects to fewer bits."""
    return norm(z.to(norm.weight.dtype)).to(z.dtype)


class Latents(TypedDict, total=False):
    """The keywords that every layer of latents has."""

    kv_rank: int
    nope_dim: int
    value_dim: int
    interleaved: bool
    absorb: bool
    eps: float
    bias: bool
    dropout: float
    scale: float | None
    kernel: str
