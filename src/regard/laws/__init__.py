"""What must hold for any attention: laws as functions, and `check`, which puts anybody's attention through them.

    regard.check("kerple")                                # a mechanism of the catalogue
    regard.check(MyAttention, traits={"position_free"})   # a class, a function of q, k and v, or a module

A law returns, or raises `Broken`, which says what is off and by how much. `LAWS` holds them all.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regard.laws.agreement import Broken, DoesNotApply
    from regard.laws.checking import Finding, Report, check, suite
    from regard.laws.every import LAWS
    from regard.laws.registry import Law, law
    from regard.laws.subject import Subject, of

_FROM = {
    "Broken": "regard.laws.agreement",
    "DoesNotApply": "regard.laws.agreement",
    "Finding": "regard.laws.checking",
    "LAWS": "regard.laws.every",
    "Law": "regard.laws.registry",
    "Report": "regard.laws.checking",
    "Subject": "regard.laws.subject",
    "check": "regard.laws.checking",
    "law": "regard.laws.registry",
    "of": "regard.laws.subject",
    "suite": "regard.laws.checking",
}
"""Name -> the file that has it, imported when it is first asked for: a run that probes its cells needs no laws."""

__all__ = ["LAWS", "Broken", "DoesNotApply", "Finding", "Law", "Report", "Subject", "check", "law", "of", "suite"]


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_FROM[name]), name)
