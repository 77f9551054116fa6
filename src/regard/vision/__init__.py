"""Attention on feature maps: (B, C, *sizes) to (B, C, *sizes)."""

from regard.rooms import opened

__getattr__, __dir__ = opened(__name__)
