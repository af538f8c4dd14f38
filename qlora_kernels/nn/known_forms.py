"""Recognition of code: compares the source of a module's methods with the code that a replacement reproduces.

Class names are not sufficient: a subclass may override a method, and another version of a library may have changed one.
A method is known if the digest of its source, without comments, annotations and docstring, is listed with the
replacement. Modules with unknown code are left alone.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

_TRANSPARENT = ("transformers.modeling_layers", "transformers.utils.deprecation")
"""Modules of decorators that call the wrapped function unchanged: gradient checkpointing, renamed arguments."""

_IGNORED_FIELDS = ("annotation", "returns", "type_comment", "decorator_list", "ctx", "kind")


def unwrapped_function(function: Callable[..., Any], handled: Sequence[str] = ()) -> Callable[..., Any]:
    """Return the function inside decorators of _TRANSPARENT and of `handled`, whose effect the caller reproduces."""
    while (inner := getattr(function, "__wrapped__", None)) is not None:
        if getattr(function, "__globals__", {}).get("__name__") not in (*_TRANSPARENT, *handled):
            break
        function = inner
    return function


def form_of(function: Callable[..., Any], handled: Sequence[str] = ()) -> str | None:
    """Return a digest of the function's statements, or None if its source is not available.

    handled: as for unwrapped_function.
    """
    return _form(unwrapped_function(function, handled))


@lru_cache(maxsize=1024)
def _form(function: Callable[..., Any]) -> str | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    if not isinstance(tree, ast.FunctionDef):
        return None
    if ast.get_docstring(tree, clean=False) is not None:
        tree.body = tree.body[1:]
    decorators = [ast.unparse(getattr(decorator, "func", decorator)) for decorator in tree.decorator_list]
    kept = [name for name in decorators if name not in ("deprecate_kwarg", "use_kernel_forward_from_hub")]
    return hashlib.sha256(repr((kept, _plain(tree))).encode()).hexdigest()[:16]


def _plain(node: Any) -> Any:
    """Convert an AST node to nested tuples that are equal in all versions of Python; empty fields are omitted."""
    if isinstance(node, ast.AnnAssign) and node.value is not None:
        return "Assign", (("targets", (_plain(node.target),)), ("value", _plain(node.value)))
    if isinstance(node, ast.AST):
        fields = ((name, getattr(node, name, None)) for name in node._fields if name not in _IGNORED_FIELDS)
        return type(node).__name__, tuple((name, _plain(value)) for name, value in fields if value not in (None, []))
    if isinstance(node, list):
        return tuple(_plain(item) for item in node)
    return repr(node)
