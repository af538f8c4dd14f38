"""The value of an option FIELD=VALUE."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..io.strict_json import JSONRefused, parse_json


def assignment(text: str) -> tuple[str, Any]:
    """Return (field, value) of FIELD=VALUE. The value is parsed as JSON; text that is not JSON is a string.

    Raises argparse.ArgumentTypeError for text without a field name or "=", and for JSON that a configuration must not
    contain, such as NaN or a number that is too long.
    """
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"must be FIELD=VALUE, got {text[:60]!r}")
    try:
        return name, parse_json(value)
    except JSONRefused as error:
        if isinstance(error.__cause__, json.JSONDecodeError):
            return name, value
        raise argparse.ArgumentTypeError(f"{name} must have a value in JSON, got {value[:60]!r} ({error})") from error
