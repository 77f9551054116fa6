"""Attention on feature maps: (B, C, *sizes) to (B, C, *sizes)."""

from regard.vision.attention_gate import AttentionGate, gate_coefficients
from regard.vision.davit import ChannelAttention, WindowAttention, channel_attention, window_attention
from regard.vision.halo import HaloAttention, halo_attention
from regard.vision.large_kernel import LargeKernelAttention, VANAttention, large_kernel_attention
from regard.vision.neighborhood import NeighborhoodAttention, neighborhood_attention
from regard.vision.polarized import PolarizedAttention, channel_pool, spatial_score
from regard.vision.shift import Shift, shift

__all__ = [
    "AttentionGate",
    "ChannelAttention",
    "HaloAttention",
    "LargeKernelAttention",
    "NeighborhoodAttention",
    "PolarizedAttention",
    "Shift",
    "VANAttention",
    "WindowAttention",
    "channel_attention",
    "channel_pool",
    "gate_coefficients",
    "halo_attention",
    "large_kernel_attention",
    "neighborhood_attention",
    "shift",
    "spatial_score",
    "window_attention",
]
