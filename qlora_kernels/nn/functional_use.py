"""Finds linear layers whose holder computes with their weight, as in `F.linear(x, self.proj.weight)`.

A quantized layer works there, because its `weight` returns the dequantized weight. Mamba's fused kernels take the
weights of layers that its plain implementation calls.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any, cast

from torch import nn

from .module_tree import names_of, unwrapped

_METADATA = frozenset({"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_cuda"})
"""Attributes of a weight whose use is not a computation with it."""
_NOT_FORWARD = re.compile("__init__$|reset_parameters$|_?init_weights$|[gs]et_|tie_|_?resize|_?load|post_init$")
"""Functions that prepare a model, and those that return or replace a module for others."""


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


def weight_is_computed_with(model: nn.Module, target: nn.Module) -> bool:
    """Whether the code of some module of `model` may compute with the weight of `target`; it may call it too.

    Found in the sources of the classes of `model`: a chain such as `self.model.embed_tokens.weight`, or other code that
    is given the module or the list that holds it (DeBERTa and Perceiver give the embedding to their heads). What that
    code does with a module is not looked at, so the answer may be True where it only calls it.
    """
    last = {part for name in names_of(model, target) for part in name.split(".")[-2:]}
    return any(
        _leads_to(holder, chain, target)
        for holder in model.modules()
        for chain in _chains_computed_with(cast(Any, type(holder)))
        if chain[-1] in last
    )


def _leads_to(holder: nn.Module, chain: tuple[str, ...], target: nn.Module) -> bool:
    """Whether `holder.<chain>` is `target`, or a list that holds it."""
    reached: Any = holder
    for name in chain:
        reached = getattr(reached, name, None)
    listed = reached.children() if isinstance(reached, (nn.ModuleList, nn.ModuleDict)) else ()
    return any(isinstance(each, nn.Module) and unwrapped(each) is target for each in (reached, *listed))


@cache
def _children_by_use(kind: Any) -> tuple[frozenset[str], frozenset[str]]:
    """Return two sets of attributes of self: those whose `.weight` the class computes with, and those used
    otherwise.
    """
    nothing: frozenset[str] = frozenset()
    if kind.__module__.startswith("torch.nn.modules.") and kind is not nn.MultiheadAttention:
        return nothing, nothing
    trees = _trees(kind)
    if None in trees:
        return nothing, nothing
    uses = [use for tree in trees if tree is not None for use in _uses(tree)]
    computed = frozenset(child for child, use in uses if use == "weight")
    return computed, frozenset(child for child, use in uses if use == "other")


@cache
def _chains_computed_with(kind: Any) -> frozenset[tuple[str, ...]]:
    """Chains of attributes of self, (a, b) for self.a.b, whose `.weight` the code of a class may compute with."""
    if kind.__module__.startswith("torch.nn.") and kind is not nn.MultiheadAttention:
        return frozenset()
    return frozenset(chain for tree in _trees(kind) if tree is not None for chain in _chains(tree))


@cache
def _trees(kind: Any) -> tuple[ast.AST | None, ...]:
    """The source of a class and of each that it inherits from, but for torch's and transformers' base classes.

    None represents a class whose source is not available.
    """
    trees: list[ast.AST | None] = []
    for base in kind.__mro__:
        if base in (nn.Module, object) or base.__module__ == "transformers.modeling_utils":
            continue
        try:
            trees.append(ast.parse(textwrap.dedent(inspect.getsource(base))))
        except (OSError, TypeError, SyntaxError):
            trees.append(None)
    return tuple(trees)


def _chains(tree: ast.AST) -> Iterator[tuple[str, ...]]:
    parents = {inner: outer for outer in ast.walk(tree) for inner in ast.iter_child_nodes(outer)}
    for node in ast.walk(tree):
        chain = _chain_from_self(node)
        outer = parents.get(node)
        if not chain or not isinstance(outer, ast.AST) or _NOT_FORWARD.match(_function_of(node, parents)):
            continue
        if not isinstance(node, ast.Attribute) or isinstance(node.ctx, ast.Store):
            continue
        if chain[-1] == "weight":
            if len(chain) > 1 and not _is_metadata(outer):
                yield chain[:-1]
        elif not (isinstance(outer, (ast.Attribute, ast.Subscript, ast.Compare)) or _is_call_of(outer, node)):
            yield chain  # handed on


def _chain_from_self(node: ast.AST) -> tuple[str, ...]:
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return tuple(reversed(names)) if isinstance(node, ast.Name) and node.id == "self" else ()


def _is_call_of(outer: ast.AST, node: ast.AST) -> bool:
    """Return whether `outer` is a call of `node`, or a call such as isinstance or hasattr that inspects `node`."""
    if not isinstance(outer, ast.Call):
        return False
    asks = isinstance(outer.func, ast.Name) and outer.func.id in ("isinstance", "hasattr", "len", "type", "id")
    return outer.func is node or asks


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
