"""Heads: how queries, keys, values and head outputs are shared, normalised, gated and mixed."""

from regard.rooms import opened

__getattr__, __dir__ = opened(__name__)
