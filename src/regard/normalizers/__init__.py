"""Normalisers: what turns scores into weights, row by row."""

from regard.rooms import opened

__getattr__, __dir__ = opened(__name__)
