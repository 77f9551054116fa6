"""Token mixers with a structure of their own."""

from regard.mixers.convbert import MixedAttention
from regard.mixers.etc import ETCAttention
from regard.mixers.exponential import exponential_sum
from regard.mixers.fftnet import FFTNet
from regard.mixers.global_local import global_local_attention
from regard.mixers.gss import GatedStateSpace
from regard.mixers.masked_mixer import MaskedMixer
from regard.mixers.mega import Mega
from regard.mixers.span_conv import SpanConvolution

__all__ = [
    "ETCAttention",
    "FFTNet",
    "GatedStateSpace",
    "MaskedMixer",
    "Mega",
    "MixedAttention",
    "SpanConvolution",
    "exponential_sum",
    "global_local_attention",
]
