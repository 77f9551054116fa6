"""Attention over the edges of a graph: (nodes (N, M), edge_index (2, E), ...) -> nodes (N, M)."""

from regard.graph.expander import expander, spectral_gap
from regard.graph.exphormer import Exphormer
from regard.graph.gatv2 import GATv2
from regard.graph.point_transformer import PointTransformer, vector_attention
from regard.graph.supergat import SuperGAT, edge_loss, sample_non_edges

__all__ = [
    "Exphormer",
    "GATv2",
    "PointTransformer",
    "SuperGAT",
    "edge_loss",
    "expander",
    "sample_non_edges",
    "spectral_gap",
    "vector_attention",
]
