"""All laws, in the order of the report: the files that hold them, each imported."""

from importlib import import_module

from regard.laws.registry import LAWS

FILES = (
    *("supported", "together", "structure", "masking", "packing", "symmetry", "traits", "streaming"),
    *("reference", "numerics", "slopes", "limits", "gradients", "modules", "transforms", "runtime"),
)

for _name in FILES:
    import_module(f"regard.laws.{_name}")

__all__ = ["FILES", "LAWS"]
