"""Point Transformer: vector attention over near points, in which every channel has weights of its own."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, divides, refuse, whole
from regard.graph._edges import check_edges, edge_softmax, edge_sum, with_loops
from regard.kinds import EdgeWeights
from regard.shapes import HeadShape
from regard.tracing import readable


def _inputs(shape: HeadShape) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    nodes = torch.randn(12, shape.dim, generator=generator, dtype=torch.float64)
    pos = torch.rand(12, 3, generator=generator, dtype=torch.float64)
    return nodes, nearest(pos, 4)[:, 1:], pos  # the first point does not see itself, which self_loops changes


CARD = Card(
    "point_transformer",
    equation="""delta_ij = theta(p_i - p_j)                        theta, gamma: Linear, ReLU, Linear
r_ij = gamma(W_q x_i - W_k x_j + delta_ij)
y_i = sum over j of softmax_j(r_ij) * (W_v x_j + delta_ij)      elementwise: each channel has its own softmax
share = s: gamma gives C / s numbers, and channels c, c + C / s, ... have one weight""",
    papers=(
        Paper(
            "Point Transformer",
            "Zhao et al.",
            2020,
            "2012.09164",
            "abstract; code of the first author and of torch_geometric",
        ),
    ),
    protocol="GraphMixer",
    inputs=_inputs,
    supports={"bidirectional", "compile"},
    traits={"position_free", "shift_invariant"},
    cost=Cost("E*M*(M + 2*M/share + pos_dim)", ""),
    claim="70.4% mIoU on S3DIS Area 5, at full size only. In small: channels of one point may look at different "
    "neighbours, which one weight for all cannot: "
    "tests/graph/test_point_transformer.py::test_channels_look_at_different_neighbours.",
    differs=(
        "Neighbours come as edges (`nearest` makes them), so clouds may have any sizes.",
        "The segmentation network's transitions are the host's; its batch norms go in through theta= and gamma=.",
    ),
    verified="third-party",
    defaults={"pos_dim": "code", "share": "paper", "self_loops": "ours, `nearest` holds them", "bias": "code, PyG"},
)


@checked()
def nearest(
    pos: Float[Tensor, "N P"], k: int, *, cloud: Int[Tensor, " N"] | None = None, rows: int = 1024
) -> Int[Tensor, "2 N*k"]:
    """Edges from the k nearest points of its own cloud, itself among them, to every point.

    Raises ValueError where a cloud has fewer than k points. Distances are taken `rows` points at a time.
    """
    whole("nearest", most=len(pos), k=k)
    whole("nearest", rows=rows)
    found = []
    for start in range(0, len(pos), rows):
        distance = torch.cdist(pos[start : start + rows], pos, compute_mode="donot_use_mm_for_euclid_dist")
        if cloud is not None:
            distance = distance.masked_fill(cloud[start : start + rows, None] != cloud, torch.inf)
        near = distance.topk(k, largest=False)
        if readable(near.values) and near.values.isinf().any():
            refuse("nearest", "k", "exceeds the points of a cloud", k, "as many in every cloud, or a lower k")
        found.append(near.indices)
    source = torch.cat(found)
    return torch.stack([source, torch.arange(len(pos), device=pos.device)[:, None].expand_as(source)]).flatten(1)


def vector_weights(
    q: Float[Tensor, "T C"],
    k: Float[Tensor, "S C"],
    delta: Float[Tensor, "E C"],
    gamma: nn.Module,
    edge_index: Int[Tensor, "2 E"],
    *,
    keep: Bool[Tensor, " E"] | None = None,
) -> Float[Tensor, "E C"]:
    """The weight of each edge and channel; arguments as `vector_attention` takes them."""
    j, i = edge_index
    weights = edge_softmax(gamma(q[i] - k[j] + delta), i, len(q), keep)
    return weights.repeat(1, delta.shape[1] // weights.shape[1])


@checked()
def vector_attention(
    q: Float[Tensor, "T C"],
    k: Float[Tensor, "S C"],
    v: Float[Tensor, "S C"],
    delta: Float[Tensor, "E C"],
    gamma: nn.Module,
    edge_index: Int[Tensor, "2 E"],
    *,
    keep: Bool[Tensor, " E"] | None = None,
) -> Float[Tensor, "T C"]:
    """Attention of the targets over the sources that edges lead from; `keep` is False for edges that don't count.

    gamma maps (E, C) to (E, C), or to fewer columns, which the channels then take in turn.
    """
    j, i = edge_index
    weights = vector_weights(q, k, delta, gamma, edge_index, keep=keep)
    value = v[j] + delta
    if keep is not None:
        value = value.masked_fill(~keep[:, None], 0)
    return edge_sum(weights * value, i, len(q)).to(q.dtype)


@CARD.module(closed=("theta", "gamma"))
class PointTransformer(nn.Module):
    """A vector attention layer over points.

    Args:
        dim: M = C, the width of the points' features.
        pos_dim: how many coordinates a point has.
        share: s, how many channels share a weight; divides dim. 1 is the paper's form; the first author's code has 8.
        self_loops: replace the loops in edge_index by one per point. Leave it off for edges from `nearest`, which
            hold every point itself.
        bias: of the three projections.
        theta, gamma: modules to use instead of the two MLPs (pos_dim -> dim and dim -> dim / share).
    """

    def __init__(
        self,
        dim: int,
        *,
        pos_dim: int = 3,
        share: int = 1,
        self_loops: bool = False,
        bias: bool = False,
        theta: nn.Module | None = None,
        gamma: nn.Module | None = None,
    ) -> None:
        super().__init__()
        whole(self, dim=dim, pos_dim=pos_dim, share=share)
        divides(self, share=share, dim=dim)
        self.dim, self.pos_dim, self.share, self.self_loops = dim, pos_dim, share, self_loops
        self.q_proj = nn.Linear(dim, dim, bias)
        self.k_proj = nn.Linear(dim, dim, bias)
        self.v_proj = nn.Linear(dim, dim, bias)

        def mlp(width: int, out: int) -> nn.Module:
            first, last = (nn.Linear(n, out) for n in (width, out))
            return nn.Sequential(first, nn.ReLU(), last)

        self.theta = mlp(pos_dim, dim) if theta is None else theta
        self.gamma = mlp(dim, dim // share) if gamma is None else gamma

    @checked(M="dim", P="pos_dim")
    def forward(
        self, nodes: Float[Tensor, "N M"], edge_index: Int[Tensor, "2 E"], pos: Float[Tensor, "N P"]
    ) -> Float[Tensor, "N M"]:
        """edge_index: which points j (row 0) each point i (row 1) attends to; pos: where they are."""
        q, k, delta, edges, keep = self._prepare(nodes, edge_index, pos)
        return vector_attention(q, k, self.v_proj(nodes), delta, self.gamma, edges, keep=keep)

    @checked(M="dim", P="pos_dim")
    def edge_weights(
        self, nodes: Float[Tensor, "N M"], edge_index: Int[Tensor, "2 E"], pos: Float[Tensor, "N P"]
    ) -> EdgeWeights:
        """The weights (E, C) of each edge, one a channel; then those of the loops that the layer adds."""
        q, k, delta, edges, keep = self._prepare(nodes, edge_index, pos)
        return EdgeWeights(edges, vector_weights(q, k, delta, self.gamma, edges, keep=keep), edge_index.shape[1])

    def _prepare(
        self, nodes: Tensor, edge_index: Tensor, pos: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        N = len(nodes)
        check_edges(self, edge_index, N, N)
        edges, keep = with_loops(edge_index, N) if self.self_loops else (edge_index, None)
        j, i = edges
        return self.q_proj(nodes), self.k_proj(nodes), self.theta(pos[i] - pos[j]), edges, keep
