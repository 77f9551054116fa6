"""Every attention mechanism worth knowing behind one interface."""

__version__ = "0.1.0"

from regard import kinds, masks
from regard.attention import Attention, attention, plan
from regard.cache import KVCache
from regard.card import Card, Cost, Paper, register
from regard.catalog import card, create, mechanisms
from regard.kernels import Plan

__all__ = [
    "Attention",
    "Card",
    "Cost",
    "KVCache",
    "Paper",
    "Plan",
    "attention",
    "card",
    "create",
    "kinds",
    "masks",
    "mechanisms",
    "plan",
    "register",
]
