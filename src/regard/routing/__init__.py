"""Content-dependent routing: what looks at queries and keys and keeps the pairs worth computing."""

from regard.routing.biformer import BiLevelRouting
from regard.routing.moba import MoBA, moba
from regard.routing.report import Kept, kept
from regard.routing.routing_transformer import RoutingAttention
from regard.routing.xattention import XAttention, xattention

__all__ = ["BiLevelRouting", "Kept", "MoBA", "RoutingAttention", "XAttention", "kept", "moba", "xattention"]
