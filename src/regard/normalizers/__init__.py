"""Normalisers: what turns scores into weights, row by row. The pure functions are in the modules of the same
names.
"""

from regard.normalizers.adaptive_entmax import AdaptiveEntmax
from regard.normalizers.cog import Cog
from regard.normalizers.entmax import Entmax
from regard.normalizers.softmax import Softmax
from regard.normalizers.sparsemax import Sparsemax
from regard.normalizers.topk import TopK

__all__ = ["AdaptiveEntmax", "Cog", "Entmax", "Softmax", "Sparsemax", "TopK"]
