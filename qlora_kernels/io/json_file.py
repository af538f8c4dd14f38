"""JSON objects from untrusted files: bounded in size and depth, without NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .strict_json import JSONRefused, parse_json

MOST_BYTES = 64 * 2**20
"""Maximum file size in bytes, larger than any published configuration or index of a model."""


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the object in a file. Raises FileNotFoundError; ValueError, naming the file, for any other content."""
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path}: must be smaller than {MOST_BYTES} bytes, got {path.stat().st_size}")
    return json_object(path.read_bytes(), str(path))


def json_object(text: bytes | str, place: str) -> dict[str, Any]:
    """Parse the object in `text`.   place: the origin of the text, for messages.

    A key may occur twice, as in some published configurations; the last one counts, as in Python's parser.
    Raises ValueError for text that is not UTF-8, is not JSON, or is JSON of another type than an object.
    """
    try:
        values = parse_json(text if isinstance(text, str) else text.decode("utf-8-sig"), repeated_keys=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: must be JSON in UTF-8 ({error})") from error
    except JSONRefused as error:
        raise ValueError(f"{place}: must be JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{place}: must hold a JSON object, got a {type(values).__name__}")
    return values
