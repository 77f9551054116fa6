"""Exphormer: sparse graph attention over edges, a random expander and virtual nodes.

All its edges are linear in N, and their spectral gap stays open, so that a few layers mix the whole graph.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from regard.cards import Card, Cost, Paper
from regard.checks import checked, divides, refuse, whole
from regard.graph._edges import check_edges, check_features, check_graph, edge_sum
from regard.graph.expander import expander, expander_of_graphs
from regard.shapes import HeadShape


def _inputs(shape: HeadShape) -> tuple[Tensor, ...]:
    nodes = torch.randn(12, shape.dim, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    node = torch.arange(12)
    ring = torch.stack([node, (node + 1) % 12])
    return nodes, torch.cat([ring, ring.flip(0)], 1), expander(12, 2)


CARD = Card(
    "exphormer",
    equation="""s_e = sum_d q_i k_j eps_e / sqrt(D)   for an edge e = (j -> i) with feature f_e, eps_e = W_E f_e
y_i = sum_e p_e v_j / (sum_e p_e + 1e-6),    p_e = exp(clamp(s_e, -5, 5))      per head
edges: the graph's own; `degree` random permutations u -> pi(u) and back; all nodes <-> each virtual node""",
    papers=(
        Paper(
            "Exphormer: Sparse Transformers for Graphs",
            "Shirzad et al.",
            2023,
            "2303.06147",
            'abstract; official code, its generator "Random-d" for expanders',
        ),
    ),
    protocol="GraphMixer",
    inputs=_inputs,
    supports={"bidirectional", "compile"},
    traits={"nonnegative"},
    cost=Cost("3*(E + 2*degree*N + 2*virtual*N)*M + 4*M*M", ""),
    claim="Edges grow linearly with N while the spectral gap stays open, so that news spreads in few layers: "
    "tests/graph/test_exphormer.py::test_expanders_are_regular_sparse_and_well_connected, "
    "tests/graph/test_exphormer.py::test_an_expander_spreads_news_in_few_layers.",
    differs=(
        "The attention alone: message passing beside it, norms and the feed-forward are the host's.",
        "In `forward` virtual nodes read the nodes before these read them, there being no next layer; `mix` is the "
        "paper's layer.",
        "Graphs of more than 1024 nodes take the first expander drawn, without computing its spectrum.",
        "A graph whose edges have no features shares one learnt vector among them.",
    ),
    verified="third-party",
    example={"degree": 2},
    tasks=("nodes",),
    defaults={"edge_dim": "code", "degree": "code", "virtual": "ours", "bias": "code", "seed": "ours"},
)


@checked()
def edge_attention(
    q: Float[Tensor, "T H D"],
    k: Float[Tensor, "S H D"],
    v: Float[Tensor, "S H D"],
    eps: Float[Tensor, "E H D"],
    edge_index: Int[Tensor, "2 E"],
) -> Float[Tensor, "T H D"]:
    """Attention of the targets over the sources that edges lead from, each edge with a vector inside the product."""
    j, i = edge_index
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q[i].to(wide) * k[j] * eps).sum(-1) / math.sqrt(q.shape[-1])
    p = scores.clamp(-5, 5).exp()
    total = edge_sum(p, i, len(q)) + 1e-6
    return (edge_sum(p[..., None] * v[j], i, len(q)) / total[..., None]).to(q.dtype)


@CARD.module
class Exphormer(nn.Module):
    """Attention over graph edges, an expander and virtual nodes.

    Args:
        dim, num_heads: M and H.
        edge_dim: width of the features of edges; dim if not given.
        degree: of the expander, in permutations: every node has 2 * degree of its edges. 0 leaves it out. 5
            is the authors' default.
        virtual: how many virtual nodes each graph has.
        bias: of the projections.
        seed: of the expander that `forward` makes where it is handed none.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        edge_dim: int | None = None,
        degree: int = 5,
        virtual: int = 1,
        bias: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        whole(self, dim=dim, num_heads=num_heads)
        divides(self, num_heads=num_heads, dim=dim)
        whole(self, 0, degree=degree, virtual=virtual)
        if edge_dim is not None:
            whole(self, edge_dim=edge_dim)
        self.dim, self.num_heads, self.degree, self.virtual, self.seed = dim, num_heads, degree, virtual, seed
        self.edge_dim = dim if edge_dim is None else edge_dim
        self.q_proj = nn.Linear(dim, dim, bias)
        self.k_proj = nn.Linear(dim, dim, bias)
        self.v_proj = nn.Linear(dim, dim, bias)
        self.edge_proj = nn.Linear(self.edge_dim, dim, bias)

        def vectors(count: int, width: int) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(count, width)) if count else None

        # Edges without a feature of their own have one that is learnt.
        self.real_edge = vectors(int(edge_dim is None), self.edge_dim)
        self.expander_edge = vectors(int(degree > 0), self.edge_dim)
        self.to_virtual = vectors(virtual, self.edge_dim)
        self.from_virtual = vectors(virtual, self.edge_dim)
        self.virtual_nodes = vectors(virtual, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's default for projections, N(0, 1) for learnt vectors."""
        for proj in (self.q_proj, self.k_proj, self.v_proj, self.edge_proj):
            proj.reset_parameters()
        for vector in self.parameters(recurse=False):
            nn.init.normal_(vector)

    @checked(M="dim")
    def forward(
        self,
        nodes: Float[Tensor, "N M"],
        edge_index: Int[Tensor, "2 E"],
        expander_edges: Int[Tensor, "2 F"] | None = None,
        edge_features: Float[Tensor, "E W"] | None = None,
        *,
        graph: Int[Tensor, " N"] | None = None,
        num_graphs: int = 1,
    ) -> Float[Tensor, "N M"]:
        """One layer on its own: the virtual nodes read the nodes first, since no layer takes them over afterwards.

        Args:
            edge_index: the graph's own edges.
            expander_edges: edges drawn beforehand, once per graph (`expander`); None draws them here, by the seed.
            edge_features: of the graph's own edges, where the layer was built with edge_dim.
            graph: which of `num_graphs` graphs each node belongs to; all to one, if not given.
        """
        edges = (edge_index, expander_edges, edge_features)
        return self._layer(nodes, self.start(num_graphs), *edges, graph, num_graphs, ahead=True)[0]

    def start(self, num_graphs: int = 1) -> Float[Tensor, "R*graphs M"]:
        """The virtual nodes before the first layer, row r * num_graphs + graph."""
        if self.virtual_nodes is None:
            return self.q_proj.weight.new_zeros(0, self.dim)
        return self.virtual_nodes.repeat_interleave(num_graphs, 0)

    @checked(M="dim")
    def mix(
        self,
        nodes: Float[Tensor, "N M"],
        virtual: Float[Tensor, "R*graphs M"],
        edge_index: Int[Tensor, "2 E"],
        expander_edges: Int[Tensor, "2 F"] | None = None,
        *,
        edge_features: Float[Tensor, "E W"] | None = None,
        graph: Int[Tensor, " N"] | None = None,
        num_graphs: int = 1,
    ) -> tuple[Float[Tensor, "N M"], Float[Tensor, "R*graphs M"]]:
        """The paper's layer: nodes and virtual nodes read each other. Hand both on to the next layer."""
        edges = (edge_index, expander_edges, edge_features)
        return self._layer(nodes, virtual, *edges, graph, num_graphs, ahead=False)

    def _layer(
        self,
        nodes: Tensor,
        virtual: Tensor,
        edge_index: Tensor,
        expander_edges: Tensor | None,
        edge_features: Tensor | None,
        graph: Tensor | None,
        num_graphs: int,
        *,
        ahead: bool,
    ) -> tuple[Tensor, Tensor]:
        N = len(nodes)
        check_edges(self, edge_index, N, N)
        check_features(self, edge_features, self.edge_dim if self.real_edge is None else None)
        if len(virtual) != self.virtual * num_graphs:
            expected = f"{self.virtual} nodes for each of {num_graphs} graphs"
            refuse(self, "virtual", "has the wrong shape", tuple(virtual.shape), expected)
        check_graph(self, graph, num_graphs)
        if expander_edges is None and self.degree:
            drawn = expander_of_graphs(N, graph, num_graphs, degree=self.degree, seed=self.seed)
            expander_edges = drawn.to(edge_index)
        heads = (self.num_heads, self.dim // self.num_heads)
        q, k, v = (proj(nodes).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        # A vector that edges share is projected once.
        eps = [self.edge_proj(self.real_edge if edge_features is None else edge_features)]
        eps[0] = eps[0].expand(edge_index.shape[1], -1)
        edges = [edge_index]
        if self.expander_edge is not None and expander_edges is not None:
            check_edges(self, expander_edges, N, N)
            edges.append(expander_edges.to(edge_index))
            eps.append(self.edge_proj(self.expander_edge).expand(expander_edges.shape[1], -1))
        if self.virtual:
            node = torch.arange(N, device=edge_index.device, dtype=edge_index.dtype)
            own = torch.zeros_like(node) if graph is None else graph.to(edge_index)
            first = num_graphs * torch.arange(self.virtual, device=node.device, dtype=node.dtype)
            node, hub = node.repeat(self.virtual), (first[:, None] + own).flatten()
            to, back = (self.edge_proj(z).repeat_interleave(N, 0) for z in (self.to_virtual, self.from_virtual))
            query = self.q_proj(virtual).unflatten(-1, heads)
            read = edge_attention(query, k, v, to.unflatten(-1, heads), torch.stack([node, hub])).flatten(1)
            seen = read if ahead else virtual
            k, v = (torch.cat([z, p(seen).unflatten(-1, heads)]) for z, p in ((k, self.k_proj), (v, self.v_proj)))
            edges.append(torch.stack([N + hub, node]))
            eps.append(back)
            virtual = read
        out = edge_attention(q, k, v, torch.cat(eps).unflatten(-1, heads), torch.cat(edges, 1))
        return out.flatten(1), virtual
