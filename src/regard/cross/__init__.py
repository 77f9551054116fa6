"""Attention from one set of vectors to another: pooling by learned queries."""

from regard.rooms import opened

__getattr__, __dir__ = opened(__name__)
