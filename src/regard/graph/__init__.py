"""Attention over the edges of a graph: (nodes (N, M), edge_index (2, E), ...) -> nodes (N, M)."""

from regard.rooms import opened

__getattr__, __dir__ = opened(__name__)
