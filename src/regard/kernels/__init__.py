"""How exact attention is executed. Kernels know problems, not mechanisms."""

from regard.kernels.plan import KERNELS, Plan, choose, execute
from regard.kernels.problem import Problem

__all__ = ["KERNELS", "Plan", "Problem", "choose", "execute"]
