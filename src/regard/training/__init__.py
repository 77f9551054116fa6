"""Training on attention: distillation, regularisers, and what is left out while learning."""

from regard.training.entropy import EntropyRegularizer, row_entropy
from regard.training.headmask import HeadMask, head_importance, mask_important, mask_random, unmask
from regard.training.minilm import MiniLMLoss, minilm_loss
from regard.training.ssa import SubsampledAttention, attend_in_windows, attend_to_some, local_shuffle
from regard.training.temperature import HeadTemperature

__all__ = [
    "EntropyRegularizer",
    "HeadMask",
    "HeadTemperature",
    "MiniLMLoss",
    "SubsampledAttention",
    "attend_in_windows",
    "attend_to_some",
    "head_importance",
    "local_shuffle",
    "mask_important",
    "mask_random",
    "minilm_loss",
    "row_entropy",
    "unmask",
]
