"""SoftPrompt, the base of prompt tuning and P-tuning: trained embeddings before or among those of the input."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ...nn.module_tree import input_embeddings_of, unwrapped
from ..attention.prompt_layout import PromptLayout
from ..core.config import PeftConfig
from ..framework.injector import Injector
from ..framework.method import PROMPT_PREFIX, CalledModel, Method, PreparedCall, tensors_by_path
from ..layers.base_layer import device_of
from .torch_prompt import EncoderPrompt

SLOT = "prompt_encoder"


@dataclass(frozen=True, kw_only=True)
class SoftPromptConfig(PeftConfig):
    """Fields of all soft prompts.

    num_virtual_tokens: number n of trained embeddings.

    placeholder_token_id: if given, the trained embeddings replace, in order, the n positions of each row where
    input_ids has this id, as in P-tuning's templates. Otherwise they precede the input.
    token_dim, num_layers, num_attention_heads, num_transformer_submodules: PEFT's description of the model, filled in
    automatically.
    Raises ValueError, naming the field, for fewer than one virtual token.
    """

    num_virtual_tokens: int = 20
    placeholder_token_id: int | None = None
    token_dim: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    num_transformer_submodules: int | None = None

    own_fields: ClassVar[tuple[str, ...]] = ("placeholder_token_id",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_virtual_tokens < 1:
            raise ValueError(f"{type(self).__name__}: num_virtual_tokens must be >= 1, got {self.num_virtual_tokens}")


class SoftPrompt(Method):
    """Base of the methods that prepend trained embeddings.

    A subclass builds a module whose call returns the prompt [n, d]. The module is a child of the PeftModel, or of
    torch's encoder if the encoder reads the prompt. The first active soft prompt of a call lays out all of them, so
    rows with prompts of different lengths can share a batch.

    forward: the returned logits and last_hidden_state cover the input's positions only. The loss ignores the labels of
    virtual positions. In an encoder-decoder the prompt precedes the encoder's input.
    generate: the prompt is added once, as embeddings before those of the input.
    """

    config: SoftPromptConfig
    file_prefix = PROMPT_PREFIX

    def __init__(self, config: SoftPromptConfig, injector: Injector, name: str) -> None:
        model_config: Any = getattr(injector.model, "config", None)
        embeddings = input_embeddings(injector)
        layers = injector.layout.layers
        config = config.replace(
            token_dim=embeddings.embedding_dim if embeddings else injector.width(layers[0]),
            num_layers=len(layers) // (2 if injector.layout.seq2seq else 1),
            num_attention_heads=getattr(model_config, "num_attention_heads", None),
            num_transformer_submodules=1,
        )
        super().__init__(config, injector, name)
        self.owner = EncoderPrompt.place(injector) if embeddings is None else None
        self.built: nn.Module | None = self.new_prompt()

    def attach(self) -> None:
        super().attach()
        if self.owner is not None:
            encoder = EncoderPrompt(self._layout, self._leads)
            self.hooks += encoder.attach(self.injector.hooked_module(self.owner))
        self.tree.add("prompt", cast(nn.Module, self.built), owner=self.owner, slot=SLOT, in_file=False)
        self.built = None

    def new_prompt(self) -> nn.Module:
        """Return the module that is trained. self.config is complete."""
        raise NotImplementedError

    @property
    def module(self) -> nn.Module:
        return self.tree["prompt"]

    def replace_module(self, module: nn.Module) -> None:
        """Replace the module that computes the prompt."""
        self.injector.slot(self.owner, SLOT)[self.tree.places["prompt"].key] = module

    def prompt(self) -> Tensor:
        """Return the prompt [n, d] in the parameters' dtype."""
        return self.module()  # type: ignore[no-any-return]

    # Placement of the prompt

    def _leads(self) -> bool:
        """Whether this method lays out the prompts of the call, which is the task of the first active soft prompt."""
        acting = (
            m
            for name in self.injector.adapters
            if self.injector.selection.has(name)
            for m in self.injector.adapters[name]
        )
        return next((m is self for m in acting if isinstance(m, SoftPrompt)), False)

    def _layout(self, x: Tensor, modules: nn.ModuleDict) -> PromptLayout:
        """Return the layout of the prompts. x [B, ...]: the batch. modules: the prompts' modules, in a replica those of
        the replica.
        """
        selection = self.injector.selection
        prompts: dict[str, list[Tensor]] = {}
        for name in self.injector.adapters:
            if selection.has(name):
                soft = [m for m in self.injector.adapters[name] if isinstance(m, SoftPrompt)]
                prompts[name] = [modules[m.tree.places["prompt"].key]() for m in soft]
        if selection.state.rows is None:
            rows = [[p for parts in prompts.values() for p in parts]] * x.shape[0]
        else:
            rows = [prompts.get(name, []) for name in selection.rows_of(x.shape[0])]
        encoder_only = not (self.injector.layout.causal or self.injector.layout.seq2seq)
        return PromptLayout.of(rows, "right" if encoder_only else "left")

    def prepare_forward(self, model: CalledModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PreparedCall:
        if self.owner is not None or not self._leads():
            return PreparedCall(args, kwargs)
        kwargs = self._named(args, kwargs)
        ids, embeds = kwargs.pop("input_ids", None), kwargs.pop("inputs_embeds", None)
        past = _cached(kwargs)
        if self.config.placeholder_token_id is not None:
            inputs = {"input_ids": ids} if past else {"inputs_embeds": self._placed(model, ids)}
            return PreparedCall((), {**kwargs, **inputs})
        given = next((t for t in (ids, embeds, kwargs.get("decoder_input_ids")) if t is not None), None)
        if given is None:
            raise ValueError("soft prompt: input_ids or inputs_embeds must be given")
        layout = self._layout(given, model.prompt_encoder)
        length = given.shape[1]
        if (mask := layout.mask(kwargs.get("attention_mask"), past + length)) is not None:
            kwargs["attention_mask"] = mask
        if past or kwargs.get("encoder_outputs") is not None:
            # The prompt is already in the cache or in the encoder's output.
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = kwargs["position_ids"] + layout.lengths[:, None]
            elif layout.ragged and past and self._numbers_positions():
                kwargs["position_ids"] = past + torch.arange(length, device=given.device) - layout.filling
            return PreparedCall((), {**kwargs, "input_ids": ids, "inputs_embeds": embeds})
        embeds = _embedded(model, ids) if embeds is None else embeds
        self._extend_companions(layout, kwargs, length)
        kwargs["inputs_embeds"] = layout.join(layout.front, embeds)
        finish = None if self.injector.layout.seq2seq else partial(_own_positions, layout, length)
        return PreparedCall((), kwargs, finish)

    def _extend_companions(self, layout: PromptLayout, kwargs: dict[str, Any], length: int) -> None:
        """Extend labels, token types and positions, in place, by values for the virtual tokens."""
        labels: Tensor | None = kwargs.get("labels")
        if labels is not None and not labels.is_floating_point() and not self.injector.layout.seq2seq:
            per_token = labels.dim() == 2 and labels.shape[1] == length
            kwargs["labels"] = layout.fill(labels, -100) if per_token else labels
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = layout.fill(kwargs["token_type_ids"], 0)
        if kwargs.get("position_ids") is not None:
            own = torch.arange(layout.n, device=layout.front.device) - (layout.filling if layout.side == "left" else 0)
            shifted = kwargs["position_ids"] + layout.lengths[:, None]
            kwargs["position_ids"] = layout.join(own.clamp(min=0).expand(shifted.shape[0], -1), shifted)
        elif layout.ragged and layout.side == "left" and self._numbers_positions():
            numbers = torch.arange(layout.n + length, device=layout.front.device) - layout.filling
            kwargs["position_ids"] = numbers.clamp(min=0)

    def prepare_generate(self, model: CalledModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> PreparedCall:
        if not self._leads():
            return PreparedCall(args, kwargs)
        kwargs = self._named(args, kwargs, first="inputs")
        ids = kwargs.pop("inputs", None) if "input_ids" not in kwargs else kwargs.pop("input_ids")
        seq2seq = self.injector.layout.seq2seq
        finish = None if seq2seq else partial(_with_input, ids)
        if kwargs.get("max_length") is not None and not seq2seq:
            # generate limits lengths by its number of input tokens, but here the input is embeddings.
            kwargs["max_new_tokens"] = kwargs.pop("max_length") - ids.shape[1]
        if self.config.placeholder_token_id is not None:
            return PreparedCall((), {**kwargs, "inputs_embeds": self._placed(model, ids)}, finish)
        layout = self._layout(ids, model.prompt_encoder)
        mask = layout.mask(kwargs.pop("attention_mask", None), ids.shape[1])
        if mask is None:
            mask = torch.ones(ids.shape[0], layout.n + ids.shape[1], dtype=torch.long, device=ids.device)
        embeds = layout.join(layout.front, _embedded(model, ids))
        return PreparedCall((), {**kwargs, "inputs_embeds": embeds, "attention_mask": mask}, finish)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any], first: str = "input_ids") -> dict[str, Any]:
        if len(args) > 1:
            raise TypeError(f"soft prompt: all arguments but {first} must be given by name")
        return {**({first: args[0]} if args else {}), **kwargs}

    def _placed(self, model: CalledModel, ids: Tensor | None) -> Tensor:
        """Return the embeddings of ids [B, S] with the prompt at the positions of the placeholder."""
        if ids is None:
            raise ValueError("soft prompt: input_ids must be given where placeholder_token_id is set")
        places = ids.eq(self.config.placeholder_token_id or 0)
        n, counts = self.config.num_virtual_tokens, places.sum(1)
        if (counts != n).any():
            raise ValueError(f"soft prompt: each row must have {n} placeholders, got {counts.tolist()}")
        embeds = _embedded(model, ids.masked_fill(places, 0))
        prompt = model.prompt_encoder[self.tree.places["prompt"].key]()
        return embeds.masked_scatter(places[..., None], prompt.to(embeds.dtype).repeat(ids.shape[0], 1))

    def _numbers_positions(self) -> bool:
        return "position_ids" in inspect.signature(self.injector.model.forward).parameters

    def row_mixing_unsupported(self) -> str | None:
        if self.config.placeholder_token_id is not None:
            return "it takes the places of a placeholder, for the whole batch"
        return super().row_mixing_unsupported()

    # In files

    @property
    def loads_in_peft(self) -> bool:  # type: ignore[override]
        return self.config.placeholder_token_id is None

    def file_config(self) -> dict[str, Any]:
        return {**super().file_config(), "peft_type": self.config.peft_type + ("" if self.loads_in_peft else "_PLACED")}

    def tensors(self) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.prompt().detach().clone(), **super().tensors()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        tensors = tensors_by_path(tensors, self.file_prefix)
        if "prompt_embeddings" not in tensors:
            raise ValueError(
                "adapter file: must hold prompt_embeddings, got a file without them; save the adapter again"
            )
        rows, n = tensors.pop("prompt_embeddings"), self.config.num_virtual_tokens
        if rows.shape not in ((n, self.config.token_dim), (2 * n, self.config.token_dim)):
            want = [n, self.config.token_dim]
            raise ValueError(f"adapter file: prompt_embeddings must be {want}, got {list(rows.shape)}")
        # PEFT allocates n further rows for a decoder, which its forward never reads.
        self.set_prompt(rows[:n])
        self.fill(tensors)

    def set_prompt(self, rows: Tensor) -> None:
        """Set the values that prompt() returns from now on, rows [n, d]."""
        raise NotImplementedError

    def embedding_device(self) -> torch.device:
        """Return the device of the input embedding, or of the model without one."""
        embeddings = input_embeddings(self.injector)
        return device_of(embeddings if embeddings is not None else self.injector.model)


def _embedded(model: CalledModel, ids: Tensor) -> Tensor:
    embeds: Tensor = cast(Any, unwrapped(model.base_model)).get_input_embeddings()(ids)
    return embeds


def _own_positions(layout: PromptLayout, length: int, output: Any) -> Any:
    """Return the output of forward without the positions of the prompts."""
    if isinstance(output, tuple):
        raise NotImplementedError("soft prompt: return_dict must be True")
    for field in ("logits", "last_hidden_state", "start_logits", "end_logits"):
        value = getattr(output, field, None)
        if value is not None and value.dim() > 1 and value.shape[1] == layout.n + length:
            output[field] = layout.tokens(value)
    return output


def _with_input(ids: Tensor, output: Any) -> Any:
    """Prepend the input, because generate returns only new tokens for embeddings and callers expect the input before
    them.
    """
    sequences = output if isinstance(output, Tensor) else output.sequences
    whole = torch.cat([ids.repeat_interleave(sequences.shape[0] // ids.shape[0], 0), sequences], dim=1)
    if isinstance(output, Tensor):
        return whole
    output.sequences = whole
    return output


def input_embeddings(injector: Injector) -> nn.Embedding | None:
    """Return the model's input embedding, or None if it has none."""
    return cast("nn.Embedding | None", input_embeddings_of(injector.model))


def _cached(kwargs: dict[str, Any]) -> int:
    """Return the number of positions in the cache among the arguments, under any of its names."""
    lengths = [int(v.get_seq_length()) for v in kwargs.values() if callable(getattr(v, "get_seq_length", None))]
    return max(lengths) if lengths else 0  # max(..., default=0) would break the graph of torch.compile
