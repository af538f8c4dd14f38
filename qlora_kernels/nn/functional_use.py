"""Finds linear layers whose holder computes with their weight, as in `F.linear(x, self.proj.weight)`.

A quantized layer works there, because its `weight` returns the dequantized weight. Mamba's fused kernels take the
weights of layers that its plain implementation calls.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

_METADATA = frozenset({"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_cuda"})
"""Attributes of a weight whose use is not a computation with it."""


def read_but_never_called(model: nn.Module) -> dict[str, str]:
    """Return the modules whose holder computes with their `weight` and never calls them: name -> class of the holder.

    The source of the holder's class is analysed. A module is left out if it is called, passed on, or reached in another
    way than as `self.<name>`, or if the source of its holder is not available.
    """
    found = {}
    for name, holder in model.named_modules():
        kind: Any = type(holder)
        read, used_otherwise = _children_by_use(kind)
        for child, module in holder.named_children():
            if child in read - used_otherwise and not any(True for _ in module.children()):
                found[f"{name}.{child}" if name else child] = type(holder).__name__
    return found


def computes_with_weight(holder: nn.Module, child: str) -> bool:
    """Whether a method of the class of `holder` computes with `self.<child>.weight`; it may call the child too."""
    kind: Any = type(holder)
    return child in _children_by_use(kind)[0]


@cache
def _children_by_use(kind: Any) -> tuple[frozenset[str], frozenset[str]]:
    """Return two sets of attributes of self: those whose `.weight` the class computes with, and those used
    otherwise.
    """
    nothing: frozenset[str] = frozenset()
    if kind.__module__.startswith("torch.nn.modules.") and kind is not nn.MultiheadAttention:
        return nothing, nothing
    computed: set[str] = set()
    used_otherwise: set[str] = set()
    for base in kind.__mro__:
        if base in (nn.Module, object):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            return nothing, nothing
        for child, use in _uses(tree):
            (computed if use == "weight" else used_otherwise).add(child)
    return frozenset(computed), frozenset(used_otherwise)


def _uses(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Yield (child, "weight" or "other") for each `self.<child>` outside __init__, without metadata and assignments."""
    parents = {inner: outer for outer in ast.walk(tree) for inner in ast.iter_child_nodes(outer)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"):
            continue
        if isinstance(node.ctx, ast.Store) or _function_of(node, parents) in ("__init__", "reset_parameters"):
            continue
        read = parents.get(node)
        if not (isinstance(read, ast.Attribute) and read.value is node):
            yield node.attr, "other"
        elif read.attr == "weight":
            if not _is_metadata(parents.get(read)):
                yield node.attr, "weight"
        elif read.attr not in ("bias", "in_features", "out_features"):
            yield node.attr, "other"


def _is_metadata(use: ast.AST | None) -> bool:
    """Whether the node around a weight computes nothing with it: `.dtype`, `isinstance`, `is None`."""
    if isinstance(use, ast.Attribute):
        return use.attr in _METADATA
    if isinstance(use, ast.Compare):
        return all(isinstance(operator, (ast.Is, ast.IsNot)) for operator in use.ops)
    return isinstance(use, ast.Call) and isinstance(use.func, ast.Name) and use.func.id == "isinstance"


def _function_of(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> str:
    while node in parents and not isinstance(node, ast.FunctionDef):
        node = parents[node]
    return node.name if isinstance(node, ast.FunctionDef) else ""
