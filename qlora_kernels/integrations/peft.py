"""Hugging Face PEFT's LoRA over LinearNF4: after `register()`, `peft.get_peft_model` works as over nn.Linear.

PEFT looks up the model class of an adapter type in its table `PEFT_TYPE_TO_TUNER_MAPPING`, which its own
`register_peft_method` extends. `register()` puts a subclass of PEFT's LoraModel there; all other layers are treated as
before.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.layer import Linear
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_adapters_to_merge
from torch import Tensor, nn

from ..nn.describe import describe_quantization
from ..nn.experts_nf4 import ExpertsNF4
from ..nn.functional_use import read_but_never_called
from ..nn.linear_nf4 import LinearNF4
from ..nn.module_tree import has_hooks
from ..peft.layers.base_layer import dense_weight, with_weight
from ..peft.layers.lowrank import LoraFactors, forward_lowrank

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Values of init_lora_weights that replace the base weight by a residual."""


class LoraLinearNF4(Linear):
    """PEFT's LoRA layer over a LinearNF4: base and adapters run in one op, forward and backward.

    Parameters, their names and files are those of peft.tuners.lora.Linear. DoRA and the other variants run in PEFT's
    code over the base layer's output. Merging replaces the base layer by a dense layer, whose weight includes the
    update, added in float32 and cast once; unmerging restores the NF4 layer bit for bit.
    """

    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        self.unmerged_layer: LinearNF4 | None = None

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return cast(Any, module).in_features, cast(Any, module).out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Add an adapter. Raises NotImplementedError for initializations that change the base weight."""
        init = config.init_lora_weights
        if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
            raise NotImplementedError(
                f"LoraConfig: init_lora_weights must not change the base weight of a LinearNF4, got {init!r}; "
                "use qlora_kernels.peft.LoraConfig, or True, 'gaussian', 'orthogonal' or 'eva'"
            )
        self.fan_in_fan_out = False  # also for GPT-2: the NF4 weight is [out_features, in_features]
        super().update_layer(adapter_name, r, lora_alpha, config=config, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute y [..., out_features] from x [..., in_features]."""
        if not (args or kwargs or self.disable_adapters or self.merged):
            updates, dropouts = self._plain_updates(self.active_adapters)
            if updates and len(dropouts) == 1:
                return forward_lowrank(self.base_layer, x, updates, dropout_p=dropouts.pop())
        return cast(Tensor, super().forward(x, *args, **kwargs))

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        names = sorted({name for name in adapter_names if name in self.lora_A})
        updates, dropouts = self._plain_updates(names)
        if not updates or len(dropouts) != 1:
            return cast(Tensor, super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs))
        number = {name: i for i, name in enumerate(names)}
        owner = torch.tensor([number.get(name, -1) for name in adapter_names], device=x.device)
        return forward_lowrank(self.base_layer, x, updates, dropout_p=dropouts.pop(), owner=owner)

    def _plain_updates(self, names: list[str]) -> tuple[list[LoraFactors], set[float]]:
        """Return (updates of these adapters, their dropout rates) if all are scaling * B A; otherwise nothing.

        Layers with hooks, and layers that were replaced, must be called and their weights not read.
        """
        updates: list[LoraFactors] = []
        dropouts: set[float] = set()
        for name in names:
            if name not in self.lora_A:
                continue
            layers = [self.lora_A[name], self.lora_B[name]]
            if name in self.lora_variant or self.lora_bias[name] or not all(map(_is_plain, layers)):
                return [], set()
            updates.append((layers[0].weight, layers[1].weight, self.scaling[name]))
            dropout = self.lora_dropout[name]
            dropouts.add(dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0)
        return updates, dropouts

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the base layer by a dense layer that includes the adapters' updates.

        safe_merge: raise ValueError if a merged weight is not finite. adapter_names: None means the active ones.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_A:
                continue
            bias = self._merged_bias(name)
            weight = dense_weight(self.base_layer)
            if name in self.lora_variant:
                weight = self.lora_variant[name].merge_safe(self, name, weight).float()
            else:
                lora_A, lora_B = self.lora_A[name].weight.float(), self.lora_B[name].weight.float()
                weight = weight + self.scaling[name] * (lora_B @ lora_A).to(weight.device)
            if safe_merge and not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
                raise ValueError(f"merge: adapter {name!r} must give finite merged weights, got inf or NaN")
            dense = with_weight(self.base_layer, weight.detach(), bias, "16bit")
            if self.unmerged_layer is None:
                self.unmerged_layer = cast(LinearNF4, self.base_layer)
            self.base_layer = dense
            self.merged_adapters.append(name)

    def _merged_bias(self, name: str) -> Tensor | None:
        bias: Tensor | None = cast(Any, self.base_layer).bias
        if not self.lora_bias[name]:
            return bias
        if bias is None:
            raise RuntimeError(f"merge: adapter {name!r} has a bias (lora_bias), so the base layer must have one")
        return cast(Tensor, bias + self.lora_B[name].bias.detach().to(bias) * self.scaling[name])

    def unmerge(self) -> None:
        """Restore the NF4 layer as the base layer."""
        if self.unmerged_layer is not None:
            self.base_layer, self.unmerged_layer = self.unmerged_layer, None
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the layer that replaces this one when PEFT removes its adapters."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return cast(nn.Module, self.get_base_layer())


def _is_plain(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and not has_hooks(layer)


class _OverLinearNF4:
    """The parts of a LoraModel that handle LinearNF4; a mixin in front of PEFT's class."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config = cast(Any, self).peft_config[adapter_name]
        _check_saved_modules(model, config.modules_to_save or ())
        if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
            _maybe_include_all_linear_layers(config, model)
            config.target_modules = {*config.target_modules, *_quantized_targets(model)}
        cast(Any, super()).inject_adapter(model, adapter_name, *args, **kwargs)

    @staticmethod
    def _create_new_module(lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if isinstance(base, LinearNF4):
            return LoraLinearNF4(target, adapter_name, config=lora_config, **kwargs)
        return cast(nn.Module, LoraModel._create_new_module(lora_config, adapter_name, target, **kwargs))

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, LoraLinearNF4):  # already on its device; PEFT would dequantize the weight to move it
            setattr(parent, child_name, new_module)
        else:
            cast(Any, super())._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = cast(Any, super())._unload_and_optionally_merge(*args, **kwargs)
        describe_quantization(model)
        return model


def _check_saved_modules(model: nn.Module, names: Iterable[str]) -> None:
    """Raise ValueError for a module of modules_to_save with NF4 layers: PEFT's copy of it has no weight that trains."""
    for name, module in model.named_modules():
        saved = any(name.endswith(ending) for ending in names)
        if saved and any(isinstance(part, (LinearNF4, ExpertsNF4)) for part in module.modules()):
            raise ValueError(
                f"modules_to_save: {name} must not be quantized; name it in replace_linear's skip or in "
                "QLoRAKernelsConfig's skip_modules"
            )


def _quantized_targets(model: nn.Module) -> set[str]:
    """Return the LinearNF4 layers by name, without the output head, layers that already have adapters, and layers that
    are never called: torch's attention computes with the weight of its out_proj.
    """
    head = cast(Any, model).get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    adapted = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    names = {name for name, module in model.named_modules() if isinstance(module, LinearNF4) and module is not head}
    names -= read_but_never_called(model).keys()
    return {name for name in names if not any(name.startswith(f"{layer}.") for layer in adapted)}


class LoraModelNF4(_OverLinearNF4, LoraModel):
    """PEFT's LoraModel, with LoraLinearNF4 for LinearNF4 layers."""


def register() -> None:
    """Make PEFT adapt LinearNF4 layers, also for `target_modules="all-linear"`. Further calls change nothing.

    Raises RuntimeError if another library has replaced PEFT's model class for LoRA.
    """
    registered = PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA]
    if registered is LoraModel:
        PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = LoraModelNF4
    elif not issubclass(registered, _OverLinearNF4):
        raise RuntimeError(
            f"register: PEFT's model class for LoRA must be its own LoraModel, got {registered.__name__}; "
            "call register() before the library that replaces it"
        )
