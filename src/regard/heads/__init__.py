"""Heads: how queries, keys, values and head outputs are shared, normalised, gated and mixed."""

from regard.heads.dcmha import ComposeHeads
from regard.heads.gated import SigmoidGate
from regard.heads.knocking import KnockingHeads
from regard.heads.qk_norm import QKNorm

__all__ = ["ComposeHeads", "KnockingHeads", "QKNorm", "SigmoidGate"]
