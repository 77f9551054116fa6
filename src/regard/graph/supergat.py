"""SuperGAT: graph attention whose scores also learn to predict which nodes are linked."""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, choice, number
from regard.graph._edges import check_edges, edge_softmax, edge_sum, with_loops
from regard.graph.non_edges import sample_non_edges
from regard.kinds import EdgeWeights
from regard.shapes import head_shape

CARD = Card(
    "supergat",
    equation="""z = W h;   g_ij = z_i . z_j                                             per head
MX: e_ij = (a_dst . z_i + a_src . z_j) sigmoid(g_ij)                    SD: e_ij = g_ij / sqrt(D)
alpha_ij = softmax over the edges j -> i of LeakyReLU(e_ij);            y_i = sum_j alpha_ij z_j
edge loss: mean over edges and sampled non-edges of BCE(sigmoid(mean over heads of phi_ij), is an edge)
           with phi = g (MX), g / sqrt(D) (SD);             added to the task's loss, times auxiliary_weight""",
    papers=(
        Paper(
            "How to Find Your Friendly Neighborhood: Graph Attention Design with Self-Supervision",
            "Kim, Oh",
            2021,
            "2204.04879",
            "abstract; official code, its command line and settings; torch_geometric's layer and example",
        ),
    ),
    protocol="GraphMixer",
    supports={"bidirectional", "dropout", "compile"},
    traits={"position_free"},
    cost=Cost("N*M*H*D + 4*E*H*D", ""),
    claim="The edge loss teaches the scores to tell links from non-links: "
    "tests/graph/test_supergat.py::test_edge_loss_teaches_to_tell_edges.",
    differs=(
        "The paper tunes the weight of the edge loss on each set of data, and the authors' settings reach from 7e-8 to "
        "140 (their command line starts at 0); the default of auxiliary_weight is that of torch_geometric's example.",
        "Edges and non-edges are drawn by `auxiliary_loss`, anew at every call, and not inside forward; `edge_loss` is "
        "handed the non-edges.",
        "Non-edges are drawn without replacement and lack an edge in both directions; in a batch of graphs they may "
        "lie between two of them.",
    ),
    verified="third-party",
    auxiliary="auxiliary_loss",
    tasks=("nodes",),
    defaults={
        "form": "code, PyG",
        "self_loops": "code",
        "negative_slope": "code",
        "auxiliary_weight": "code, PyG's example",
        "edge_sample_ratio": "code, PyG",
        "neg_sample_ratio": "code, PyG",
    },
)

Form = Literal["MX", "SD", "GO", "DP"]


def edge_scores(
    z_j: Float[Tensor, "E H D"], z_i: Float[Tensor, "E H D"], a: Float[Tensor, "2 H D"] | None, form: Form
) -> tuple[Float[Tensor, "E H"], Float[Tensor, "E H"]]:
    """e_ij, and phi_ij, from which the edge is predicted. `a` holds a_src and a_dst (MX and GO have them)."""
    wide = torch.promote_types(z_j.dtype, torch.float32)
    dot = (z_i.to(wide) * z_j.to(wide)).sum(-1)
    if form == "SD":
        dot = dot / math.sqrt(z_i.shape[-1])
    if a is None:
        return dot, dot
    pair = (z_j.to(wide) * a[0].to(wide)).sum(-1) + (z_i.to(wide) * a[1].to(wide)).sum(-1)
    return (pair, pair) if form == "GO" else (pair * dot.sigmoid(), dot)


def supergat_weights(
    value: Float[Tensor, "E H D"],
    z: Float[Tensor, "N H D"],
    a: Float[Tensor, "2 H D"] | None,
    i: Int[Tensor, " E"],
    *,
    form: Form = "MX",
    keep: Bool[Tensor, " E"] | None = None,
    negative_slope: float = 0.2,
) -> Float[Tensor, "E H"]:
    """alpha_ij of each edge: `value` is z_j of its source, `i` its target; the rest as `supergat` takes it."""
    scores = F.leaky_relu(edge_scores(value, z[i], a, form)[0], negative_slope)
    return edge_softmax(scores, i, len(z), keep)


def supergat(
    z: Float[Tensor, "N H D"],
    a: Float[Tensor, "2 H D"] | None,
    edge_index: Int[Tensor, "2 E"],
    *,
    form: Form = "MX",
    keep: Bool[Tensor, " E"] | None = None,
    negative_slope: float = 0.2,
    dropout: float = 0.0,
) -> Float[Tensor, "N H D"]:
    """Attention of each node over the sources of its edges; `keep` is False for edges that don't count."""
    j, i = edge_index
    value = z[j]
    weights = supergat_weights(value, z, a, i, form=form, keep=keep, negative_slope=negative_slope)
    weights = F.dropout(weights, dropout, dropout > 0)
    if keep is not None:
        value = value.masked_fill(~keep[:, None, None], 0)
    return edge_sum(weights[..., None] * value, i, len(z)).to(z.dtype)


def edge_loss(
    z: Float[Tensor, "N H D"],
    a: Float[Tensor, "2 H D"] | None,
    edges: Int[Tensor, "2 E"],
    non_edges: Int[Tensor, "2 F"],
    *,
    form: Form = "MX",
) -> Float[Tensor, ""]:
    """How badly the scores tell edges from pairs that are none: one mean over both."""
    j, i = torch.cat([edges, non_edges], 1)
    label = torch.cat([z.new_ones(edges.shape[1]), z.new_zeros(non_edges.shape[1])])
    logits = edge_scores(z[j], z[i], a, form)[1].mean(-1)
    if not len(label):  # nothing to tell apart: no loss, where a mean would be NaN
        return logits.sum()
    return F.binary_cross_entropy_with_logits(logits, label.to(logits.dtype))


@CARD.module(closed=("head_dim", "merge"))  # outputs then have another width
class SuperGAT(nn.Module):
    """A graph attention layer with self-supervised scores: add `auxiliary_weight * auxiliary_loss(...)` to the task's.

    Args:
        dim, num_heads: M and H.
        form: "MX" or "SD"; the authors also have "GO" (plain GAT) and "DP" (the dot product) to compare with.
        head_dim: D; dim / num_heads if not given.
        merge: "concat" puts the heads side by side, "mean" averages them (outputs then have D features).
        self_loops: replace the loops in edge_index by one per node. They then are edges of the loss, too.
        negative_slope: of the LeakyReLU.
        dropout: of the weights, in training.
        auxiliary_weight: what training multiplies `auxiliary_loss` by.
        edge_sample_ratio: the share of the edges that this loss draws, at each call anew; torch_geometric's default,
            the authors' is 0.9.
        neg_sample_ratio: how many non-edges it draws for each of those; torch_geometric's default.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        form: Form = "MX",
        head_dim: int | None = None,
        merge: Literal["concat", "mean"] = "concat",
        self_loops: bool = True,
        negative_slope: float = 0.2,
        dropout: float = 0.0,
        auxiliary_weight: float = 4.0,
        edge_sample_ratio: float = 1.0,
        neg_sample_ratio: float = 0.5,
    ) -> None:
        super().__init__()
        head_dim = head_shape(dim, num_heads, None, head_dim, who=type(self).__name__).head_dim
        choice(self, get_args(Form), form=form)
        choice(self, ("concat", "mean"), merge=merge)
        number(self, least=0, most=1, dropout=dropout)
        number(self, above=0, most=1, edge_sample_ratio=edge_sample_ratio)
        number(self, least=0, auxiliary_weight=auxiliary_weight, neg_sample_ratio=neg_sample_ratio)
        number(self, negative_slope=negative_slope)
        self.dim, self.num_heads, self.head_dim, self.form, self.merge = dim, num_heads, head_dim, form, merge
        self.self_loops, self.negative_slope, self.dropout = self_loops, negative_slope, dropout
        self.auxiliary_weight = auxiliary_weight
        self.edge_sample_ratio, self.neg_sample_ratio = edge_sample_ratio, neg_sample_ratio
        width = num_heads * head_dim
        self.proj = nn.Linear(dim, width, bias=False)
        a = torch.empty(2, num_heads, head_dim)
        self.a: nn.Parameter | None = nn.Parameter(a) if form in ("MX", "GO") else None
        self.bias = nn.Parameter(torch.empty(width if merge == "concat" else head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Glorot's uniform for all weights, zero for the bias."""
        nn.init.xavier_uniform_(self.proj.weight)
        if self.a is not None:
            bound = math.sqrt(6 / (self.num_heads + 2 * self.head_dim))
            nn.init.uniform_(self.a, -bound, bound)
        nn.init.zeros_(self.bias)

    @checked(M="dim")
    def forward(self, nodes: Float[Tensor, "N M"], edge_index: Int[Tensor, "2 E"]) -> Float[Tensor, "N O"]:
        z, edges, keep = self._prepare(nodes, edge_index)
        out = supergat(
            z,
            self.a,
            edges,
            form=self.form,
            keep=keep,
            negative_slope=self.negative_slope,
            dropout=self.dropout if self.training else 0.0,
        )
        return (out.flatten(1) if self.merge == "concat" else out.mean(1)) + self.bias

    @checked(M="dim")
    def edge_weights(self, nodes: Float[Tensor, "N M"], edge_index: Int[Tensor, "2 E"]) -> EdgeWeights:
        """The weight of each edge per head, dropout aside; then those of the loops that the layer adds."""
        z, edges, keep = self._prepare(nodes, edge_index)
        j, i = edges
        slope = self.negative_slope
        weights = supergat_weights(z[j], z, self.a, i, form=self.form, keep=keep, negative_slope=slope)
        return EdgeWeights(edges, weights, edge_index.shape[1])

    @checked(M="dim")
    def edge_loss(
        self, nodes: Float[Tensor, "N M"], edge_index: Int[Tensor, "2 E"], non_edges: Int[Tensor, "2 F"]
    ) -> Float[Tensor, ""]:
        """The self-supervised loss of this layer, for these edges and non-edges."""
        z, edges = self._linked(nodes, edge_index)
        check_edges(self, non_edges, len(nodes), len(nodes))
        return edge_loss(z, self.a, edges, non_edges.to(edges.dtype), form=self.form)

    @checked(M="dim")
    def auxiliary_loss(self, nodes: Float[Tensor, "N M"], edge_index: Int[Tensor, "2 E"]) -> Float[Tensor, ""]:
        """The self-supervised loss, unweighted, for edges and non-edges that are drawn by torch's global generator."""
        z, edges = self._linked(nodes, edge_index)
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
        wanted = self.edge_sample_ratio * edges.shape[1]
        drawn = torch.randperm(edges.shape[1], generator=generator)[: int(wanted)].to(edges.device)
        count = int(self.neg_sample_ratio * wanted)
        non_edges = sample_non_edges(edges, len(nodes), count, generator=generator).to(edges.dtype)
        return edge_loss(z, self.a, edges[:, drawn], non_edges, form=self.form)

    def _linked(self, nodes: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
        z, edges, keep = self._prepare(nodes, edge_index)
        return z, edges if keep is None else edges[:, keep]

    def _prepare(self, nodes: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        check_edges(self, edge_index, len(nodes), len(nodes))
        edges, keep = with_loops(edge_index, len(nodes)) if self.self_loops else (edge_index, None)
        return self.proj(nodes).unflatten(-1, (self.num_heads, self.head_dim)), edges, keep
