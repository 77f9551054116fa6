"""Alignments of recurrent decoders: pointing, scores, moving along a sequence, and when not to look."""

from regard.rooms import opened

__getattr__, __dir__ = opened(__name__)
