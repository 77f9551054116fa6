"""Arguments that several commands have, and what commands say in data."""

import json
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print data instead of text.")]
Batch = Annotated[int, typer.Option(min=1, help="B, sequences.")]
Heads = Annotated[int, typer.Option(min=1, help="H, query heads.")]


def integers(name: str, text: str) -> list[int]:
    """Read '0,1,2'."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name} must be whole numbers with commas between, got {text!r}") from None


def print_json(data: object) -> None:
    print(json.dumps(data, indent=2, allow_nan=False))
