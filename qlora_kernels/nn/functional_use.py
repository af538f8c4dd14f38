"""Finds linear layers whose holder computes with their weight, as in `F.linear(x, self.proj.weight)`.

A quantized layer works there, because its `weight` returns the dequantized weight. An adapted layer must include its
updates in `weight` there. Mamba's fused kernels take the weights of layers that its plain implementation calls.

The source of each class is parsed once, and one walk over it lists its reads of attributes of `self`.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple, cast

from torch import nn

from .module_tree import unwrapped

_METADATA = frozenset({"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_cuda"})
"""Attributes of a weight whose use is not a computation with it."""
_INSPECTIONS = frozenset({"isinstance", "hasattr", "len", "type", "id"})
"""Functions that inspect a module and compute nothing with its weight."""
_NOT_FORWARD = re.compile("__init__$|reset_parameters$|_?init_weights$|[gs]et_|tie_|_?resize|_?load|post_init$")
"""Functions that prepare a model, and functions that return or replace a module for others."""


class _Read(NamedTuple):
    """A chain of attributes of self in the source of a class, such as self.model.embed_tokens.weight.

    names: the attributes in order. A chain ends at the weight of a module, at a call, or at an index.
    is_weight: whether the last name is the weight of the module before it.
    around: the node that contains the chain; called, stored: whether it calls the chain, or assigns to it.
    function: name of the function that contains the chain.
    """

    names: tuple[str, ...]
    is_weight: bool
    around: ast.AST | None
    called: bool
    stored: bool
    function: str


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


def weights_computed_with(model: nn.Module, layers: Iterable[nn.Module]) -> set[nn.Module]:
    """Return those of `layers` with whose weight the code of some module of `model` may compute.

    The sources of the classes of `model` are searched for a chain such as `self.model.embed_tokens.weight`, and for
    code that passes the layer, or the list that holds it, to other code (DeBERTa and Perceiver pass the embedding to
    their heads). The other code is not analysed, so a layer that it only calls may be returned too.
    """
    wanted = set(layers)
    names: dict[nn.Module, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in wanted:
            names.setdefault(module, set()).update(name.split(".")[-2:])
    last = set().union(*names.values())
    return {
        layer
        for holder in model.modules()
        for chain in _chains_computed_with(cast(Any, type(holder)))
        if chain[-1] in last
        for layer in _reached(holder, chain)
        if chain[-1] in names.get(layer, ())
    }


def _reached(holder: nn.Module, chain: tuple[str, ...]) -> list[nn.Module]:
    """Return the module `holder.<chain>`, and the modules in it if it is a list."""
    reached: Any = holder
    for name in chain:
        reached = getattr(reached, name, None)
    listed = reached.children() if isinstance(reached, (nn.ModuleList, nn.ModuleDict)) else ()
    return [unwrapped(module) for module in (reached, *listed) if isinstance(module, nn.Module)]


@cache
def _children_by_use(kind: Any) -> tuple[frozenset[str], frozenset[str]]:
    """Return two sets of attributes of self: those whose `.weight` the class computes with, and those used
    otherwise.
    """
    nothing: frozenset[str] = frozenset()
    if kind.__module__.startswith("torch.nn.modules.") and kind is not nn.MultiheadAttention:
        return nothing, nothing
    reads = _reads(kind)
    if None in reads:
        return nothing, nothing
    computed, otherwise = set(), set()
    for read in reads:
        if read is None or read.function in ("__init__", "reset_parameters"):
            continue
        if len(read.names) == 1:
            if not read.stored:
                otherwise.add(read.names[0])
        elif read.names[1] == "weight":
            if not _is_metadata(read.around):
                computed.add(read.names[0])
        elif read.names[1] not in ("bias", "in_features", "out_features"):
            otherwise.add(read.names[0])
    return frozenset(computed), frozenset(otherwise)


@cache
def _chains_computed_with(kind: Any) -> frozenset[tuple[str, ...]]:
    """Return chains of attributes of self, (a, b) for self.a.b, with whose `.weight` a class may compute."""
    if kind.__module__.startswith("torch.nn.") and kind is not nn.MultiheadAttention:
        return frozenset()
    chains = set()
    for read in _reads(kind):
        if read is None or read.around is None or read.stored or _NOT_FORWARD.match(read.function):
            continue
        if read.is_weight:
            if not _is_metadata(read.around):
                chains.add(read.names[:-1])
        elif not (read.called or isinstance(read.around, (ast.Subscript, ast.Compare)) or _inspects(read.around)):
            chains.add(read.names)  # passed to other code
    return frozenset(chains)


@cache
def _reads(kind: Any) -> tuple[_Read | None, ...]:
    """Return the reads in the source of a class and of its bases, except torch's and transformers' base classes.

    None represents a class whose source is not available.
    """
    reads: list[_Read | None] = []
    for base in kind.__mro__:
        if base in (nn.Module, object) or base.__module__ == "transformers.modeling_utils":
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            reads.append(None)
            continue
        reads += _reads_in(tree)
    return tuple(reads)


def _reads_in(tree: ast.AST) -> Iterator[_Read]:
    """Yield the chains of attributes of self in a syntax tree."""
    around: dict[ast.AST, ast.AST] = {inner: outer for outer in ast.walk(tree) for inner in ast.iter_child_nodes(outer)}
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"):
            continue
        names, outer = [node.attr], around.get(node)
        is_weight = False
        while isinstance(outer, ast.Attribute) and not is_weight:
            node = outer
            names.append(node.attr)
            outer, is_weight = around.get(node), node.attr == "weight"
        called = isinstance(outer, ast.Call) and outer.func is node
        stored = isinstance(node.ctx, ast.Store)
        yield _Read(tuple(names), is_weight, outer, called, stored, _function_of(node, around))


def _inspects(around: ast.AST) -> bool:
    """Whether the node around a module only inspects it."""
    return isinstance(around, ast.Call) and isinstance(around.func, ast.Name) and around.func.id in _INSPECTIONS


def _is_metadata(around: ast.AST | None) -> bool:
    """Whether the node around a weight computes nothing with it: `.dtype`, `isinstance`, `is None`."""
    if isinstance(around, ast.Attribute):
        return around.attr in _METADATA
    if isinstance(around, ast.Compare):
        return all(isinstance(operator, (ast.Is, ast.IsNot)) for operator in around.ops)
    return isinstance(around, ast.Call) and isinstance(around.func, ast.Name) and around.func.id == "isinstance"


def _function_of(node: ast.AST, around: dict[ast.AST, ast.AST]) -> str:
    while node in around and not isinstance(node, ast.FunctionDef):
        node = around[node]
    return node.name if isinstance(node, ast.FunctionDef) else ""
