"""PeftModel: a base model and its adapters. get_peft_model makes one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...nn.match import as_names
from ...nn.module_tree import shards, synchronizes, unwrapped
from ...nn.quantized_weight import is_sharded
from ..core.adapter_selection import BASE, States, capture_states, using_states
from ..core.adapter_tree import AdapterModules
from ..core.config import PeftConfig
from ..core.sharded import full_tensor
from ..framework import checkpoint
from ..framework.injector import Injector
from ..framework.method import Adapters, Method, methods_of
from ..framework.registry import method_for
from ..framework.ties import declare_ties
from ..layers.foreign_layer import forget_quantization
from ..methods.lora import Lora
from . import merging
from .adapter_names import batch_size, check_rows, expanded_rows
from .combine import Combination, weighted_lora
from .counting import count_parameters
from .explain import Explanation, explain
from .huggingface import RecognizedAsPeftModel, check_save_options
from .recomputation import save_state_with_regions
from .resize import resize_token_embeddings

Configs = PeftConfig | Sequence[PeftConfig]


def _as_list(configs: Configs) -> list[PeftConfig]:
    return [configs] if isinstance(configs, PeftConfig) else list(configs)


def get_peft_model(
    model: nn.Module,
    peft_config: Configs,
    adapter_name: str = "default",
    *,
    adapter_dtype: torch.dtype = torch.float32,
) -> PeftModel:
    """`model`, frozen, with one new adapter: a method, or several at once by a list of configurations.

    The model is changed in place (its layers are wrapped or hooked); unload() gives it back.
    adapter_dtype: of the trained parameters; float32 masters by default, also over a bf16 or NF4 base.
    """
    return PeftModel(model, peft_config, adapter_name, adapter_dtype=adapter_dtype)


class PeftModel(RecognizedAsPeftModel, nn.Module):
    """What is called, trained, merged and saved. Attributes it lacks are the base model's.

    The adapters' parameters are inside `base_model`, in the modules whose output they change, those of prompts in
    `prompt_encoder`; docs/methods.md says under which names.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: Configs | None = None,
        adapter_name: str = "default",
        *,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if isinstance(model, PeftModel):
            raise TypeError("get_peft_model: model must not have adapters yet; use add_adapter")
        if parallel := next((type(m).__name__ for m in model.modules() if synchronizes(m)), None):
            warnings.warn(
                f"get_peft_model: {parallel} does not synchronize parameters that are added inside it; to train, wrap "
                "the model that get_peft_model returns",
                stacklevel=3,
            )
        save_state_with_regions()
        self.base_model = model.requires_grad_(False)
        self.prompt_encoder = AdapterModules()
        self.injector = Injector(model, adapter_dtype, self.prompt_encoder)
        self.selection = self.injector.selection
        self.replica_states: States | None = None  # of a replica: what held where it was made
        if peft_config is not None:
            self.add_adapter(adapter_name, peft_config)
            self.set_adapter(adapter_name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    # Running

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's forward.   adapter_names: for each row of the batch an adapter, or "__base__" for none."""
        if self.replica_states is not None:
            with using_states(self.replica_states):
                return self._forward(args, kwargs, adapter_names)
        return self._forward(args, kwargs, adapter_names)

    def _forward(self, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: Sequence[str] | None) -> Any:
        with self._call(args, kwargs, adapter_names):
            finishing = []
            for method in self._acting():
                args, kwargs, finish = method.prepare_forward(self, args, kwargs)
                finishing.append(finish)
            output = self.base_model(*args, **kwargs)
            for finish in finishing:
                output = output if finish is None else finish(output)
            return output

    @torch.no_grad()
    def generate(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """The base model's generate; every step computes what forward would."""
        with self._call(args, kwargs, adapter_names):
            finishing = []
            for method in self._acting():
                args, kwargs, finish = method.prepare_generate(self, args, kwargs)
                finishing.append(finish)
            with self.selection.within(rows=expanded_rows(self.selection.state.rows, self.base_model, kwargs)):
                output = self.base_model.generate(*args, **kwargs)  # type: ignore[operator]
            for finish in finishing:
                output = output if finish is None else finish(output)
            return output

    def _call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: Sequence[str] | None
    ) -> AbstractContextManager[None]:
        """In it the base model computes one call.   adapter_names: as forward has it."""
        mask = kwargs.get("attention_mask")
        padding = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if adapter_names is None:
            return self.selection.within(rows=None, padding=padding)
        check_rows(self.injector, adapter_names, batch_size(args, kwargs))
        return self.selection.within(rows=tuple(adapter_names), padding=padding)

    def _acting(self) -> list[Method]:
        """The methods that act in this call."""
        return [
            m for name in self.injector.adapters if self.selection.has(name) for m in methods_of(self.injector, name)
        ]

    def _replicate_for_data_parallel(self) -> Any:
        # A replica runs in a thread of its own, which does not know what holds in this one.
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.replica_states = capture_states()
        return replica

    def train(self, mode: bool = True) -> PeftModel:
        super().train(mode)
        for name in self.injector.adapters:
            for method in methods_of(self.injector, name):
                method.watch_training()
        return self

    def peft_loss(self) -> Tensor:
        """The active adapters' auxiliary losses, to be added to the task's loss; zero in eval mode."""
        device = next(self.parameters()).device
        active = self._active() if self.training else []
        for method in active:
            method.watch_training()
        losses = [method.peft_loss() for method in active]
        return sum((full_tensor(loss) for loss in losses if loss is not None), torch.zeros((), device=device))

    def step(self, global_step: int) -> None:
        """Lets schedules move on (AdaLoRA): call after backward, before zero_grad, once for each optimizer step."""
        for method in self._active():
            method.step(global_step)

    def explain(self) -> Explanation:
        """For each adapted layer whether its adapters run in one fused call, and the reason where not."""
        return explain(self.injector)

    # Adapters

    @property
    def adapters(self) -> Adapters:
        """The adapters by name, with parameters() and named_parameters() of their own."""
        return Adapters(self.injector.adapters)

    @property
    def active_adapters(self) -> list[str]:
        return list(self.selection.active)

    @property
    def active_adapter(self) -> str:
        """The first active one. Raises ValueError where none is."""
        if not self.selection.active:
            raise ValueError(f"active_adapter: an adapter must be active, got none of {list(self.injector.adapters)}")
        return self.selection.active[0]

    @property
    def peft_config(self) -> dict[str, PeftConfig | list[PeftConfig]]:
        """By adapter; a list where it combines several methods."""
        configs = {name: [method.config for method in methods] for name, methods in self.injector.adapters.items()}
        return {name: parts[0] if len(parts) == 1 else parts for name, parts in configs.items()}

    def add_adapter(self, adapter_name: str, peft_config: Configs) -> None:
        """Adds an adapter beside the others; set_adapter makes it active. Its parameters do not train until then.

        Raises ValueError where a name in the configuration means nothing in the model.
        """
        if any(map(shards, self.modules())):
            warnings.warn(
                "add_adapter: fully_shard does not synchronize parameters that are added after it; to train, add "
                "adapters before",
                stacklevel=2,
            )
        for config in _as_list(peft_config):
            method_for(config).check_names(config, self.injector)
        self._add(adapter_name, peft_config)

    def _add(self, adapter_name: str, peft_config: Configs) -> None:
        if adapter_name in self.injector.adapters or adapter_name == BASE or "." in adapter_name or not adapter_name:
            raise ValueError(f"add_adapter: adapter_name must be new, not empty and without dots, got {adapter_name!r}")
        if hasattr(AdapterModules, adapter_name):
            raise ValueError(
                f"add_adapter: adapter_name must be no attribute of nn.ModuleDict, got {adapter_name!r}; use another"
            )
        methods: list[Method] = []
        self.injector.adapters[adapter_name] = methods
        try:
            with self.selection.disabled():
                for config in _as_list(peft_config):
                    methods.append(method_for(config)(config, self.injector, adapter_name))
        except BaseException:
            for method in reversed(self.injector.unfinished):
                method.detach()
            del self.injector.adapters[adapter_name]
            raise
        finally:
            self.injector.unfinished = []
        for method in methods_of(self.injector, adapter_name):
            method.set_trainable(False)
            method.tree.train(self.training)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes these adapters, and no others, active; they alone train (none with inference_mode). Several add up."""
        names = as_names(adapter_name)
        for name in names:
            methods_of(self.injector, name)
        self._check_replaced("set_adapter", names)
        if both := {need for name in names for need in self._needs(name)} & set(names):
            raise ValueError(f"set_adapter: {sorted(both)} must not be active beside the adapter made of them")
        self.selection.active = names
        for name in self.injector.adapters:
            for method in methods_of(self.injector, name):
                method.set_trainable(name in names and not inference_mode)
                method.watch_training()

    def _check_replaced(self, op: str, names: Sequence[str]) -> None:
        replaced = [path for name in names for m in methods_of(self.injector, name) for path in m.overrides.paths]
        if twice := {path for path in replaced if replaced.count(path) > 1}:
            raise ValueError(f"{op}: adapters {list(names)} must not replace the same parameters, got {min(twice)}")

    def delete_adapter(self, adapter_name: str) -> None:
        """Takes the adapter off the model. Where no other is active then, the first of those left becomes active.

        Raises ValueError for an adapter that is merged or that another one is made of.
        """
        methods = methods_of(self.injector, adapter_name)
        if users := [name for name in self.injector.adapters if adapter_name in self._needs(name)]:
            raise ValueError(f"delete_adapter: {adapter_name!r} must not be part of others, got {users}")
        if merging.is_merged(self.injector, adapter_name):
            raise ValueError(f"delete_adapter: {adapter_name!r} must not be merged; call unmerge_adapter first")
        was_active = adapter_name in self.selection.active
        trained = any(p.requires_grad for method in methods for p in method.parameters())
        self._remove(adapter_name)
        if was_active and not self.selection.active and self.injector.adapters:
            first = next(iter(self.injector.adapters))
            warnings.warn(f"delete_adapter: {adapter_name!r} was active; {first!r} is active now", stacklevel=2)
            self.set_adapter(first, inference_mode=not trained)

    def _remove(self, name: str) -> None:
        for method in reversed(methods_of(self.injector, name)):
            method.detach()
        del self.injector.adapters[name]
        self.selection.active = tuple(n for n in self.selection.active if n != name)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        *,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """A new LoRA adapter made of others', the weighted sum of their updates or a sparser one: combine.Combination.

        combination_type: "cat" (exact), "svd", "linear", "magnitude_prune", "ties", "dare_linear", "dare_ties", and the
        last four with "_svd"; those that prune need `density`. Biases and modules_to_save: combine.weighted_lora.
        """
        parts = [self._single_lora(name) for name in adapters]
        combination = Combination(combination_type, svd_rank, density, majority_sign_method)
        combined = weighted_lora(parts, weights, combination)
        self.add_adapter(adapter_name, combined.config)
        new = self._single_lora(adapter_name)
        for path, (lora_A, lora_B) in combined.factors.items():
            new.deltas[path].set_factors(lora_A, lora_B)
        for path, value in combined.replaced.items():
            new.overrides.copies[path].data.copy_(value)

    def _single_lora(self, name: str) -> Lora:
        methods = methods_of(self.injector, name)
        if len(methods) != 1 or type(methods[0]) is not Lora:
            raise TypeError(f"add_weighted_adapter: adapter {name!r} must be a LoRA adapter")
        return methods[0]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model exactly, also while adapters are merged; the merge state does not change.

        It holds for calls inside the `with` in this thread or asyncio task, and for no others.
        """
        with self.selection.disabled():
            yield

    def _needs(self, name: str) -> set[str]:
        return {need for method in methods_of(self.injector, name) for need in method.needs}

    def _active(self) -> list[Method]:
        return [method for name in self.selection.active for method in methods_of(self.injector, name)]

    # Merging

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False, *, target: str = "16bit"
    ) -> None:
        """Merges the adapters' updates into the weights they adapt; unmerge_adapter restores the bits.

        target: storage of the merged layers: "16bit" (dense, added in fp32, cast once), "nf4", or "same" as the base. A
        layer that is quantized again warns with |error| / |update|: NF4's steps are often larger than the update.
        Raises ValueError with safe_merge if a merged weight is not finite, and for adapters that are no weight update.
        """
        names = as_names(adapter_names) if adapter_names is not None else self.selection.active
        merging.check_mergeable(self.injector, names)
        for name in names:
            replaced = [path for method in methods_of(self.injector, name) for path in method.overrides.paths]
            if replaced and name not in self.selection.active:
                raise ValueError(
                    f"merge: adapter {name!r} must be active, since it replaces {min(replaced)}; call set_adapter"
                )
        merging.merge(self.injector, names, target=target, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        merging.unmerge(self.injector)

    def merge_and_unload(
        self, target: str = "16bit", *, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """The base model with the updates in its weights and no trace of the adapters. See merge_adapter."""
        names = as_names(adapter_names) if adapter_names is not None else self.selection.active
        self._check_replaced("merge", names)
        merging.check_mergeable(self.injector, names)
        merging.merge(self.injector, names, target=target, safe_merge=safe_merge)
        merging.keep_merged(self.injector, names)
        base = self.unload()
        forget_quantization(unwrapped(base))
        declare_ties(unwrapped(base))
        return base

    def unload(self) -> nn.Module:
        """The base model as it was before any adapter."""
        self.unmerge_adapter()
        for name in list(self.injector.adapters):
            self._remove(name)
        self.injector.join_attention()
        return self.base_model

    def get_base_model(self) -> nn.Module:
        return self.base_model

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's, of transformers; the adapters' copies of the embeddings and of the head are resized too.

        Rows that are added to a copy are those that the base model gets.
        Raises ValueError where the embeddings or the head have a LoRA.
        """
        return resize_token_embeddings(self.injector, *args, **kwargs)

    def tie_weights(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's, over its own parameters; nothing where it has none (accelerate asks every model)."""
        tie: Any = getattr(self.base_model, "tie_weights", None)
        with self.selection.disabled():
            return None if tie is None else tie(*args, **kwargs)

    # Counting

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trained, all), numbers of weights; a quantized layer counts as its dense shape."""
        return count_parameters(self, self.injector)

    def print_trainable_parameters(self) -> None:
        trained, total = self.get_nb_trainable_parameters()
        share = 100 * trained / total
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {share:.4f}")  # noqa: T201

    # Files

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        selected_adapters: Sequence[str] | None = None,
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Writes each adapter: "default" into the folder, any other into a folder of its name inside it.

        is_main_process: with False nothing is written.
        state_dict, safe_serialization: arguments of transformers' Trainer; only None and True are served.
        An interrupted save leaves the whole old state or the whole new one (docs/reliability.md). Under fully_shard
        every process has to call it, whatever is_main_process says; the adapters alone are gathered, and rank 0 writes.
        """
        check_save_options(state_dict, safe_serialization)
        names = as_names(selected_adapters) if selected_adapters is not None else tuple(self.injector.adapters)
        for name in names:
            methods_of(self.injector, name)  # refuses an unknown name before anything is written
        adapters = {"." if name == "default" else name: self.injector.adapters[name] for name in names}
        parameters = (p for methods in adapters.values() for method in methods for p in method.parameters())
        if is_main_process or any(is_sharded(p) for p in parameters):
            checkpoint.save_adapters(adapters, save_directory)

    def load_adapter(
        self, model_id: str | os.PathLike[str], adapter_name: str = "default", is_trainable: bool = False
    ) -> None:
        """Adds the adapter that lies in a folder, written here or by PEFT; set_adapter makes it active.

        An adapter of that name that the model has already takes the values of the folder, which must hold an adapter of
        the same configuration; it trains as before.
        is_trainable: also what only training needs, such as the encoders of prefix and P-tuning. Without it the model
        is put in eval mode, as PEFT does.
        """
        configs, files = zip(*checkpoint.load_adapter(model_id), strict=True)
        if adapter_name in self.injector.adapters:
            methods = self.injector.adapters[adapter_name]
            checkpoint.require_same_configs(adapter_name, methods, files)
            trains = any(p.requires_grad for method in methods for p in method.parameters())
            checkpoint.load_weights(methods, files, is_trainable=is_trainable or trains)
            if not is_trainable:
                self.eval()
            return
        self._add(
            adapter_name, [checkpoint.buildable(c, f, self.injector) for c, f in zip(configs, files, strict=True)]
        )
        try:
            checkpoint.load_weights(self.injector.adapters[adapter_name], files, is_trainable=is_trainable)
        except BaseException:
            self._remove(adapter_name)
            raise
        if not is_trainable:
            self.eval()

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        *,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> PeftModel:
        """`model` with the adapter that lies in a folder, active; it trains only with is_trainable.

        Without is_trainable the model is in eval mode: no dropout of the base or of the adapter acts.
        """
        peft_model = cls(model, adapter_dtype=adapter_dtype)
        peft_model.load_adapter(model_id, adapter_name, is_trainable)
        peft_model.set_adapter(adapter_name, inference_mode=not is_trainable)
        return peft_model
