"""AdaptedModel: a base model that computes with its active adapters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ...nn.module_tree import synchronizes
from ..core.adapter_selection import States, capture_states, using_states
from ..core.adapter_tree import AdapterModules
from ..core.config import PeftConfig
from ..core.sharded import full_tensor
from ..framework.injector import Injector
from ..framework.method import Adapters, Method, methods_of
from .adapter_names import batch_size, check_rows, expanded_rows
from .adapters import configs_of
from .explain import Explanation, explain
from .huggingface import RecognizedAsPeftModel
from .recomputation import save_state_with_regions

M = TypeVar("M", bound="AdaptedModel")


class AdaptedModel(RecognizedAsPeftModel, nn.Module):
    """Forward, generation and training of a model with adapters. Other attributes are those of the base model.

    base_model: the model, whose layers are wrapped or hooked in place.   prompt_encoder: the modules of soft prompts.
    injector: the model by canonical names, and the methods of its adapters.   selection: which adapters are active.
    """

    def __init__(self, model: nn.Module, adapter_dtype: torch.dtype) -> None:
        """Freeze `model` and prepare it for adapters, in place.

        adapter_dtype: dtype of the parameters of adapters.
        Raises TypeError for a model that has adapters already, and for what is no nn.Module.
        """
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"get_peft_model: model must be an nn.Module, got {type(model).__name__}; load it first")
        if isinstance(model, AdaptedModel):
            raise TypeError("get_peft_model: model must not have adapters yet; use add_adapter")
        if parallel := next((type(m).__name__ for m in model.modules() if synchronizes(m)), None):
            warnings.warn(
                f"get_peft_model: {parallel} does not synchronize parameters that are added inside it; to train, wrap "
                "the model that get_peft_model returns",
                stacklevel=4,
            )
        save_state_with_regions()
        self.base_model = model.requires_grad_(False)
        self.prompt_encoder = AdapterModules()
        self.injector = Injector(model, adapter_dtype, self.prompt_encoder)
        self.selection = self.injector.selection
        self.replica_states: States | None = None  # in a replica, the call states of the thread that made it

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)

    def forward(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        """Run the base model's forward with the active adapters.

        adapter_names: one name for each row of the batch, or "__base__" for no adapter; None = the active adapters.
        """
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
        """Run the base model's generate; each step computes what forward would.   adapter_names: as for forward."""
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
        """Return a context in which the base model computes one call."""
        mask = kwargs.get("attention_mask")
        padding = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        if adapter_names is None:
            return self.selection.within(rows=None, padding=padding)
        check_rows(self.injector, adapter_names, batch_size(args, kwargs))
        return self.selection.within(rows=tuple(adapter_names), padding=padding)

    def _acting(self) -> list[Method]:
        """Return the methods that are active in the running call, in the order in which the adapters were added."""
        acting = (name for name in self.injector.adapters if self.selection.has(name))
        return [method for name in acting for method in methods_of(self.injector, name)]

    def _active(self) -> list[Method]:
        """Return the methods of the active adapters, in the order of set_adapter."""
        return [method for name in self.selection.active for method in methods_of(self.injector, name)]

    def _replicate_for_data_parallel(self) -> Any:
        # A replica runs in another thread, which does not have the call states of this thread.
        replica: Any = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.replica_states = capture_states()
        return replica

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Compute as the base model inside the `with`, also while adapters are merged.

        This applies to calls inside the `with` in this thread or asyncio task. The merge state does not change.
        """
        with self.selection.disabled():
            yield

    def tie_weights(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model's tie_weights on its own parameters; accelerate calls it on every model."""
        tie: Any = getattr(self.base_model, "tie_weights", None)
        with self.selection.disabled():
            return None if tie is None else tie(*args, **kwargs)

    # Contents of the model

    def get_base_model(self) -> nn.Module:
        """Return the base model, with the adapters in it."""
        return self.base_model

    @property
    def adapters(self) -> Adapters:
        """The adapters by name, with parameters() and named_parameters() of their own."""
        return Adapters(self.injector.adapters)

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters, in order."""
        return list(self.selection.active)

    @property
    def active_adapter(self) -> str:
        """The first active adapter. Raises ValueError if none is active."""
        if not self.selection.active:
            raise ValueError(f"active_adapter: an adapter must be active, got none of {list(self.injector.adapters)}")
        return self.selection.active[0]

    @property
    def peft_config(self) -> dict[str, PeftConfig | list[PeftConfig]]:
        """Each adapter's configuration; a list where the adapter combines several methods."""
        return configs_of(self.injector)

    def explain(self) -> Explanation:
        """Return for each adapted layer whether its adapters run in one fused call, and the reason if not."""
        return explain(self.injector)

    # In training

    def train(self: M, mode: bool = True) -> M:
        """Set training or evaluation mode, as nn.Module does."""
        super().train(mode)
        for name in self.injector.adapters:
            for method in methods_of(self.injector, name):
                method.watch_training()
        return self

    def peft_loss(self) -> Tensor:
        """Return the sum of the active adapters' auxiliary losses, to be added to the task loss; zero in eval mode."""
        device = next(self.parameters()).device
        active = self._active() if self.training else []
        for method in active:
            method.watch_training()
        losses = [method.peft_loss() for method in active]
        return sum((full_tensor(loss) for loss in losses if loss is not None), torch.zeros((), device=device))

    def step(self, global_step: int) -> None:
        """Advance schedules such as AdaLoRA's. Call it after backward and before zero_grad, once per optimizer step."""
        for method in self._active():
            method.step(global_step)
