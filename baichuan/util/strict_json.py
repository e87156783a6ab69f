"""JSON as its standard has it, and with each key once: Python's parser takes NaN, and the last of two equal keys."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any


def strict_json(text: str | bytes) -> Any:
    """Raises ValueError for what is no JSON or has a key twice, RecursionError for what is nested too deeply."""
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r:.60} is there twice")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
