"""GATv2: additive graph attention whose ranking of neighbours depends on the asking node.

The first GAT has LeakyReLU(a . [W h_i ; W h_j]) instead, monotone in a term of j alone: every node ranks its neighbours
alike.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, number, whole
from regard.graph._edges import check_edges, check_features, edge_mean, edge_softmax, edge_sum, with_loops
from regard.kinds import EdgeWeights
from regard.shapes import head_shape

CARD = Card(
    "gatv2",
    equation="""e_ij = a . LeakyReLU(W_dst h_i + W_src h_j [+ W_edge f_ij])       per head; no 1/sqrt(D)
alpha_ij = softmax over the edges j -> i of e_ij
y_i = sum_j alpha_ij W_src h_j""",
    papers=(
        Paper(
            "How Attentive are Graph Attention Networks?",
            "Brody, Alon, Yahav",
            2021,
            "2105.14491",
            "abstract; official code",
        ),
    ),
    protocol="GraphMixer",
    supports={"bidirectional", "dropout", "compile"},
    traits={"position_free"},
    cost=Cost("N*M*H*D*2 + 3*E*H*D", ""),
    claim="Every node ranks its neighbours anew, where in GAT all rank alike, and may favour one that lies between "
    "others, which no dot product of them does: tests/graph/test_gatv2.py::test_favours_a_neighbour_between_others.",
    differs=(
        "The optional residual projection of libraries is left to the caller.",
        "Biases of the projections start at 0, where the code leaves torch's start.",
    ),
    verified="third-party",
    defaults={
        "edge_dim": "code, PyG",
        "share_weights": "code, PyG",
        "self_loops": "code, PyG",
        "negative_slope": "code",
    },
)


def gatv2_weights(
    value: Float[Tensor, "E H D"],
    target: Float[Tensor, "T H D"],
    a: Float[Tensor, "H D"],
    i: Int[Tensor, " E"],
    *,
    edge: Float[Tensor, "E H D"] | None = None,
    keep: Bool[Tensor, " E"] | None = None,
    negative_slope: float = 0.2,
) -> Float[Tensor, "E H"]:
    """alpha_ij of each edge: `value` is W_src x_j of its source, `i` its target; the rest as `gatv2` takes it."""
    z = value + target[i]
    if edge is not None:
        z = z + edge
    return edge_softmax((F.leaky_relu(z, negative_slope) * a).sum(-1), i, len(target), keep)


def gatv2(
    source: Float[Tensor, "S H D"],
    target: Float[Tensor, "T H D"],
    a: Float[Tensor, "H D"],
    edge_index: Int[Tensor, "2 E"],
    *,
    edge: Float[Tensor, "E H D"] | None = None,
    keep: Bool[Tensor, " E"] | None = None,
    negative_slope: float = 0.2,
    dropout: float = 0.0,
) -> Float[Tensor, "T H D"]:
    """Attention of the targets over the sources that edges lead from.

    Args:
        source, target: W_src x_j (keys and values at once) and W_dst x_i.
        edge: W_edge f, added inside the LeakyReLU.
        keep: False for edges that don't count.
        dropout: of the weights; the caller says whether this is training.
    """
    j, i = edge_index
    value = source[j]
    weights = gatv2_weights(value, target, a, i, edge=edge, keep=keep, negative_slope=negative_slope)
    weights = F.dropout(weights, dropout, dropout > 0)
    if keep is not None:
        value = value.masked_fill(~keep[:, None, None], 0)
    return edge_sum(weights[..., None] * value, i, len(target)).to(source.dtype)


@CARD.module(closed=("head_dim", "merge"))  # outputs then have another width
class GATv2(nn.Module):
    """A graph attention layer with dynamic scores.

    Args:
        dim, num_heads: M and H.
        head_dim: D; dim / num_heads if not given. With `merge="concat"` outputs have H * D features.
        edge_dim: width of the edge features, where there are any.
        merge: "concat" puts the heads side by side, "mean" averages them (outputs then have D features).
        share_weights: W_src = W_dst.
        self_loops: replace the loops in edge_index by one per node (its edge feature is the mean of the others').
        negative_slope: of the LeakyReLU.
        dropout: of the weights, in training.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        edge_dim: int | None = None,
        merge: Literal["concat", "mean"] = "concat",
        share_weights: bool = False,
        self_loops: bool = True,
        negative_slope: float = 0.2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        head_dim = head_shape(dim, num_heads, None, head_dim, who=type(self).__name__).head_dim
        choice(self, ("concat", "mean"), merge=merge)
        number(self, least=0, most=1, dropout=dropout)
        number(self, negative_slope=negative_slope)
        if edge_dim is not None:
            whole(self, edge_dim=edge_dim)
        self.dim, self.num_heads, self.head_dim, self.edge_dim = dim, num_heads, head_dim, edge_dim
        self.merge, self.self_loops, self.negative_slope, self.dropout = merge, self_loops, negative_slope, dropout
        width = num_heads * head_dim
        self.source_proj = nn.Linear(dim, width)
        self.target_proj = None if share_weights else nn.Linear(dim, width)
        self.edge_proj = None if edge_dim is None else nn.Linear(edge_dim, width, False)
        self.a = nn.Parameter(torch.empty(num_heads, head_dim))
        self.bias = nn.Parameter(torch.empty(width if merge == "concat" else head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot's uniform for all weights, zero for all biases."""
        for proj in (self.source_proj, self.target_proj, self.edge_proj):
            if proj is not None:
                nn.init.xavier_uniform_(proj.weight)
                if proj.bias is not None:
                    nn.init.zeros_(proj.bias)
        bound = math.sqrt(6 / (self.num_heads + self.head_dim))
        nn.init.uniform_(self.a, -bound, bound)
        nn.init.zeros_(self.bias)

    @checked(M="dim")
    def forward(
        self,
        nodes: Float[Tensor, "N M"],
        edge_index: Int[Tensor, "2 E"],
        edge_features: Float[Tensor, "E W"] | None = None,
    ) -> Float[Tensor, "N O"]:
        source, target, edges, edge, keep = self._prepare(nodes, edge_index, edge_features)
        out = gatv2(
            source,
            target,
            self.a,
            edges,
            edge=edge,
            keep=keep,
            negative_slope=self.negative_slope,
            dropout=self.dropout if self.training else 0.0,
        )
        return (out.flatten(1) if self.merge == "concat" else out.mean(1)) + self.bias

    @checked(M="dim")
    def edge_weights(
        self,
        nodes: Float[Tensor, "N M"],
        edge_index: Int[Tensor, "2 E"],
        edge_features: Float[Tensor, "E W"] | None = None,
    ) -> EdgeWeights:
        """The weight of each edge per head, dropout aside; then those of the loops that the layer adds."""
        source, target, edges, edge, keep = self._prepare(nodes, edge_index, edge_features)
        j, i = edges
        slope = self.negative_slope
        weights = gatv2_weights(source[j], target, self.a, i, edge=edge, keep=keep, negative_slope=slope)
        return EdgeWeights(edges, weights, edge_index.shape[1])

    def _prepare(
        self, nodes: Tensor, edge_index: Tensor, edge_features: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        N = len(nodes)
        check_edges(self, edge_index, N, N)
        check_features(self, edge_features, self.edge_dim)
        keep = None
        if self.self_loops:
            edge_index, keep = with_loops(edge_index, N)
            if edge_features is not None:
                old = slice(len(edge_features))
                loops = edge_mean(edge_features, edge_index[1, old], N, keep[old])
                edge_features = torch.cat([edge_features, loops])
        heads = (self.num_heads, self.head_dim)
        source = self.source_proj(nodes).unflatten(-1, heads)
        target = source if self.target_proj is None else self.target_proj(nodes).unflatten(-1, heads)
        edge = None if self.edge_proj is None else self.edge_proj(edge_features).unflatten(-1, heads)
        return source, target, edge_index, edge, keep
