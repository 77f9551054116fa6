"""Attention of object detectors: queries that look at a few points, or near a reference point, of feature maps."""

from regard.rooms import opened

__getattr__, __dir__ = opened(__name__)
