"""CATANet's token aggregation: tokens sorted by content attend in runs, and to centres of all images.

Centres are found by k-means over the training's images and kept as moving averages. A run of places in the sorted order
is no cluster: it may hold the end of one and the start of the next, and its queries see the run behind it, too.

While training, centres are the batch's own, of length 1, so that its images meet; in evaluation they are the averages.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, divides, number, whole
from regard.kernels.check import check_inputs
from regard.pipeline.function import attention
from regard.shapes import head_shape
from regard.tracing import as_it_is, recomputing

CARD = Card(
    "token_aggregation",
    equation="""u = LayerNorm(x),  label_i = argmax_j cos(u_i, c_j),  order = a stable sort of the tokens by label
O1 = attention of each run of g places in that order to the keys of its own and the next run
     (behind the last place the order runs backwards, so that its tokens count twice)
O2 = attention to the m centres: keys c Wkc, values c Wvc, the same queries u Wq
out = conv1x1((O1 + O2) Wo)
training: c <- num_iters rounds of spherical k-means over the batch, the last one with a gradient;
          means <- decay means + (1 - decay) c        evaluation: c = means""",
    papers=(
        Paper(
            "CATANet: Efficient Content-Aware Token Aggregation for Lightweight Image Super-Resolution",
            "Liu et al.",
            2025,
            "2503.06896",
            "abstract; the authors' code; not the paper's body",
        ),
    ),
    protocol="FeatureMixer",
    supports={"bidirectional", "compile"},
    traits={"routed"},
    cost=Cost(
        "2*B*M*(ceil(Y*X/min(Y*X, group_size))*2*min(Y*X, group_size)**2 + Y*X*num_centers)"
        " + B*Y*X*M*(num_centers + M) + 2*num_centers*M**2",
        "",
    ),
    claim="Runs of like tokens reach across the map for a quarter of its keys, where windows end: "
    "tests/routing/test_token_aggregation.py::test_a_token_sees_its_own_texture_across_the_map.",
    differs=(
        "The token mixer alone: the residual, the feed-forward part behind it and the window attention between the "
        "blocks belong to the super-resolution model, which is not built.",
        "The sort is stable; the authors' leaves to chance which tokens of a cluster share a run.",
        "Before any training evaluation has random centres; the authors' takes those of the batch's tokens.",
        "Where the map is too small for the reflection, which the authors' code refuses, there are fewer keys, and "
        "the tokens of the first centres are repeated to and fro.",
    ),
    verified="third-party",
    example={"num_centers": 5, "group_size": 8, "num_iters": 2},
    tries={"qk_dim": 12, "ema_decay": ...},
    exceptions={
        "L10 batch_rows_do_not_meet_in_training": "the paper's centres are those of the whole batch while it trains"
    },
    defaults={
        "qk_dim": "ours, as wide as dim; the models have 36 for 40",
        "num_centers": "code, the models' first block",
        "group_size": "code, the models' first block",
        "num_iters": "code, the models",
        "ema_decay": "code",
    },
)

CALLS = 8
"""Passes whose centres are kept for checkpoints."""


def nearest_center(u: Float[Tensor, "B N M"], centers: Float[Tensor, "1 m M"]) -> Int[Tensor, "B N"]:
    """The centre at the least angle to each token, the first among equals. No gradient."""
    with as_it_is(u.device):
        tokens = F.normalize(u.detach().to(centers.dtype), dim=-1)
        return (tokens @ F.normalize(centers.detach(), dim=-1).mT).argmax(-1)


def first_centers(u: Float[Tensor, "B N M"], number: int) -> Float[Tensor, "B m M"]:
    """Means of `number` contiguous runs of an image's tokens, which go on backwards until the runs are full."""
    N = u.shape[1]
    places = torch.arange(N + number - N % number, device=u.device) % (2 * N)
    places = torch.where(places < N, places, 2 * N - 1 - places)
    return u[:, places].unflatten(1, (number, -1)).mean(2)


def kmeans_step(u: Float[Tensor, "B N M"], centers: Float[Tensor, "1 m M"]) -> Float[Tensor, "1 m M"]:
    """Each centre becomes the direction of the sum of the batch's tokens next to it; one without any stays."""
    label = nearest_center(u, centers).flatten()
    unit, old = F.normalize(u, dim=-1).flatten(0, 1), F.normalize(centers, dim=-1)
    sums = torch.zeros_like(old[0]).index_add(0, label, unit)
    taken = torch.zeros_like(old[0, :, 0]).index_add(0, label, torch.ones_like(unit[:, 0])) > 0
    return torch.where(taken[:, None], F.normalize(sums, dim=-1), old[0])[None]


def sorted_groups(
    label: Int[Tensor, "B N"], size: int
) -> tuple[Int[Tensor, "B n g"], Int[Tensor, "B n u"], Bool[Tensor, "n u"] | None]:
    """Which tokens are the queries and the keys of each run of `size` places in the order of the labels.

    The order goes on backwards behind its end. Where there are too few tokens for that, the mask says which keys count.
    """
    N = label.shape[1]
    g = min(N, size)
    n = -(-N // g)
    order = label.argsort(dim=1, stable=True)
    ends = torch.cat([order, order.flip(1)[:, : n * g - N + g]], 1)
    real = None
    if ends.shape[1] < (n + 1) * g:
        real = (torch.arange((n + 1) * g, device=label.device) < ends.shape[1]).unfold(0, 2 * g, g)
        ends = F.pad(ends, (0, (n + 1) * g - ends.shape[1]))
    return ends[:, : n * g].unflatten(1, (n, g)), ends.unfold(1, 2 * g, g), real


@checked()
def group_attention(
    q: Float[Tensor, "B H N D"], k: Float[Tensor, "B H N D"], v: Float[Tensor, "B H N V"], label: Int[Tensor, "B N"],
    *, size: int,
) -> Float[Tensor, "B H N V"]:  # fmt: skip
    """Each token attends to the run of `size` tokens that it is in, sorted by label, and to the next one."""
    check_inputs(q, k, v)
    whole("group_attention", size=size)
    B, H, N, _ = q.shape
    if not N:
        return v.new_zeros(v.shape)
    queries, keys, real = sorted_groups(label, size)

    def runs(z: Tensor, index: Tensor) -> Tensor:
        """(B n, H, tokens, width)."""
        flat = index.flatten(1)[:, None, :, None].expand(-1, H, -1, z.shape[3])
        return z.gather(2, flat).unflatten(2, index.shape[1:]).transpose(1, 2).flatten(0, 1)

    mask = None if real is None else real.repeat(B, 1)[:, None, None].expand(-1, -1, queries.shape[2], -1)
    out = attention(runs(q, queries), runs(k, keys), runs(v, keys), mask=mask)
    out = out.unflatten(0, (B, -1)).transpose(1, 2).flatten(2, 3)[:, :, :N]
    back = queries.flatten(1)[:, :N].argsort(1)
    return out.gather(2, back[:, None, :, None].expand_as(out))


@CARD.module
class TokenAggregation(nn.Module):
    """Content-aware token aggregation of feature maps (B, dim, Y, X), without the residual.

    Args:
        dim, num_heads: M and H.
        qk_dim: width of all queries or keys together, a multiple of num_heads; default dim.
        num_centers: m; 16 to 128 in the released models.
        group_size: g, the tokens of a run; 256 to 32 there.
        num_iters: rounds of k-means in each pass of training.
        ema_decay: of the centres' moving averages.

    Raises ValueError for sizes that do not fit. State: `means` (m, dim), and whether they were ever set (`initted`).
    """

    means: Tensor
    initted: Tensor
    _before: tuple[Tensor, ...] = ()
    """The centres with which the last passes in training started. Checkpoints run passes once more, the last first."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qk_dim: int | None = None,
        num_centers: int = 16,
        group_size: int = 256,
        num_iters: int = 5,
        ema_decay: float = 0.999,
    ) -> None:
        super().__init__()
        head_shape(dim, num_heads, who="TokenAggregation")
        qk_dim = dim if qk_dim is None else qk_dim
        whole(self, qk_dim=qk_dim, num_centers=num_centers, group_size=group_size, num_iters=num_iters)
        divides(self, num_heads=num_heads, qk_dim=qk_dim)
        number(self, least=0, most=1, ema_decay=ema_decay)
        self.dim, self.num_heads, self.qk_dim, self.num_centers = dim, num_heads, qk_dim, num_centers
        self.group_size, self.num_iters, self.ema_decay = group_size, num_iters, ema_decay
        self.norm = nn.LayerNorm(dim)
        self.q_proj, self.k_proj, self.center_k_proj = (nn.Linear(dim, qk_dim, bias=False) for _ in range(3))
        self.v_proj, self.center_v_proj, self.o_proj = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.conv = nn.Conv2d(dim, dim, 1, bias=False)
        self.register_buffer("means", torch.empty(num_centers, dim))
        self.register_buffer("initted", torch.empty((), dtype=torch.bool))
        self.reset_parameters()

    def extra_repr(self) -> str:
        sizes = f"num_centers={self.num_centers}, group_size={self.group_size}"
        return f"{self.dim}, {self.num_heads}, qk_dim={self.qk_dim}, {sizes}"

    def reset_parameters(self) -> None:
        """As the authors' models: truncated normals of 0.02; the centres are those of the first pass in training."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
        with torch.no_grad():
            nn.init.normal_(self.means)
            self.initted.fill_(False)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        """Averages stay in at least fp32: in 16 bits a step of 0.001 is lost."""
        before = self.means
        super()._apply(fn, recurse)
        if self.means.dtype.itemsize < min(4, before.dtype.itemsize):
            self.means = before.to(self.means.device)
        return self

    @checked(M="dim")
    def forward(self, x: Float[Tensor, "B M Y X"]) -> Float[Tensor, "B M Y X"]:
        """The maps' new features. In training it moves `means`."""
        u = self.norm(x.flatten(2).mT)
        if x.numel() == 0:
            return x + 0 * u.sum()
        centers = self.centers(u)
        label = nearest_center(u, centers)
        q, k, v = (self._heads(f(u)) for f in (self.q_proj, self.k_proj, self.v_proj))
        c = centers.to(u.dtype)
        kc, vc = (self._heads(f(c)).expand(len(x), -1, -1, -1) for f in (self.center_k_proj, self.center_v_proj))
        out = group_attention(q, k, v, label, size=self.group_size) + attention(q, kc, vc)
        y = self.o_proj(out.transpose(1, 2).flatten(2))
        return self.conv(y.mT.unflatten(2, x.shape[2:]))

    def centers(self, u: Float[Tensor, "B N M"]) -> Float[Tensor, "1 m M"]:
        """c: the averages, or those of the batch while training, which moves the averages; in at least fp32."""
        wide = u.to(torch.promote_types(u.dtype, torch.float32))
        again = None
        if self.training and self._before and recomputing():
            *rest, again = self._before
            self._before = tuple(rest)
        if not self.training:
            return self.means.to(wide.dtype)[None]
        first = first_centers(wide.detach(), self.num_centers).mean(0)
        start = torch.where(self.initted, self.means.to(wide.dtype), first) if again is None else again
        c = start[None]
        for _ in range(self.num_iters - 1):
            c = kmeans_step(wide.detach(), c)
        c = kmeans_step(wide, c)
        if again is None:
            self._before = (*self._before[1 - CALLS :], start)
            with torch.no_grad():
                new = c[0].to(self.means.dtype)
                self.means.copy_(torch.where(self.initted, torch.lerp(new, self.means, self.ema_decay), new))
                self.initted.fill_(True)
        return c

    def _heads(self, z: Float[Tensor, "B N W"]) -> Float[Tensor, "B H N D"]:
        return z.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
