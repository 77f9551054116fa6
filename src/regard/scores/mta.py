"""Multi-token attention: convolves scores and weights over neighbouring tokens, and mixes heads.

The kernel reaches back over queries and to both sides over keys, and what is out of range counts as 0. Neither form
looks at later queries, so that without causality the formula stays as it is.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from regard.cards import Card, Cost, Paper
from regard.checks import choice, divides, number, refuse, whole
from regard.stages import Gate, GateSite, Mix, Rows

CARD = Card(
    "mta",
    equation="""P'[h,t,s] = sum_{i<cq, j<ck} K[h,i,j] Z[h, t - (cq-1) + i, s - (ck-1)/2 + j]
    Z = q k^T / sqrt(D), masked entries 0;   cq = query_size, ck = key_size
A = softmax(mask(sum_h W[g,h] P'[h])),   A' = heads mixed in groups( conv(A), masked entries 0 )
y = concat_h( N(A' v) * sigmoid(N(A' v) w + b) ) W_o,   N = RMS norm of a head (times 1 - lambda_l)""",
    papers=(
        Paper(
            "Multi-Token Attention",
            "Golovneva, Wang, Weston, Sukhbaatar",
            2025,
            "2504.00927",
            "abstract; official code",
        ),
    ),
    cost=Cost("2*B*H*T*S*D + 2*B*H*T*S*query_size*key_size + B*H*T*S*(H + head_group)", "S*(2*G*D + H*D)"),
    claim="Two taps find a key only where two neighbours match together: "
    "tests/scores/test_mta.py::test_finds_two_neighbouring_keys_where_one_query_cannot.",
    differs=(
        "The depth scaling 1 - lambda_l is off unless `layer` is given, and a gate follows the norm, both as in the "
        "released configurations.",
        "The gate's weights start as those of torch's linear layers, not truncated normal of deviation M^(-1/2).",
        "The released models convolve in every fourth layer only, which is the host model's choice.",
        "Streaming keeps queries too, since earlier rows of scores are needed again.",
    ),
    verified="third-party",
    example={"query_size": 3, "key_size": 3, "head_group": 2},
    tries={"layer": 3},
    defaults={
        "query_size": "code, released language models",
        "key_size": "code, released language models",
        "head_group": "code, released language models",
        "layer": "code, released language models",
        "eps": "code",
    },
)


def key_query_conv(
    z: Float[Tensor, "B H t S"],
    kernel: Float[Tensor, "H cq ck"],
    allowed: Bool[Tensor, "#B #H t S"] | None = None,
) -> Float[Tensor, "B H t S"]:
    """Correlate each head's map with its kernel; the last kernel row belongs to the query itself."""
    if allowed is not None:
        z = z.masked_fill(~allowed, 0)
    rows, keys = kernel.shape[1:]
    padded = F.pad(z, (keys // 2, keys // 2, rows - 1, 0))
    return F.conv2d(padded, kernel[:, None].to(z.dtype), groups=kernel.shape[0])


class KeyQueryConv(Mix):
    """The convolution before (`on="scores"`) or after (`on="weights"`) the softmax; there, masked entries end as 0."""

    sees = "rows"

    def __init__(
        self,
        num_heads: int,
        *,
        query_size: int = 6,
        key_size: int = 11,
        on: Literal["scores", "weights"] = "scores",
    ) -> None:
        super().__init__()
        whole(self, num_heads=num_heads, query_size=query_size, key_size=key_size)
        if key_size % 2 == 0:
            refuse(self, "key_size", "is even", key_size, "an odd one, so that a key stands in the middle")
        choice(self, ("scores", "weights"), on=on)
        self.halo, self.on = query_size - 1, on
        self.kernel = nn.Parameter(torch.empty(num_heads, query_size, key_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity: only the tap of the query and key themselves is 1."""
        nn.init.zeros_(self.kernel)
        with torch.no_grad():
            self.kernel[:, -1, self.kernel.shape[2] // 2] = 1

    def forward(self, z: Float[Tensor, "B H t S"], rows: Rows) -> Float[Tensor, "B H t S"]:
        mixed = key_query_conv(z, self.kernel, rows.allowed)
        if self.on == "scores" or rows.allowed is None:
            return mixed
        return mixed.masked_fill(~rows.allowed, 0)


class HeadMix(Mix):
    """Mixes groups of neighbouring heads: out[r, g] = sum_h weight[r, g, h] in[r, h]. Without `group`, all heads."""

    def __init__(self, num_heads: int, *, group: int | None = None) -> None:
        super().__init__()
        group = num_heads if group is None else group
        whole(self, num_heads=num_heads, group=group)
        divides(self, group=group, num_heads=num_heads)
        self.weight = nn.Parameter(torch.empty(num_heads // group, group, group))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.copy_(torch.eye(self.weight.shape[-1]).expand_as(self.weight))

    def forward(self, z: Float[Tensor, "B H t s"], rows: Rows) -> Float[Tensor, "B H t s"]:
        if rows.allowed is not None:  # what no head may see must not reach the weights' gradient, not even as 0 * NaN
            z = z.masked_fill(~rows.allowed.any(1, keepdim=True), 0)
        grouped = z.unflatten(1, self.weight.shape[:2])
        return torch.einsum("rgh,brhts->brgts", self.weight.to(z.dtype), grouped).flatten(1, 2)


class MixSequence(Mix):
    """Several mixes, one after the other. It sees, reaches back and needs what any of them does."""

    def __init__(self, mixes: Sequence[Mix]) -> None:
        super().__init__()
        self.mixes = nn.ModuleList(mixes)
        self.sees = "rows" if any(mix.sees == "rows" for mix in mixes) else "tile"
        self.halo = sum(mix.halo for mix in mixes)
        self.needs = frozenset().union(*(mix.needs for mix in mixes))

    def forward(self, z: Float[Tensor, "B H t s"], rows: Rows) -> Float[Tensor, "B H t s"]:
        for mix in self.mixes:
            z = mix(z, rows)
        return z


class HeadNormGate(Gate):
    """RMS norm of each head's output, and one sigmoid gate per head read from the normalised output."""

    def __init__(self, head_dim: int, *, layer: int | None = None, eps: float = 1e-5) -> None:
        super().__init__()
        whole(self, head_dim=head_dim)
        if layer is not None:
            whole(self, 0, layer=layer)
        number(self, least=0, eps=eps)
        self.eps = eps
        self.depth_scale = 1.0 if layer is None else 0.2 + 0.6 * math.exp(-0.3 * layer)
        self.norm_weight = nn.Parameter(torch.empty(head_dim))
        self.proj = nn.Linear(head_dim, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.norm_weight)
        self.proj.reset_parameters()

    def forward(self, z: Tensor, x: Float[Tensor, "B T M"], at: GateSite) -> Tensor:
        if at != self.site:
            return z
        wide = z.to(torch.promote_types(z.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        normed = (normed * self.norm_weight * self.depth_scale).to(z.dtype)
        return normed * torch.sigmoid(self.proj(normed))


@CARD.fills()
def mta(
    num_heads: int,
    head_dim: int,
    *,
    query_size: int = 6,
    key_size: int = 11,
    head_group: int = 16,
    layer: int | None = None,
    eps: float = 1e-5,
) -> dict[str, Mix | Gate]:
    """The released configuration; weights are mixed in equal groups of at most `head_group` heads.

    Args:
        query_size: cq, how many queries a kernel spans: the query's own and those before it.
        key_size: ck, how many keys; odd.
        head_group: how many neighbouring heads are mixed after the softmax.
        layer: the layer's number from 0, for the depth scaling.
        eps: of the norm.
    """
    whole("mta", head_group=head_group)
    kernel: dict[str, Any] = {"query_size": query_size, "key_size": key_size}
    group = max(g for g in range(1, min(head_group, num_heads) + 1) if num_heads % g == 0)
    return {
        "score_mix": MixSequence([KeyQueryConv(num_heads, **kernel), HeadMix(num_heads)]),
        "weight_mix": MixSequence([KeyQueryConv(num_heads, on="weights", **kernel), HeadMix(num_heads, group=group)]),
        "gate": HeadNormGate(head_dim, layer=layer, eps=eps),
    }
