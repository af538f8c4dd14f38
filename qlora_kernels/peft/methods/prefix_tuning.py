"""Prefix Tuning and P-Tuning v2: trained keys and values that are prepended in each attention.

Source: Prefix-Tuning (arXiv:2101.00190), P-Tuning v2 (arXiv:2110.07602). Files are PEFT's PREFIX_TUNING.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn.match import as_names
from ...nn.quantized_weight import is_sharded
from ..attention.prefix_slot import SLOT, Prefix, PrefixSource, attention_slot, restore_attention
from ..attention.relative_bias import bias_source
from ..core.adapter_tree import effective_state
from ..core.config import PeftConfig
from ..core.offloaded import weight_of
from ..framework.injector import Injector
from ..framework.method import PROMPT_PREFIX, Method, load_into, tensors_by_path
from ..framework.registry import register_method
from ..layers.base_layer import device_of
from .prefix_init import prefix_of_tokens

if TYPE_CHECKING:
    from typing_extensions import Self

SITES = ("decoder", "encoder", "cross")


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(PeftConfig):
    """Configuration of prefix tuning.

    num_virtual_tokens: number n of prefix positions in each layer.

    prefix_projection: whether the prefixes come from an embedding and an MLP, as in the paper; PEFT's default is False,
    which is P-Tuning v2. Adapter files hold only the resulting prefixes.
    encoder_hidden_size: width of the MLP; None = 512.
    init_weights: None = N(0, 1), or "zero".
    prefix_dropout: dropout probability of keys and values.
    init_token_ids: prefixes start as the keys and values of these tokens, repeated or cut to n; only without an MLP. A
    decoder then starts out exactly as if the tokens preceded its input. from_text(text, tokenizer) fills this field.
    sites: attentions that get a prefix, from "decoder", "encoder" and "cross"; None = all that the model has.
    position_offset: whether the positions of the input's tokens start at n, and T5's decoder gets relative positions
    for its prefix, as in PEFT; None = in decoders. Otherwise positions start at 0 and the prefix has no position.
    peft_layers: whether decoder layer l of an encoder-decoder with L decoder layers uses prefix 2l mod L. PEFT assigns
    its rows to layers in this order, so the field is set when a PEFT file is loaded.
    token_dim, num_layers, num_attention_heads, num_transformer_submodules: PEFT's description of the model, filled in
    automatically.
    Raises ValueError, naming the field, for fewer than one virtual token, an unknown site, or prefix_projection
    together with init_token_ids.
    """

    peft_type = "PREFIX_TUNING"

    num_virtual_tokens: int = 20
    prefix_projection: bool = True
    encoder_hidden_size: int | None = None
    init_weights: Literal["zero"] | None = None
    init_token_ids: list[int] | tuple[int, ...] | None = None
    prefix_dropout: float = 0.0
    sites: list[str] | tuple[str, ...] | str | None = None
    position_offset: bool | None = None
    peft_layers: bool = False
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    num_transformer_submodules: int | None = None

    own_fields: ClassVar[tuple[str, ...]] = (
        "prefix_dropout",
        "sites",
        "position_offset",
        "peft_layers",
        "init_token_ids",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_virtual_tokens < 1:
            raise ValueError(f"{type(self).__name__}: num_virtual_tokens must be >= 1, got {self.num_virtual_tokens}")
        if unknown := set(as_names(self.sites)) - set(SITES):
            raise ValueError(f"{type(self).__name__}: sites must be of {SITES}, got {sorted(unknown)}")
        if self.init_token_ids and self.prefix_projection:
            raise ValueError(f"{type(self).__name__}: prefix_projection must be False with init_token_ids")

    @classmethod
    def from_text(cls, text: str, tokenizer: Callable[[str], Any], **fields: Any) -> Self:
        """Return a configuration whose prefixes start from the words of `text`, without an MLP.

        tokenizer: callable as in transformers; tokenizer(text)["input_ids"] is a list of ids. num_virtual_tokens
        defaults to the number of tokens.
        """
        ids = list(tokenizer(text)["input_ids"])
        fields = {"num_virtual_tokens": len(ids), "prefix_projection": False, **fields}
        return cls(init_token_ids=ids, **fields)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the configuration of a file. In PEFT's files for an encoder-decoder, only the decoder's self-attention
        has a prefix.
        """
        if "sites" not in values and values.get("num_transformer_submodules") == 2:
            values = {**values, "sites": ["decoder"], "peft_layers": True}
        return super().from_dict(values)


@dataclass(frozen=True, kw_only=True)
class PTuningV2Config(PrefixTuningConfig):
    """Deep prompts trained directly, without the MLP; a classification head by task_type, e.g. "SEQ_CLS"."""

    peft_type = "P_TUNING_V2"

    prefix_projection: bool = False


class PrefixEncoder(nn.Module):
    """Network that gives keys and values, [heads_kv, n, head_dim] each, of `n_layers` attentions, from one embedding of
    n rows.

    Flat form: embedding.weight [n, n_layers * 2 * heads_kv * head_dim] holds the keys of layer l at entry 2l and its
    values at entry 2l + 1. With a hidden size, an embedding [n, token_dim], a down projection, tanh and an up
    projection compute the same rows.
    Each layer computes its part when it runs, so no result is kept between layers or for backward.
    """

    def __init__(
        self,
        n: int,
        n_layers: int,
        heads: int,
        head_dim: int,
        hidden: int | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.n_layers, self.heads, self.head_dim = n_layers, heads, head_dim
        width = n_layers * 2 * heads * head_dim
        token_dim = heads * head_dim
        self.embedding = nn.Embedding(n, token_dim if hidden else width, device=device, dtype=dtype)
        self.down = nn.Linear(token_dim, hidden, device=device, dtype=dtype) if hidden else None
        self.up = nn.Linear(hidden, width, device=device, dtype=dtype) if hidden else None
        self.dropout_p = 0.0

    def forward(self, layer: int) -> tuple[Tensor, Tensor]:
        rows = slice(2 * layer * self.heads * self.head_dim, 2 * (layer + 1) * self.heads * self.head_dim)
        pair = self._rows(rows).view(-1, 2, self.heads, self.head_dim).permute(1, 2, 0, 3)
        keys, values = F.dropout(pair, self.dropout_p, self.training)
        return keys, values

    def _rows(self, rows: slice) -> Tensor:
        if self.down is None or self.up is None:
            return weight_of(self.embedding, "weight")[:, rows]
        hidden = torch.tanh(self.down(weight_of(self.embedding, "weight")))
        return F.linear(hidden, weight_of(self.up, "weight")[rows], weight_of(self.up, "bias")[rows])

    @torch.no_grad()
    def flat(self) -> Tensor:
        """Return the prefixes [n, n_layers * 2 * heads_kv * head_dim], which are all that inference needs."""
        return self._rows(slice(None)).detach().clone()

    def set_flat(self, rows: Tensor) -> None:
        """Switch to the flat form with these prefixes and drop the MLP.

        Raises ValueError for rows of another shape.
        """
        if rows.shape != (want := (self.embedding.num_embeddings, self.n_layers * 2 * self.heads * self.head_dim)):
            raise ValueError(f"adapter file: prompt_embeddings must be {list(want)}, got {list(rows.shape)}")
        old = self.embedding.weight
        self.embedding = nn.Embedding(rows.shape[0], rows.shape[1], _weight=rows.to(old.device, old.dtype, copy=True))
        self.embedding.requires_grad_(old.requires_grad)
        self.down = self.up = None


class PrefixPart(PrefixSource):
    """Keys and values of one attention. The encoder is shared, and a child of every attention that uses it."""

    def __init__(self, adapter: str, encoder: PrefixEncoder, layer: int) -> None:
        super().__init__(adapter)
        self.encoder, self.layer = encoder, layer

    def forward(self) -> Prefix:
        return Prefix(*self.encoder(self.layer))


@register_method(PrefixTuningConfig)
class PrefixTuning(Method):
    """Prefix tuning: each attention has a slot with a part of the encoder of its site. `prefixes`: site -> encoder.

    Raises ValueError for a site that the model does not have.
    """

    config: PrefixTuningConfig
    file_prefix = PROMPT_PREFIX
    part_type: type[PrefixPart] = PrefixPart

    def __init__(self, config: PrefixTuningConfig, injector: Injector, name: str) -> None:
        self.attentions = _attentions(injector)
        sites = tuple(site for site in SITES if site in self.attentions and site in (as_names(config.sites) or SITES))
        if missing := set(as_names(config.sites)) - set(sites):
            raise ValueError(
                f"prefix: sites must be among the model's, {sorted(self.attentions)}, got {sorted(missing)}; leave "
                "them out"
            )
        heads, head_dim = _heads(injector, self.attentions[sites[0]][0])
        offset = config.position_offset if config.position_offset is not None else "decoder" in sites
        config = config.replace(
            sites=sites,
            position_offset=offset,
            token_dim=heads * head_dim,
            num_attention_heads=heads,
            num_layers=len(self.attentions[sites[0]]),
            num_transformer_submodules=2 if len(self.attentions) > 1 else 1,
            encoder_hidden_size=(config.encoder_hidden_size or 512) if config.prefix_projection else heads * head_dim,
        )
        super().__init__(config, injector, name)
        self.sites = sites
        self.built: dict[str, PrefixPart] = {}
        for site in sites:
            paths = self.attentions[site]
            encoder = self._new_encoder(paths)
            for i, path in enumerate(paths):
                layer = 2 * i % len(paths) if config.peft_layers else i
                self.built[path] = self.new_part(site, path, encoder, layer)

    def attach(self) -> None:
        super().attach()
        config, injector = self.config, self.injector
        built, self.built = self.built, {}
        for path, part in built.items():
            self._attach(path, part)
        if words := list(config.init_token_ids or ()):
            n = config.num_virtual_tokens
            for site, encoder in self.prefixes.items():
                encoder.set_flat(prefix_of_tokens(injector, self.attentions[site], (words * (n // len(words) + 1))[:n]))
            self.config = self.config.replace(init_token_ids=None)
        if config.position_offset:
            for path in injector.layout.positions:
                handle = injector.hooked_module(path).register_forward_pre_hook(self._shift_positions, with_kwargs=True)
                self.hooks.append(handle)

    def _new_encoder(self, paths: Sequence[str]) -> PrefixEncoder:
        shapes = {_heads(self.injector, path) for path in paths}
        if len(shapes) > 1:
            raise NotImplementedError(f"prefix: all layers must have the same key/value heads, got {sorted(shapes)}")
        ((heads, head_dim),) = shapes
        config = self.config
        hidden = config.encoder_hidden_size if config.prefix_projection else None
        device, dtype = device_of(self.injector.module(paths[0])), self.injector.adapter_dtype
        encoder = PrefixEncoder(config.num_virtual_tokens, len(paths), heads, head_dim, hidden, device, dtype)
        encoder.dropout_p = config.prefix_dropout
        if config.init_weights == "zero":
            nn.init.zeros_(encoder.embedding.weight)
        return encoder

    def new_part(self, site: str, path: str, encoder: PrefixEncoder, layer: int) -> PrefixPart:
        """Build the part of the attention at `path`, which reads layer `layer` of the site's encoder."""
        part = self.part_type(self.name, encoder, layer)
        if site == "decoder" and self.config.position_offset:
            part.bias = bias_source(self.injector.module(self.attentions[site][0]))
        return part

    def _attach(self, path: str, part: PrefixPart) -> None:
        attention_slot(self.injector.module(path), self.injector.selection)
        self.tree.add(part_path(path), part, owner=path, slot=SLOT, in_file=False)

    @property
    def prefixes(self) -> dict[str, PrefixEncoder]:
        """Return the prefix encoder of each site."""
        parts = {site: cast(PrefixPart, self.tree[part_path(self.attentions[site][0])]) for site in self.sites}
        return {site: part.encoder for site, part in parts.items()}

    def _shift_positions(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Add num_virtual_tokens to the positions of tokens. Positions are the integer tensors among a module's
        inputs.
        """
        if not self.injector.selection.has(self.name):
            return args, kwargs
        return tuple(map(self._shifted, args)), {key: self._shifted(value) for key, value in kwargs.items()}

    def _shifted(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.is_floating_point():
            return value
        selection, n = self.injector.selection, self.config.num_virtual_tokens
        rows = selection.state.rows
        if rows is None:
            return value + n
        value = value.expand(len(rows), *value.shape[1:]) if value.shape[0] == 1 else value
        own = torch.tensor([name == self.name for name in selection.rows_of(value.shape[0])], device=value.device)
        return value + n * own.view(-1, *(1,) * (value.dim() - 1))

    def detach(self) -> None:
        super().detach()
        attentions = [self.injector.module(path) for paths in self.attentions.values() for path in paths]
        others = [module for module in self.injector.modules().values() if SLOT in module._modules]
        for attention in attentions:
            restore_attention(attention, others)

    # In files, PEFT's prompt_embeddings is the decoder's prefix of a seq2seq model, and else the only prefix.

    @property
    def loads_in_peft(self) -> bool:  # type: ignore[override]
        """PEFT supports one site, one numbering of positions, and its own order of a decoder's layers."""
        config = self.config
        same_layers = config.peft_layers or not self.injector.layout.seq2seq
        return self.sites in (("decoder",), ("encoder",)) and bool(config.position_offset) and same_layers

    def file_config(self) -> dict[str, Any]:
        return {
            **super().file_config(),
            "peft_type": "PREFIX_TUNING" if self.loads_in_peft else self.config.peft_type + "_SITES",
        }

    def tensors(self) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.prefixes[self._main].flat(), **super().tensors()}

    @property
    def _main(self) -> str:
        return self.sites[0]

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        tensors = tensors_by_path(tensors, self.file_prefix)
        if "prompt_embeddings" not in tensors:
            raise ValueError(
                "adapter file: must hold prompt_embeddings, got a file without them; save the adapter again"
            )
        self.prefixes[self._main].set_flat(tensors.pop("prompt_embeddings"))
        self.fill(tensors)

    def extras(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, _ = super().extras()
        prefixes = self.prefixes
        others = {f"flat.{site}": encoder.flat() for site, encoder in prefixes.items() if site != self._main}
        projected = {
            f"projection.{site}.{key}": value
            for site, encoder in prefixes.items()
            for key, value in effective_state(encoder).items()
        }
        has_mlp = any(encoder.down is not None for encoder in prefixes.values())
        return values, {**others, **(projected if has_mlp else {})}

    def load_extras(self, values: dict[str, Any], tensors: dict[str, Tensor], *, is_trainable: bool) -> None:
        if any(is_sharded(encoder.embedding.weight) for encoder in self.prefixes.values()):
            return  # the values are among the trained parameters of a run's checkpoint
        projected = {k.removeprefix("projection."): v for k, v in tensors.items() if k.startswith("projection.")}
        if projected and is_trainable:
            for site, encoder in self.prefixes.items():
                fresh = self._new_encoder(self.attentions[site])
                encoder.embedding, encoder.down, encoder.up = fresh.embedding, fresh.down, fresh.up
            load_into(nn.ModuleDict(self.prefixes), projected)
        else:
            for site, encoder in self.prefixes.items():
                if site != self._main:
                    encoder.set_flat(tensors[f"flat.{site}"])


@register_method(PTuningV2Config)
class PTuningV2(PrefixTuning):
    """Prefix tuning without the MLP."""


def part_path(attention: str) -> str:
    """Return the path of a prefix part in the adapter's tree, from the path of its attention."""
    return f"{attention}.prefix"


def _attentions(injector: Injector) -> dict[str, list[str]]:
    """Return site -> paths of the attention modules at the site, in the order of the layers."""
    found: dict[str, list[str]] = {}
    for layer in injector.layout.layers:
        found.setdefault(layer.stack, []).append(layer.self_attention)
        if layer.cross_attention:
            found.setdefault("cross", []).append(layer.cross_attention)
    return found


def _heads(injector: Injector, path: str) -> tuple[int, int]:
    """Return (key/value heads, head_dim) of an attention module, from the attributes of transformers and torch."""
    attention = injector.module(path)
    config = getattr(attention, "config", attention)
    names = ("num_key_value_heads", "num_attention_heads", "n_heads", "num_heads")
    heads = next(
        int(n) for source in (attention, config) for name in names if isinstance(n := getattr(source, name, None), int)
    )
    sizes = ("head_dim", "attention_head_size", "key_value_proj_dim")
    head_dim = next(int(d) for name in sizes if isinstance(d := getattr(attention, name, None), int))
    return heads, head_dim
