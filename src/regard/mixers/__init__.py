"""Token mixers with a structure of their own."""

from regard.mixers.etc import ETCAttention
from regard.mixers.global_local import global_local_attention

__all__ = ["ETCAttention", "global_local_attention"]
