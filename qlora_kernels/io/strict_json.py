"""JSON as defined by RFC 8259; values that Python's parser accepts or changes silently are refused."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

_SURROGATE = re.compile(r"\\ud[89a-f]", re.IGNORECASE)


class JSONRefused(ValueError):
    """The text is not JSON, or has a value that cannot be represented. The message is a clause without the text."""


def parse_json(text: str, *, repeated_keys: bool = False) -> Any:
    """Return the value of a JSON text.

    repeated_keys: accept a key that occurs twice in one object; the last one counts.
    Raises JSONRefused for malformed text, NaN and Infinity, numbers beyond float64 or 4300 digits, a key that occurs
    twice in one object, nesting too deep for Python's parser, and an escaped surrogate without its other half, which
    UTF-8 cannot represent.
    """
    try:
        value = json.loads(
            text,
            parse_constant=_no_constant,
            parse_float=_finite,
            object_pairs_hook=dict if repeated_keys else _without_duplicates,
        )
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        raise JSONRefused(error.msg) from error
    except UnicodeEncodeError as error:
        raise JSONRefused("half of a surrogate pair, which UTF-8 cannot represent") from error
    except RecursionError as error:
        raise JSONRefused("nested too deeply") from error
    except JSONRefused:
        raise
    except ValueError as error:  # an integer with more digits than Python converts
        raise JSONRefused("an integer with too many digits") from error
    return value


def _no_constant(name: str) -> NoReturn:
    raise JSONRefused(f"numbers must be finite, got {name}")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise JSONRefused("numbers must be finite, got one beyond the range of float64")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in value if keys.count(key) > 1)
        raise JSONRefused(f"the key {twice[:40]!r} occurs twice in one object")
    return value
