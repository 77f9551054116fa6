"""Training on attention: distillation, regularisers, and what is left out while learning."""

from regard.rooms import opened

__getattr__, __dir__ = opened(__name__)
