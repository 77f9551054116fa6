"""Attention of object detectors: queries that look at a few points, or near a reference point, of feature maps."""
