"""Routing Transformer: online k-means gathers tokens into equal clusters, and attention runs inside.

Half of the heads route; the others see a local window. All clusters are of equal size, so after the gather one batched
attention runs them: C w^2 pairs a head instead of T^2, T^1.5 for C = w = sqrt(T). A token may be in several clusters,
or in none (then the head gives 0). Clusters and the attention inside them stand in `clusters.py`.

What it promises about causality: no value, and no gradient, of a later token reaches an earlier output. But tokens of
the whole sequence compete for the w places of a cluster, so a later token can change which earlier ones a token sees;
a prefix alone can therefore give other outputs, and it does not stream.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import number, whole
from regard.masks import Mask, padding
from regard.masks import causal as past
from regard.masks import window as near
from regard.pipeline.function import attention
from regard.pipeline.head_mixer import HeadMixer
from regard.routing.clusters import clustered_attention, gathered_tokens, nearest
from regard.tracing import exporting, recomputing

COMPETE = "tokens of the whole sequence compete for places in a cluster, so later ones can change an earlier one's keys"

CARD = Card(
    "routing_transformer",
    equation="""x = LN(q), y = LN(k)  (no scale, no bias)
y = x when causal: queries and keys share one projection and one route
I_c = the w tokens with the largest x . mu_c,   J_c likewise of y        for each of C centroids of a head
o[c, i] = softmax over j in J_c (j <= i when causal) of x_i . y_j, times v_j
out_i = mean of o[c, i] over the clusters c with i in I_c
training: N_c <- d N_c + (1 - d) n_c,  S_c <- d S_c + (1 - d) sum of the tokens nearest to mu_c,  mu_c = S_c / N_c""",
    papers=(
        Paper(
            "Efficient Content-Based Sparse Attention with Routing Transformers",
            "Roy et al.",
            2020,
            "2003.05997",
            "abstract; the authors' code",
        ),
    ),
    supports={"causal", "bidirectional", "padding", "packed", "compile"},
    traits={"routed", "sparse", "linear_in_values"},
    cost=Cost("B*H*D*(T*clusters + clusters*min(T, size)**2 + T*min(T, 2*window - 1))", ""),
    claim="O(T^1.5) in place of O(T^2): 4096 of 65536 pairs for 256 tokens: "
    "tests/routing/test_routing_transformer.py::test_pairs_grow_as_the_length_to_one_and_a_half.",
    differs=(
        "The mean over clusters is exact; the authors' code divides by the count + 0.01.",
        "Causality goes by position; the authors' by the order within a cluster, which is the same where queries and "
        "keys share a route.",
        "No commitment loss, so centroids follow the tokens and not the reverse.",
        "Padded tokens get no place in a cluster and move no centroid.",
    ),
    verified="third-party",
    example={"clusters": 3, "size": 5, "window": 3},
    tries={"num_local_heads": 1},
    exceptions={"L4": COMPETE, "L6": COMPETE},
    defaults={
        "clusters": "ours",
        "size": "ours",
        "num_local_heads": "ours, half of the heads",
        "window": "ours",
        "decay": "code, lucidrains",
        "bias": "ours",
    },
)


SMOOTHING = 1e-5
"""What every cluster's count is raised by, relative to all, so that an empty one divides by something."""
CALLS = 8
"""Passes whose centroids are kept for checkpoints."""


@CARD.module
class RoutingAttention(HeadMixer):
    """Self-attention whose last heads route by k-means and whose first `num_local_heads` see a window.

    Args:
        clusters: C, centroids of each routing head; about the root of the length.
        size: w, tokens in a cluster; about length / C. The defaults of both, and of `window`, are this library's.
        num_local_heads: below H; default half of the heads.
        window: keys that a local head sees to each side, its own included; when causal, back alone.
        decay: d, of the centroids' moving average, which is taken in training alone. The default is that of a public
            port; the authors' code has 0.99.
        bias: whether the projections have one.
    """

    counts: Tensor
    sums: Tensor
    _before: tuple[Tensor, ...] = ()
    """Those of the last passes in training before they moved. Checkpoints run passes once more, the last one first."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        clusters: int = 16,
        size: int = 128,
        num_local_heads: int | None = None,
        window: int = 128,
        decay: float = 0.999,
        head_dim: int | None = None,
        causal: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(dim, num_heads, head_dim=head_dim, causal=causal, bias=bias)
        local = num_heads // 2 if num_local_heads is None else num_local_heads
        whole(self, clusters=clusters, size=size, window=window)
        whole(self, 0, most=num_heads - 1, num_local_heads=local)
        number(self, least=0, most=1, decay=decay)
        self.clusters, self.size, self.num_local_heads, self.window, self.decay = clusters, size, local, window, decay
        if causal and local:  # routing heads take their queries for keys
            self.k_proj = nn.Linear(dim, local * self.head_dim, bias=bias)
        elif causal:
            self.register_module("k_proj", None)
        self.register_buffer("counts", torch.empty(num_heads - local, clusters))
        self.register_buffer("sums", torch.empty(num_heads - local, clusters, self.head_dim))
        self.reset_parameters()

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, clusters={self.clusters}, size={self.size}, "
            f"num_local_heads={self.num_local_heads}, window={self.window}"
        )

    def reset_parameters(self) -> None:
        """Random centroids, each of weight 1."""
        with torch.no_grad():
            nn.init.ones_(self.counts)
            self.sums.copy_(F.layer_norm(nn.init.normal_(self.sums), self.sums.shape[-1:]))

    @property
    def centroids(self) -> Float[Tensor, "H C D"]:
        """mu = S / N with N smoothed, in at least fp32."""
        wide = torch.promote_types(self.sums.dtype, torch.float32)
        counts, total = self.counts.to(wide), self.counts.to(wide).sum(-1, keepdim=True)
        counts = (counts + SMOOTHING) / (total + self.clusters * SMOOTHING) * total
        return self.sums.to(wide) / counts[..., None]

    def split(self, x: Float[Tensor, "B T M"], source: Float[Tensor, "B S C"]) -> tuple[Tensor, Tensor, Tensor]:
        if not self.causal:
            return super().split(x, source)
        projections = [p for p in (self.q_proj, self.v_proj, self.k_proj) if p is not None]
        q, v, *k = (p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in projections)
        return q, torch.cat([*k, q[:, self.num_local_heads :]], 1), v

    def mix(
        self,
        q: Float[Tensor, "B H T D"],
        k: Float[Tensor, "B H T D"],
        v: Float[Tensor, "B H T D"],
        keep: Bool[Tensor, "B T"] | None,
    ) -> Float[Tensor, "B H T D"]:
        again = None
        if self.training and self._before and recomputing():
            *rest, again = self._before
            self._before = tuple(rest)
        L, centroids = self.num_local_heads, self.centroids if again is None else again
        mask: Mask = near(self.window) & past() if self.causal else near(self.window)
        mask = mask if keep is None else mask & padding(keep)
        local = [attention(q[:, :L], k[:, :L], v[:, :L], mask=mask)] if L else []
        x = _normed(q[:, L:])
        y = x if self.causal else _normed(k[:, L:])
        if self.training and again is None:
            self._before = (*self._before[1 - CALLS :], centroids)
            for tokens in (x,) if self.causal else (x, y):
                self._follow(tokens, keep)
        v, T = v[:, L:], x.shape[2]
        if exporting():  # hidden tokens, so that there are enough for all places of a cluster
            x, y, v = (F.pad(z, (0, 0, 0, self.size)) for z in (x, y, v))
            keep = F.pad(x.new_ones(x.shape[0], T, dtype=torch.bool) if keep is None else keep, (0, self.size))
        queries = nearest(x, centroids, size=self.size, keep=keep)
        keys = queries if self.causal else nearest(y, centroids, size=self.size, keep=keep)
        routed = clustered_attention(x, y, v, queries, keys, causal=self.causal, keep=keep, scale=1.0)
        return torch.cat([*local, routed[:, :, :T]], 1)

    @torch.no_grad()
    def _follow(self, x: Tensor, keep: Tensor | None) -> None:
        """Move the centroids towards the tokens nearest to them."""
        counts, sums = gathered_tokens(x, self.centroids, keep)
        self.counts.lerp_(counts.to(self.counts.dtype), 1 - self.decay)
        self.sums.lerp_(sums.to(self.sums.dtype), 1 - self.decay)


def _normed(z: Tensor) -> Tensor:
    """Layer norm over the head width, statistics in at least fp32."""
    wide = torch.promote_types(z.dtype, torch.float32)
    return F.layer_norm(z.to(wide), z.shape[-1:], eps=1e-6).to(z.dtype)
