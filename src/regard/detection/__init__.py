"""Attention of object detectors: queries that look at a few points, or near a reference point, of feature maps."""

from regard.detection.conditional import ConditionalCrossAttention, conditional_attention
from regard.detection.deformable import DeformableAttention
from regard.detection.sampling import deformable_attention, pixel_centres

__all__ = [
    "ConditionalCrossAttention",
    "DeformableAttention",
    "conditional_attention",
    "deformable_attention",
    "pixel_centres",
]
