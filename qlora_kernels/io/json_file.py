"""JSON objects read from files that anybody may have written: bounded in size and depth, without NaN."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 64 * 2**20
"""Larger than any configuration or index of a model that people publish."""


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a file. Raises FileNotFoundError; ValueError, naming the file, for all that is no plain object."""
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path}: must be smaller than {MOST_BYTES} bytes, got {path.stat().st_size}")
    return json_object(path.read_bytes(), str(path))


def json_object(text: bytes | str, place: str) -> dict[str, Any]:
    """The object that `text` holds.   place: where it stands, for messages."""

    def refuse(constant: str) -> Any:
        raise ValueError(f"{place}: numbers must be finite, got {constant}")

    try:
        values = json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError(f"{place}: must be JSON without endless nesting") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: must be JSON in UTF-8 ({error})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: must be JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{place}: must hold a JSON object, got a {type(values).__name__}")
    if not _finite(values):
        raise ValueError(f"{place}: numbers must be finite, got one too large for a float")
    return values


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or abs(value) != float("inf")
