"""PeftModel: a base model and its adapters. get_peft_model makes one."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ...nn.match import as_names
from ...nn.module_tree import shards, unwrapped
from ..framework.method import methods_of
from ..framework.registry import method_for
from ..framework.ties import declare_ties
from ..layers.foreign_layer import forget_quantization
from ..methods.ia3 import IA3, weighted_ia3
from . import adapter_files, adapters, merging
from .adapted_model import AdaptedModel
from .adapters import Configs, as_configs
from .combine import Combination, set_combined, single_lora, weighted_lora
from .counting import count_parameters
from .huggingface import check_save_options
from .resize import resize_token_embeddings


def get_peft_model(
    model: nn.Module,
    peft_config: Configs,
    adapter_name: str = "default",
    *,
    adapter_dtype: torch.dtype = torch.float32,
) -> PeftModel:
    """Return `model`, frozen, with one new adapter: one method, or several given as a list of configurations.

    The model is changed in place (its layers are wrapped or hooked); unload() undoes it.
    adapter_dtype: dtype of the trained parameters; float32 by default, also over a bf16 or NF4 base.
    Raises TypeError or ValueError for what is no configuration, and ValueError if a name in one matches nothing in the
    model.
    """
    return PeftModel(model, as_configs(peft_config), adapter_name, adapter_dtype=adapter_dtype)


class PeftModel(AdaptedModel):
    """A model with adapters, and the methods that add, merge, count, save and load them; AdaptedModel runs them.

    The adapters' parameters are inside `base_model`, in the modules whose output they change, and those of prompts in
    `prompt_encoder`; docs/methods.md lists their names.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: Configs | None = None,
        adapter_name: str = "default",
        *,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(model, adapter_dtype)
        if peft_config is not None:
            self.add_adapter(adapter_name, peft_config)
            self.set_adapter(adapter_name)

    def add_adapter(self, adapter_name: str, peft_config: Configs) -> None:
        """Add an adapter. Its parameters are neither used nor trained until set_adapter makes it active.

        Raises ValueError if a name in the configuration matches nothing in the model.
        """
        if any(map(shards, self.modules())):
            warnings.warn(
                "add_adapter: fully_shard does not synchronize parameters that are added after it; to train, add "
                "adapters before",
                stacklevel=2,
            )
        configs = as_configs(peft_config)
        for config in configs:
            method_for(config).check_names(config, self.injector)
        adapters.add(self.injector, adapter_name, configs, training=self.training)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make exactly these adapters active and trained (none is trained with inference_mode). Several adapters are
        added up.

        Other adapters that are merged would compute in place of these, and are unmerged with a warning, as in PEFT.
        """
        names = as_names(adapter_name)
        adapters.activate(self.injector, names, trainable=not inference_mode)
        merged = [name for name in self.adapters if merging.is_merged(self.injector, name)]
        if merged and set(merged) != set(names):
            warnings.warn(f"set_adapter: {merged} were merged, and are unmerged now", stacklevel=2)
            self.unmerge_adapter()

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove the adapter. If no adapter is active afterwards, the first of the remaining ones becomes active.

        Raises ValueError for an adapter that is merged or that another adapter uses.
        """
        trained = adapters.is_trained(self.injector, adapter_name)
        if users := [name for name in self.adapters if adapter_name in adapters.names_of_parts(self.injector, name)]:
            raise ValueError(f"delete_adapter: {adapter_name!r} must not be part of others, got {users}")
        if merging.is_merged(self.injector, adapter_name):
            raise ValueError(f"delete_adapter: {adapter_name!r} must not be merged; call unmerge_adapter first")
        was_active = adapter_name in self.selection.active
        adapters.remove(self.injector, adapter_name)
        if was_active and not self.selection.active and self.adapters:
            first = next(iter(self.adapters))
            warnings.warn(f"delete_adapter: {adapter_name!r} was active; {first!r} is active now", stacklevel=2)
            self.set_adapter(first, inference_mode=not trained)

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
        """Add a LoRA adapter that is the weighted sum of other adapters' updates, or a sparser combination of them.

        The vectors of IA3 adapters are summed for every combination_type, see methods.ia3.weighted_ia3.

        combination_type: "cat" (exact), "svd", "linear", "magnitude_prune", "ties", "dare_linear", "dare_ties", or one
        of the last four with the suffix "_svd"; types that prune need `density`. combine.Combination describes the
        types and the other arguments, combine.weighted_lora the biases and modules_to_save.
        """
        methods = [method for name in adapters for method in methods_of(self.injector, name)]
        if methods and len(methods) == len(adapters) and all(isinstance(method, IA3) for method in methods):
            config, vectors = weighted_ia3(cast("list[IA3]", methods), weights)
            self.add_adapter(adapter_name, config)
            (new,) = methods_of(self.injector, adapter_name)
            for path, vector in vectors.items():
                cast(IA3, new).deltas[path].ia3_l.data.copy_(vector)
            return
        parts = [single_lora(self.injector, name) for name in adapters]
        combination = Combination(combination_type, svd_rank, density, majority_sign_method)
        combined = weighted_lora(parts, weights, combination)
        self.add_adapter(adapter_name, combined.config)
        set_combined(self.injector, adapter_name, combined)

    # Merging

    def merge_adapter(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False, *, target: str = "16bit"
    ) -> None:
        """Merge the adapters' updates into the weights they adapt; unmerge_adapter restores the bits.

        target: storage of the merged layers: "16bit" (dense, added in fp32, cast once), "nf4", or "same" as the base.
        Quantizing a layer again gives a warning with |error| / |update|, because NF4's steps are often larger than the
        update.
        Raises ValueError with safe_merge if a merged weight is not finite, and for adapters that are not weight
        updates.
        """
        names = as_names(adapter_names) if adapter_names is not None else self.selection.active
        merging.check_mergeable(self.injector, names)
        merging.check_active(self.injector, names)
        merging.merge(self.injector, names, target=target, safe_merge=safe_merge)

    def unmerge_adapter(self) -> None:
        """Restore the weights as they were before merge_adapter."""
        merging.unmerge(self.injector)

    def merge_and_unload(
        self, target: str = "16bit", *, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Return the base model with the updates in its weights and without adapters. See merge_adapter."""
        names = as_names(adapter_names) if adapter_names is not None else self.selection.active
        adapters.check_replaced(self.injector, "merge", names)
        merging.check_mergeable(self.injector, names)
        merging.merge(self.injector, names, target=target, safe_merge=safe_merge)
        merging.keep_merged(self.injector, names)
        base = self.unload()
        forget_quantization(unwrapped(base))
        declare_ties(unwrapped(base))
        return base

    def unload(self) -> nn.Module:
        """Return the base model as it was before any adapter."""
        self.unmerge_adapter()
        for name in list(self.adapters):
            adapters.remove(self.injector, name)
        self.injector.join_attention()
        return self.base_model

    # The base model, and counting

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Resize the base model's embeddings as in transformers, and the adapters' copies of embeddings and head.

        Rows that are added to a copy equal the new rows of the base model.
        Raises ValueError if the embeddings or the head have a LoRA.
        """
        return resize_token_embeddings(self.injector, *args, **kwargs)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return the numbers (trained, all) of weights; a quantized layer counts as its dense shape."""
        return count_parameters(self, self.injector)

    def print_trainable_parameters(self) -> None:
        """Print the numbers of trained weights and of all weights."""
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
        """Write each adapter: "default" into the folder, any other into a folder of its name inside it.

        is_main_process: with False nothing is written.
        state_dict: whole values of the parameters, by their names in this model, as transformers' Trainer gathers them
        for one process of a sharded model, which then writes alone; None takes the model's own.
        safe_serialization: an argument of Trainer; only True is supported.
        An interrupted save leaves the complete old or the complete new state (docs/reliability.md). Under fully_shard
        and ZeRO-3 every process must call it without state_dict, for any is_main_process; only the adapters are
        gathered, and rank 0 writes.
        """
        check_save_options(safe_serialization)
        names = as_names(selected_adapters) if selected_adapters is not None else tuple(self.adapters)
        adapter_files.save(
            self, self.injector, save_directory, names, is_main_process=is_main_process, state_dict=state_dict
        )

    def load_adapter(
        self, model_id: str | os.PathLike[str], adapter_name: str = "default", is_trainable: bool = False
    ) -> None:
        """Add the adapter in a folder, written here or by PEFT; set_adapter makes it active.

        If the model already has an adapter of that name, the values of the folder are loaded into it, and it is trained
        as before. The folder must have the same configuration.
        is_trainable: also load state that only training needs, such as the encoders of prefix and P-tuning. Otherwise
        the model is switched to eval mode, as in PEFT.
        Raises ValueError for an adapter that is merged.
        """
        if adapter_name in self.adapters and merging.is_merged(self.injector, adapter_name):
            raise ValueError(f"load_adapter: {adapter_name!r} must not be merged; call unmerge_adapter first")
        adapter_files.load(self.injector, model_id, adapter_name, is_trainable=is_trainable, training=self.training)
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
        """Return `model` with the adapter in a folder, which is active; it is trained only with is_trainable.

        Without is_trainable the model is in eval mode, so that no dropout is applied.
        """
        peft_model = cls(model, adapter_dtype=adapter_dtype)
        peft_model.load_adapter(model_id, adapter_name, is_trainable)
        peft_model.set_adapter(adapter_name, inference_mode=not is_trainable)
        return peft_model
