"""How a mechanism knows where tokens stand: parts for the `position` slot."""

from regard.positions.alibi import Alibi, alibi_slopes
from regard.positions.cope import CoPE
from regard.positions.kerple import Kerple, KerplePower
from regard.positions.learned import Learned
from regard.positions.rotary import Rotary, to_half_split, to_interleaved
from regard.positions.rotary_scaling import NTK, DynamicNTK, Linear, Llama3, LongRoPE
from regard.positions.shaw import Shaw
from regard.positions.sinusoidal import Sinusoidal, sinusoidal
from regard.positions.yarn import YaRN

__all__ = [
    "NTK",
    "Alibi",
    "CoPE",
    "DynamicNTK",
    "Kerple",
    "KerplePower",
    "Learned",
    "Linear",
    "Llama3",
    "LongRoPE",
    "Rotary",
    "Shaw",
    "Sinusoidal",
    "YaRN",
    "alibi_slopes",
    "sinusoidal",
    "to_half_split",
    "to_interleaved",
]
