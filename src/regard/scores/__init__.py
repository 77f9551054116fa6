"""Scores: what else happens to scores before, and to weights after, they are normalised."""

from regard.rooms import opened

__getattr__, __dir__ = opened(__name__)
