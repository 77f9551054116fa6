"""SuperGAT: graph attention whose scores also learn to tell which nodes are linked.

    z = W h;   g_ij = z_i . z_j                                             per head
    MX: e_ij = (a_dst . z_i + a_src . z_j) sigmoid(g_ij)                    SD: e_ij = g_ij / sqrt(D)
    alpha_ij = softmax over the edges j -> i of LeakyReLU(e_ij);            y_i = sum_j alpha_ij z_j
    edge loss: mean over edges and sampled non-edges of BCE(sigmoid(mean over heads of phi_ij), is an edge)
               with phi = g (MX), g / sqrt(D) (SD);                         added to the task's loss, times lambda

Kim and Oh 2021, https://arxiv.org/abs/2204.04879: abstract read; the layer follows the authors' code, which also has
the forms GO (plain GAT) and DP (the dot product) to compare with.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from regard._former import Card, Cost, Paper, register
from regard.graph._edges import check_edges, check_nodes, edge_softmax, edge_sum, refuse, with_loops
from regard.shapes import HeadShape

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


def supergat(
    z: Float[Tensor, "N H D"],
    a: Float[Tensor, "2 H D"] | None,
    edge_index: Int[Tensor, "2 E"],
    *,
    form: Form = "MX",
    keep: Bool[Tensor, "E"] | None = None,
    negative_slope: float = 0.2,
    dropout: float = 0.0,
) -> Float[Tensor, "N H D"]:
    """Attention of each node over the sources of its edges; `keep` is False for edges that don't count."""
    j, i = edge_index
    value = z[j]
    scores = F.leaky_relu(edge_scores(value, z[i], a, form)[0], negative_slope)
    weights = F.dropout(edge_softmax(scores, i, len(z), keep), dropout, dropout > 0)
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
    return F.binary_cross_entropy_with_logits(logits, label.to(logits.dtype))


def sample_non_edges(
    edge_index: Int[Tensor, "2 E"], num_nodes: int, count: int, *, generator: torch.Generator
) -> Int[Tensor, "2 F"]:
    """`count` different ordered pairs of different nodes that no edge joins in either direction; fewer if there are not
    so many."""
    j, i = edge_index.to(generator.device, torch.int64)
    loops = torch.arange(num_nodes, device=generator.device) * (num_nodes + 1)
    taken = torch.cat([j * num_nodes + i, i * num_nodes + j, loops]).unique()
    free = num_nodes * num_nodes - len(taken)
    if 2 * count >= free:  # few are left: list them
        found = torch.ones(num_nodes * num_nodes, dtype=torch.bool, device=generator.device)
        found = found.index_fill(0, taken, False).nonzero()[:, 0]
    else:
        found = taken[:0]
        while len(found) < count:
            draw = torch.randint(num_nodes * num_nodes, (2 * count,), generator=generator, device=generator.device)
            found = torch.cat([found, draw[~torch.isin(draw, taken)]]).unique()
    order = torch.randperm(len(found), generator=generator, device=generator.device)
    found = found[order[:count]].to(edge_index.device)
    return torch.stack([found // num_nodes, found % num_nodes])


class SuperGAT(nn.Module):
    """A graph attention layer with self-supervised scores: add `weight * layer.edge_loss(...)` to the task's loss.

    Args:
        dim, num_heads: M and H.
        form: "MX" or "SD" (or "GO", "DP", for comparison).
        head_dim: D; dim / num_heads if not given.
        merge: "concat" puts the heads side by side, "mean" averages them (outputs then have D features).
        self_loops: replace the loops in edge_index by one per node. They then are edges of the loss, too.
        dropout: of the weights, in training.
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
    ) -> None:
        super().__init__()
        if head_dim is None and dim % num_heads:
            raise ValueError(f"SuperGAT: dim {dim} is not a multiple of num_heads {num_heads}; give head_dim")
        if form not in get_args(Form) or merge not in ("concat", "mean"):
            raise ValueError(
                f"SuperGAT: form must be one of {', '.join(get_args(Form))} and merge 'concat' or 'mean' "
                f"(got {form!r} and {merge!r})"
            )
        if not 0 <= dropout <= 1:
            raise ValueError(f"SuperGAT: dropout must lie in [0, 1] (got {dropout})")
        head_dim = dim // num_heads if head_dim is None else head_dim
        self.dim, self.num_heads, self.head_dim, self.form, self.merge = dim, num_heads, head_dim, form, merge
        self.self_loops, self.negative_slope, self.dropout = self_loops, negative_slope, dropout
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

    def edge_loss(
        self, nodes: Float[Tensor, "N M"], edge_index: Int[Tensor, "2 E"], non_edges: Int[Tensor, "2 F"]
    ) -> Float[Tensor, ""]:
        """The self-supervised loss of this layer; `sample_non_edges` draws pairs for it."""
        z, edges, keep = self._prepare(nodes, edge_index)
        check_edges("SuperGAT", non_edges, len(nodes), len(nodes))
        edges = edges if keep is None else edges[:, keep]
        return edge_loss(z, self.a, edges, non_edges.to(edges.dtype), form=self.form)

    def _prepare(self, nodes: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        check_nodes("SuperGAT", nodes, self.dim)
        check_edges("SuperGAT", edge_index, len(nodes), len(nodes))
        edges, keep = with_loops(edge_index, len(nodes)) if self.self_loops else (edge_index, None)
        return self.proj(nodes).unflatten(-1, (self.num_heads, self.head_dim)), edges, keep


def _build(
    shape: HeadShape,
    *,
    causal: bool,
    form: Form = "MX",
    self_loops: bool = True,
    dropout: float = 0.0,
) -> SuperGAT:
    refuse("supergat", shape, causal)
    return SuperGAT(shape.dim, shape.num_heads, form=form, self_loops=self_loops, dropout=dropout)


CARD = register(
    Card(
        name="supergat",
        family="graph",
        gist="Graph attention whose scores also learn to predict which nodes are linked.",
        equation="e_ij = (a_dst . z_i + a_src . z_j) sigmoid(z_i . z_j);  y_i = sum_j softmax_j(LeakyReLU(e_ij)) z_j",
        paper=Paper(
            "How to Find Your Friendly Neighborhood: Graph Attention Design with Self-Supervision",
            "Kim, Oh",
            2021,
            "2204.04879",
            "abstract; official code",
        ),
        build=_build,
        protocol="GraphMixer",
        supports=frozenset({"bidirectional", "dropout", "compile"}),
        traits=frozenset({"position_free"}),
        cost=Cost("N*M*H*D + 4*E*H*D", ""),
        claim="The edge loss teaches the scores to tell links from non-links: tests/graph/test_supergat.py.",
        differs=(
            "Edges and sampled non-edges of the loss are handed in (`sample_non_edges`), not drawn inside forward.",
            "Non-edges are drawn without replacement and lack an edge in both directions.",
        ),
        verified="third-party",
        tasks=("nodes",),
    )
)
