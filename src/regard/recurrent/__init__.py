"""Alignments of recurrent decoders: pointing, Luong's scores, moving along a sequence, and when not to look."""

from regard.recurrent._location import LocationState
from regard.recurrent.dynamic_convolution import DynamicConvolutionAttention
from regard.recurrent.gmm import GMMAttention
from regard.recurrent.luong import LuongAttention
from regard.recurrent.luong_decoder import LuongDecoder
from regard.recurrent.luong_local import LocalLuongAttention
from regard.recurrent.pointer import PointerAttention, pointer_log_probs
from regard.recurrent.pointer_network import PointerNetwork
from regard.recurrent.sentinel import SentinelAttention, SentinelState, adaptive_attention

__all__ = [
    "DynamicConvolutionAttention",
    "GMMAttention",
    "LocalLuongAttention",
    "LocationState",
    "LuongAttention",
    "LuongDecoder",
    "PointerAttention",
    "PointerNetwork",
    "SentinelAttention",
    "SentinelState",
    "adaptive_attention",
    "pointer_log_probs",
]
