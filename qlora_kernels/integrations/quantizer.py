"""The quantizer that transformers' from_pretrained, save_pretrained and dequantize call for QLoRAKernelsConfig.

`layer_selection` chooses the parameters, the ops of `conversion_ops` load them, and `model_description` attaches a
quantizer to models that are quantized in place.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from transformers import __version__ as transformers_version
from transformers import core_model_loading
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer

from ..format import bnb_layout
from ..io.safetensors_reader import aligned
from ..nn.experts_nf4 import ExpertsNF4
from .bnb_compatibility import loads_in_bitsandbytes
from .conversion_ops import LoadedLinearNF4, NF4Loading, QuantizeNF4, ReadNF4
from .layer_selection import chosen_parameters
from .quantization_config import METHOD, QLoRAKernelsConfig
from .quantized_modules import (
    WEIGHT,
    dense_linears,
    dequantize_modules,
    expert_stacks,
    is_linear_weight,
    quantized_modules,
    replace_parameter,
    state_dict_of_checkpoint,
    use_plain_experts,
)

LOADING = (5, 22)
"""The first transformers whose from_pretrained has the hooks that `QLoRAKernelsQuantizer` loads with. Models that are
quantized in place are saved and read by this package with every transformers that it admits.
"""


class QLoRAKernelsQuantizer(HfQuantizer):
    """transformers' HfQuantizer for NF4: selects the layers, and defines how they are loaded and saved."""

    quantization_config: QLoRAKernelsConfig
    serialized_names: ClassVar = {WEIGHT: [WEIGHT, *(f"{WEIGHT}.{suffix}" for suffix in bnb_layout.SUFFIXES)]}

    def __init__(self, quantization_config: QLoRAKernelsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.loading = NF4Loading(quantization_config)

    def is_serializable(self) -> bool:
        """Whether save_pretrained can write the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters over the model can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether generate may compile the model."""
        return True

    @property
    def quantized_element_size(self) -> float:
        """Bytes of one weight, for the planning of a device_map."""
        return 4.5 / 8

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise ImportError if transformers is older than 5.22, and ValueError for a device_map that offloads layers.

        NF4 layers cannot be moved during forward.
        """
        if tuple(int(part) for part in transformers_version.split(".")[:2]) < LOADING:
            raise ImportError(
                f"QLoRAKernelsConfig: transformers must be at least {LOADING[0]}.{LOADING[1]} for from_pretrained, got "
                f"{transformers_version}; upgrade transformers, or load the dense model and call "
                "qlora_kernels.replace_linear(model), or read an NF4 folder with "
                "qlora_kernels.integrations.transformers.load_model(folder)"
            )
        places = {str(place) for place in device_map.values()} if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in places and places != {"cpu"}):
            raise ValueError(
                f"from_pretrained: device_map must not offload layers to the CPU or the disk, got {sorted(places)}; "
                "use fewer devices or a device with more memory, or load the whole model with device_map='cpu'"
            )

    def _process_model_before_weight_loading(self, model: Any, dtype: Any = None, **kwargs: Any) -> None:
        # The checkpoint of a quantized model decides about layers that skip_modules does not name (ReadNF4).
        self.loading.chosen = chosen_parameters(model, self.quantization_config, heads=not self.pre_quantized)
        if not self.loading.chosen:
            raise ValueError(
                f"from_pretrained: {type(model).__name__} must contain linear layers outside "
                f"skip_modules={self.quantization_config.skip_modules}, got none"
            )
        stacks = [name for name in self.loading.chosen if not is_linear_weight(model, name)]
        if stacks:
            use_plain_experts(model)
        if self.pre_quantized:
            self.loading.dtypes = _dtype_of_parameters(model, dtype)
            for name in stacks:
                replace_parameter(model, name, self._experts_to_fill(model.get_parameter(name)))

    def _experts_to_fill(self, stack: Tensor) -> ExpertsNF4:
        """Return ExpertsNF4 on the meta device, whose buffers transformers assigns from a checkpoint."""
        config = self.quantization_config
        shape = cast("tuple[int, int, int]", tuple(stack.shape))
        return ExpertsNF4.empty(*shape, config.blocksize, config.double_quant, dtype=stack.dtype, device="meta")

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether `param_name` is the weight of a chosen layer."""
        return param_name in self.loading.chosen

    def get_quantize_ops(self) -> ConversionOps:
        """Return the op for a dense tensor."""
        return QuantizeNF4(self.loading)

    def get_load_operations(self) -> dict[str, Any]:
        """Return the op for the tensors of an NF4 weight."""
        return {"deserialize": lambda quantizer: ReadNF4(quantizer.loading, quantizer)}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Return the model's conversions, without those of weights that are stored in NF4 in the checkpoint."""
        if self.pre_quantized:
            weight_conversions = [c for c in weight_conversions if not self._converts_quantized(c)]
        return [*weight_conversions, *self.get_weight_conversions()]

    def _converts_quantized(self, conversion: Any) -> bool:
        if not isinstance(conversion, WeightConverter):
            return False
        if not hasattr(conversion, "copy"):  # before LOADING, patterns have no scopes
            targets = [re.compile(pattern) for pattern in conversion.target_patterns]
            return any(target.search(name) for target in targets for name in self.loading.chosen)
        reverse = conversion.copy(
            list(conversion._original_target_patterns),
            list(conversion._original_source_patterns),
            operations=conversion.operations,
        )
        return any(reverse._scoped_match(name) is not None for name in self.loading.chosen)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.loading.quantize_rest(model)
        for module in model.modules():
            if isinstance(module, LoadedLinearNF4):
                module.finish()
            elif isinstance(module, ExpertsNF4):
                for key, buffer in module.named_buffers(recurse=False):
                    setattr(module, key, aligned(buffer))
        if self.quantization_config._storage == "qlora_kernels":
            model._weight_conversions = self._conversions_for_saving(model)
        return model

    def _conversions_for_saving(self, model: Any) -> list[Any]:
        """Return the conversions that saving reverses: the renamings, and the conversions of dense weights."""
        conversions = getattr(model, "_weight_conversions", None)
        if conversions is None:
            from transformers.conversion_mapping import get_model_conversion_mapping

            mapping = get_model_conversion_mapping(model, add_legacy=False)
            prefix_change = getattr(core_model_loading, "PrefixChange", ())  # transformers 5.6 and later
            conversions = [c for c in mapping if not isinstance(c, prefix_change)]
        reading = [c for c in conversions if any(isinstance(op, ReadNF4) for op in getattr(c, "operations", ()))]
        return [c for c in conversions if c not in reading and not self._converts_quantized(c)]

    def describe_layers(self, model: Any) -> None:
        """Update the model's quantization config to its present layers; without NF4 layers, remove it.

        A model that was quantized in place gets the config of bitsandbytes if bitsandbytes can read all of its NF4
        layers. A model with experts in NF4 gets QLoRAKernelsConfig, and so does one with a layer that would be wrong in
        bitsandbytes, if all layers have one blocksize and kind of constants. A model that was loaded with
        QLoRAKernelsConfig keeps it.
        Raises ValueError if experts differ in blocksize or kind of constants, which one config cannot describe.
        """
        quantized: dict[str, Any] = quantized_modules(model)
        if not quantized:
            self.remove_quantization_config(model)
            return
        config = self.quantization_config
        experts = {name for name, module in quantized.items() if isinstance(module, ExpertsNF4)}
        described = experts or quantized.keys()
        kinds = {(quantized[name].blocksize, quantized[name].double_quant) for name in described}
        dense = [*dense_linears(model), *expert_stacks(model)]
        if experts or (len(kinds) == 1 and not loads_in_bitsandbytes(model, quantized, dense)):
            config._storage = "qlora_kernels"
        if experts and len(kinds) > 1:
            raise ValueError(
                f"save: all experts must have one (blocksize, double_quant), got {sorted(kinds)}; quantize all experts "
                "with the same two values"
            )
        config.blocksize, config.double_quant = max(kinds)
        config.skip_modules = dense
        config._model_dtype = model.dtype
        self.loading.chosen = {name if name in experts else f"{name}.{WEIGHT}" for name in quantized}
        model.config.quantization_config = config
        model._weight_conversions = self._conversions_for_saving(model)

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Update the model's config to its present layers before a save, and return the tensors of its files.

        None stands for the model's state dict. Raises RuntimeError for a sharded model.
        """
        self.describe_layers(model)
        return state_dict_of_checkpoint(model), {}

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        return dequantize_modules(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)

    def remove_quantization_config(self, model: Any) -> None:
        """Remove all attributes that mark the model as quantized."""
        super().remove_quantization_config(model)
        for module in model.modules():
            config: Any = getattr(module, "config", None)
            if hasattr(config, "_is_quantized"):
                del config._is_quantized


def _dtype_of_parameters(model: Any, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return the dtype in which transformers keeps each parameter."""
    plan = model._get_dtype_plan(dtype) or {}
    patterns = [(re.compile(pattern.replace("*", ".*")), wanted) for pattern, wanted in plan.items()]
    return {
        name: next((wanted for pattern, wanted in patterns if pattern.search(name)), parameter.dtype)
        for name, parameter in model.named_parameters()
    }


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(METHOD)(QLoRAKernelsQuantizer)
