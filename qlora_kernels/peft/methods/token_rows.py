"""Trained rows, for some tokens, of an embedding's table and of the layers tied to it.

Source: PEFT's TrainableTokens, with the same names and files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.match import Names, check_names, matches
from ...nn.module_tree import input_embeddings_of
from ..core.offloaded import weight_of
from ..framework.injector import Injector
from ..framework.method import Method
from ..framework.ties import paths_of_tied
from ..layers.adapted_linear import base_of
from ..layers.base_layer import dense_weight, device_of, embedding_scale, is_embedding, is_linear, is_quantized
from ..layers.delta import Delta


class TokenRows(Delta):
    """Rows trainable_tokens_delta [T, d] for T tokens of the table of an embedding or of a head.

    They replace the rows of the base and of adapters that are applied before. As in nn.Embedding, the padding token
    gets no gradient.
    """

    scaling = 1.0
    tokens: Tensor
    order: Tensor

    def __init__(self, base: nn.Module, tokens: Sequence[int], rows: nn.Parameter) -> None:
        super().__init__()
        self.trainable_tokens_delta = rows
        self.of_embedding = is_embedding(base)
        sorted_tokens, order = torch.tensor(tokens, dtype=torch.int64, device=device_of(base)).sort()
        self.register_buffer("tokens", sorted_tokens, persistent=False)
        self.register_buffer("order", order, persistent=False)  # row number of each of the sorted tokens
        padding: int | None = getattr(base, "padding_idx", None)
        self.padding_row = None if padding is None or padding not in tokens else list(tokens).index(padding)

    def forward(self, x: Tensor, y: Tensor, base: nn.Module, bias: Tensor | None) -> Tensor:
        rows = weight_of(self, "trainable_tokens_delta")
        if self.of_embedding:
            place = torch.searchsorted(self.tokens, x.long()).clamp(max=len(self.tokens) - 1)
            own = F.embedding(self.order[place], rows, self.padding_row).to(y.dtype)
            own = (own * embedding_scale(base)).to(y.dtype)
            return torch.where((self.tokens[place] == x)[..., None], own, y)
        own = F.linear(x.to(rows.dtype), rows[self.order])
        if bias is not None:
            own = own + bias[self.tokens]
        return y.index_copy(-1, self.tokens, own.to(y.dtype))

    def merged(self, weight: Tensor, base: nn.Module) -> Tensor:
        return self.updated(weight, base).detach()

    def updated(self, weight: Tensor, base: nn.Module) -> Tensor:
        rows = weight_of(self, "trainable_tokens_delta")[self.order].to(weight.dtype)
        # The W of an embedding is the transpose of its table.
        return (
            weight.index_copy(1, self.tokens, rows.T) if self.of_embedding else weight.index_copy(0, self.tokens, rows)
        )


def layers_with_tables(injector: Injector, field: str, names: Names) -> dict[str, nn.Module]:
    """Return the embeddings and linear layers matched by `names`, by path, each once.

    Raises ValueError for a name that matches none.
    """
    layers = {n: m for n, m in injector.modules().items() if n and (is_embedding(m) or is_linear(m))}
    check_names(field, names, list(layers), of="an embedding or a linear layer")
    return {path: layer for path, layer in layers.items() if matches(names, path)}


def input_embeddings_path(injector: Injector, field: str) -> str:
    """Return the path of the model's input embedding. Raises ValueError if the model does not report it."""
    table = input_embeddings_of(injector.model)
    if table is None:
        raise ValueError(
            f"{field}: must name the embedding of a {type(injector.model).__name__}, which has no get_input_embeddings"
        )
    layer = base_of(table)
    return next(path for path, module in injector.modules().items() if module is layer)


def add_named_token_rows(method: Method, tokens: Sequence[int] | Mapping[str, Sequence[int]], *, tie: bool) -> None:
    """Give LoRA's layers rows for the tokens that trainable_token_indices names; see add_token_rows."""
    injector, field = method.injector, "trainable_token_indices"
    if not isinstance(tokens, Mapping):
        tokens = {input_embeddings_path(injector, field): tokens}
    wanted = {path: own for name, own in tokens.items() for path in layers_with_tables(injector, field, [name])}
    add_token_rows(method, field, wanted, init=True, suffix=".token_adapter", tie=tie)


def add_token_rows(
    method: Method,
    field: str,
    tokens: Mapping[str, Sequence[int]],
    *,
    init: bool,
    suffix: str = "",
    tie: bool = False,
) -> dict[str, str]:
    """Add trained rows for tokens to layers, as parts of the adapter.

    tokens: path of an embedding or head -> token ids.
    init: whether rows start as those of the base, and else normal.
    suffix: text after a layer's path in the file.
    tie: whether layers that share a weight must have the same tokens. Layers with the same tokens share rows, and so do
    layers that are tied to an embedding and have no tokens of their own. Shared rows are stored under the path of the
    first layer.
    Returns, for each layer that shares rows, its path -> the path of the layer that holds them.
    Raises ValueError, which names `field`, for tokens that a table does not have or that are given twice, and for
    layers that the adapter also changes in another way.
    """
    injector, added, shared = method.injector, dict[str, Sequence[int]](), dict[str, str]()
    tied = paths_of_tied(injector.modules())
    embeddings_first = sorted(tokens, key=lambda path: not is_embedding(injector.module(path)))
    for path in embeddings_first:
        same_weight = [parameter.removesuffix(".weight") for parameter in tied.get(f"{path}.weight", ())]
        first = next((other for other in added if other in same_weight), None)
        if first is not None and list(tokens[path]) != list(added[first]):
            if tie:
                raise ValueError(
                    f"{field}: layers that share a weight must have the same tokens with ensure_weight_tying, got "
                    f"{list(added[first])} for {first} and {list(tokens[path])} for {path}"
                )
            first = None
        _add(method, field, path, tokens[path], init, suffix, first)
        added[path] = tokens[path]
        if first is not None:
            shared[path] = first
        if first is None and is_embedding(injector.module(path)):
            for other in same_weight:
                if other not in tokens:
                    _add(method, field, other, tokens[path], init, suffix, path)
                    shared[other] = path
    return shared


def _add(
    method: Method, field: str, path: str, tokens: Sequence[int], init: bool, suffix: str, first: str | None
) -> None:
    """Add the rows to one layer. first: path of the layer with which the rows are shared."""
    injector = method.injector
    base: Any = injector.module(path)
    size = int(base.num_embeddings if is_embedding(base) else base.out_features)
    if beyond := [token for token in tokens if not 0 <= token < size]:
        raise ValueError(f"{field}: every token must lie in [0, {size}), the rows of {path}, got {beyond}")
    if not tokens or len(set(tokens)) < len(tokens):
        raise ValueError(f"{field}: the tokens of {path} must be one or more different ones, got {list(tokens)}")
    if f"{path}.weight" in method.overrides.paths:
        raise ValueError(f"{field}: {path} must not be in modules_to_save too, which trains all of its rows")
    if method.name in injector.adapt(path).deltas:
        raise ValueError(f"{field}: {path} must not be in target_modules too")
    if first is None:
        rows = _base_rows(base, tokens) if init else torch.randn(len(tokens), _width(base), device=device_of(base))
        parameter = nn.Parameter(rows.to(injector.adapter_dtype, copy=True))
    else:
        parameter = cast(TokenRows, method.tree[f"{first}{suffix}"]).trainable_tokens_delta
    delta = TokenRows(base, tokens, parameter)
    method.tree.add(f"{path}{suffix}", delta, owner=path, slot="deltas", in_file=first is None)


def _base_rows(base: nn.Module, tokens: Sequence[int]) -> Tensor:
    table = dense_weight(base) if is_quantized(base) else weight_of(base, "weight")
    return table.detach()[torch.tensor(tokens, device=table.device)]


def _width(base: Any) -> int:
    return int(base.embedding_dim if is_embedding(base) else base.in_features)
