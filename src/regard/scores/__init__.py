"""Scores: what else happens to scores before, and to weights after, they are normalised."""

from regard.scores.mta import HeadMix, HeadNormGate, KeyQueryConv, MixSequence

__all__ = ["HeadMix", "HeadNormGate", "KeyQueryConv", "MixSequence"]
