"""Token mixers with a structure of their own."""

from regard.mixers.etc import ETCAttention
from regard.mixers.fftnet import FFTNet
from regard.mixers.global_local import global_local_attention
from regard.mixers.masked_mixer import MaskedMixer

__all__ = ["ETCAttention", "FFTNet", "MaskedMixer", "global_local_attention"]
