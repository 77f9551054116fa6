"""The command line, `regard` and `python -m regard`: one command a file, which parses, calls the library and prints.

Torch, rich and the library are imported inside the commands, so that help and lists come at once.
"""

from importlib import import_module

from regard.cli.group import MISTAKE, app, main

COMMANDS = (
    "list",
    "show",
    "plan",
    "check",
    "doctor",
    "compare",
    "profile",
    "caches",
    "survey",
    "explain",
    "report",
    "generate",
)
"""In the order of the help."""

for _name in COMMANDS:
    import_module(f"regard.cli.{_name}")

__all__ = ["COMMANDS", "MISTAKE", "app", "main"]
