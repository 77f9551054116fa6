"""Mechanisms made for series of measurements."""

from regard.timeseries.exponential_smoothing import (
    ExponentialSmoothingAttention,
    damped_growth,
    exponential_smoothing,
    smoothed_level,
)
from regard.timeseries.frequency_attention import FrequencyAttention, frequency_attention
from regard.timeseries.saits import SAITS, hide, saits_loss

__all__ = [
    "SAITS",
    "ExponentialSmoothingAttention",
    "FrequencyAttention",
    "damped_growth",
    "exponential_smoothing",
    "frequency_attention",
    "hide",
    "saits_loss",
    "smoothed_level",
]
