"""Settings and environments of many runs: what they hold, and where they differ."""

import json
from collections.abc import Sequence
from typing import Any

from regard.bench.report.text import text


def as_text(value: Any) -> str:
    """A setting's value: strings as they are, all else as JSON."""
    if isinstance(value, str):
        return value
    return json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)


def words(key: str) -> str:
    """A setting's name for markup: 'batch_size' as 'batch size'."""
    return text(key.replace("_", " "), 60)


def collected(mappings: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Key -> its distinct values, as text, in order of appearance."""
    found: dict[str, dict[str, None]] = {}
    for mapping in mappings:
        for key, value in mapping.items():
            found.setdefault(key, {})[as_text(value)] = None
    return {key: list(values) for key, values in found.items()}


def differing(mappings: Sequence[dict[str, Any]]) -> list[str]:
    """The keys whose values are not the same in every mapping; a missing key counts as None."""
    keys = dict.fromkeys(key for m in mappings for key in m)
    return [k for k in keys if len({json.dumps(m.get(k), sort_keys=True) for m in mappings}) > 1]
