"""What must hold for any attention: laws as functions, and `check`, which puts anybody's attention through them.

    regard.check("kerple")                                # a mechanism of the catalogue
    regard.check(MyAttention, traits={"position_free"})   # a class, a function of q, k and v, or a module

A law returns, or raises `Broken`, which says what is off and by how much. `LAWS` holds them all.
"""

from importlib import import_module

from regard.laws.agreement import Broken, DoesNotApply
from regard.laws.checking import Finding, Report, check, suite
from regard.laws.registry import LAWS, Law, law
from regard.laws.subject import Subject, of

FILES = (
    *("supported", "together", "structure", "masking", "symmetry", "traits", "streaming"),
    *("reference", "numerics", "limits", "gradients", "modules", "transforms"),
)
"""In the order of the report."""

for _name in FILES:
    import_module(f"regard.laws.{_name}")

__all__ = [
    "FILES",
    "LAWS",
    "Broken",
    "DoesNotApply",
    "Finding",
    "Law",
    "Report",
    "Subject",
    "check",
    "law",
    "of",
    "suite",
]
