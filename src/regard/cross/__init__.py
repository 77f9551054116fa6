"""Attention from one set of vectors to another: pooling by learned queries."""

from regard.cross.efficient_probing import EfficientProbing, efficient_probing

__all__ = ["EfficientProbing", "efficient_probing"]
