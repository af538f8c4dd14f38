"""The quantizer that transformers' from_pretrained, save_pretrained and dequantize call for QLoRAKernelsConfig.

transformers 5 reads a checkpoint tensor by tensor. It passes a dense tensor of a chosen layer to `QuantizeNF4`, and the
tensors of an NF4 weight with its constants to `ReadNF4`; both put the finished layer into the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import __version__ as transformers_version
from transformers import core_model_loading
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantizer
from transformers.quantizers.base import HfQuantizer, get_keys_to_not_convert

from ..format import bnb_layout
from ..format.quant_state import QuantState
from ..io.safetensors_reader import aligned
from ..nn.experts_nf4 import ExpertsNF4
from ..nn.functional_use import read_but_never_called
from ..nn.linear_nf4 import LinearNF4, is_conv1d
from ..nn.match import check_names, contained_in
from ..nn.module_tree import set_submodule
from ..ops.quantize_nf4 import quantize_nf4
from ..peft.core.config import TASK_HEADS
from .quantization_config import METHOD, QLoRAKernelsConfig
from .quantized_modules import (
    dense_linears,
    dequantize_modules,
    expert_stacks,
    quantized_modules,
    state_dict_of_checkpoint,
)

WEIGHT = "weight"
LOADING = (5, 22)
"""The first transformers whose from_pretrained has the hooks that `QLoRAKernelsQuantizer` loads with. Models that are
quantized in place are saved and read by this package with every transformers that it admits.
"""
_FALCON = "transformers.models.falcon.modeling_falcon"
_TASK_HEADS = {head for heads in TASK_HEADS.values() for head in heads}


class QLoRAKernelsQuantizer(HfQuantizer):
    """transformers' HfQuantizer for NF4: selects the layers, and defines how they are loaded and saved."""

    quantization_config: QLoRAKernelsConfig
    serialized_names: ClassVar = {WEIGHT: [WEIGHT, *(f"{WEIGHT}.{suffix}" for suffix in bnb_layout.SUFFIXES)]}

    def __init__(self, quantization_config: QLoRAKernelsConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.chosen: set[str] = set()  # parameters that are in NF4 or will be
        self.missing: set[str] | None = None  # transformers' set of parameters that the checkpoint lacks
        self.dtypes: dict[str, torch.dtype] = {}  # of dense parameters that are loaded by ReadNF4

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
        self.chosen = chosen_parameters(model, self.quantization_config, heads=not self.pre_quantized)
        if not self.chosen:
            raise ValueError(
                f"from_pretrained: {type(model).__name__} must contain linear layers outside "
                f"skip_modules={self.quantization_config.skip_modules}, got none"
            )
        stacks = [name for name in self.chosen if not _is_linear_weight(model, name)]
        if stacks:
            use_plain_experts(model)
        if self.pre_quantized:
            self.dtypes = _dtype_of_parameters(model, dtype)
            for name in stacks:
                put_experts(model, name, self._experts_to_fill(model.get_parameter(name)))

    def _experts_to_fill(self, stack: Tensor) -> ExpertsNF4:
        """Return ExpertsNF4 on the meta device, whose buffers transformers assigns from a checkpoint."""
        config = self.quantization_config
        shape = cast("tuple[int, int, int]", tuple(stack.shape))
        return ExpertsNF4.empty(*shape, config.blocksize, config.double_quant, dtype=stack.dtype, device="meta")

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether `param_name` is the weight of a chosen layer."""
        return param_name in self.chosen

    def get_quantize_ops(self) -> ConversionOps:
        """Return the op for a dense tensor."""
        return QuantizeNF4(self)

    def get_load_operations(self) -> dict[str, Any]:
        """Return the op for the tensors of an NF4 weight."""
        return {"deserialize": ReadNF4}

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
            return any(target.search(name) for target in targets for name in self.chosen)
        reverse = conversion.copy(
            list(conversion._original_target_patterns),
            list(conversion._original_source_patterns),
            operations=conversion.operations,
        )
        return any(reverse._scoped_match(name) is not None for name in self.chosen)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._quantize_what_is_left(model)
        for module in model.modules():
            if isinstance(module, LoadedLinearNF4):
                module.finish()
            elif isinstance(module, ExpertsNF4):
                for key, buffer in module.named_buffers(recurse=False):
                    setattr(module, key, aligned(buffer))
        if self.quantization_config._storage == "qlora_kernels":
            model._weight_conversions = self._conversions_for_saving(model)
        return model

    def _quantize_what_is_left(self, model: Any) -> None:
        """Quantize chosen weights that no op has converted, because the first result of their conversion stays dense.

        Weights that the checkpoint lacks, such as a new head, have been initialized at random and stay dense.
        """
        lacks = self.missing or set()
        for name in sorted(self.chosen - lacks):
            owner, attribute = owner_of(model, name)
            if isinstance(owner._parameters.get(attribute), nn.Parameter):
                self.put(model, name, owner._parameters[attribute].detach())

    def put(self, model: Any, name: str, dense: Tensor) -> None:
        """Put the layer, or the experts, with the weight `dense` into the model, in NF4."""
        config = self.quantization_config
        if not _is_linear_weight(model, name):
            experts = ExpertsNF4.from_parameter(dense, blocksize=config.blocksize, double_quant=config.double_quant)
            put_experts(model, name, experts)
            return
        linear, _ = owner_of(model, name)
        packed, state = quantize_nf4(dense.T if is_conv1d(linear) else dense, config.blocksize, config.double_quant)
        self.put_linear(model, name, packed, state)

    def put_linear(self, model: Any, name: str, packed: Tensor, state: Any) -> None:
        """Replace the layer whose weight is called `name` by a LinearNF4."""
        linear, _ = owner_of(model, name)
        compute_dtype = self.quantization_config.compute_dtype
        layer = LoadedLinearNF4.from_quantized(packed, state, like=linear, compute_dtype=compute_dtype)
        set_submodule(model, name.removesuffix(f".{WEIGHT}"), layer)

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

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Update the model's config to its present layers before a save, and return the tensors of its files.

        None stands for the model's state dict. Raises RuntimeError for a sharded model.
        """
        describe(model)
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


class LoadedLinearNF4(LinearNF4):
    """A LinearNF4 during loading, which transformers' initialization does not change."""

    @classmethod
    def from_quantized(cls, packed: Tensor, state: Any, **options: Any) -> LoadedLinearNF4:
        """Return a layer as LinearNF4.from_quantized does, with buffers that transformers does not initialize again."""
        layer = cast(LoadedLinearNF4, super().from_quantized(packed, state, **options))
        layer._non_persistent_buffers_set.clear()
        return layer

    @property
    def weight(self) -> Tensor:
        """The weight with transformers' mark against initialization; some models initialize layers by their path."""
        weight: Any = torch.empty(self.out_features, self.in_features, dtype=self.weight_dtype, device="meta")
        weight._is_hf_initialized = True
        return cast(Tensor, weight)

    def finish(self) -> None:
        """Turn this layer into an ordinary LinearNF4."""
        self._non_persistent_buffers_set.update(self._buffers)
        self.__class__ = LinearNF4  # type: ignore[assignment]


class QuantizeNF4(ConversionOps):
    """The op that quantizes the tensors of chosen layers before from_pretrained assigns them."""

    def __init__(self, hf_quantizer: QLoRAKernelsQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], model: Any = None, missing_keys: Any = None, **kwargs: Any) -> Any:
        """Return the tensors that transformers has to assign, by name."""
        self.hf_quantizer.missing = missing_keys
        rest = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if not self.hf_quantizer.param_needs_quantization(model, name):
                rest[name] = tensor
                continue
            require_shape(model, name, tensor)
            self.hf_quantizer.put(model, name, tensor)
            missing_keys.discard(name)
        return rest


class Unchanged(ConversionOps):
    """The op that returns its tensors as they are."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the tensors as they are, by name."""
        return input_dict


class ReadNF4(ConversionOps):
    """The op that makes a LinearNF4 of its tensors in a checkpoint; dense weights are returned unchanged."""

    def __init__(self, hf_quantizer: QLoRAKernelsQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    @property
    def reverse_op(self) -> ConversionOps:
        """Return the conversion for saving, which writes NF4 tensors unchanged."""
        return Unchanged()

    def convert(
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        full_layer_name: str = "",
        missing_keys: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return the tensors that transformers has to assign, by the pattern that matched them.

        Raises ValueError if the checkpoint's tensors of a layer are not of the kind or shape that the model's
        quantization config requires.
        """
        quantizer = self.hf_quantizer
        quantizer.missing = missing_keys
        found = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        if len(found) == 1:
            (key, tensor), dtype = next(iter(found.items())), quantizer.dtypes.get(full_layer_name)
            floating = tensor.is_floating_point()
            if full_layer_name in quantizer.chosen and not floating:
                raise ValueError(f"{full_layer_name}: must have its NF4 constants beside it, got {tensor.dtype} alone")
            quantizer.chosen.discard(full_layer_name)
            return {key: tensor.to(dtype) if dtype and floating else tensor}
        packed = found.pop(WEIGHT)
        if contained_in(quantizer.quantization_config.named_modules, full_layer_name):
            raise ValueError(f"{full_layer_name}: must be dense by the model's quantization_config, got NF4")
        quantizer.chosen.add(full_layer_name)
        tensors = {k.removeprefix(f"{WEIGHT}."): aligned(v) for k, v in found.items()}
        state = bnb_layout.decode(full_layer_name, tensors)
        linear, _ = owner_of(model, full_layer_name)
        shape = tuple(linear.weight.shape)
        if tuple(state.shape) != (shape[::-1] if is_conv1d(linear) else shape):
            raise ValueError(f"{full_layer_name}: must have shape {shape}, got {tuple(state.shape)}")
        packed = packed.reshape(-1).view(torch.uint8).reshape(-1, 1)
        constants = state.to(packed.device).constants
        state = QuantState(state.shape, linear.weight.dtype, state.blocksize, *constants)  # in the requested dtype
        quantizer.put_linear(model, full_layer_name, packed, state)
        missing_keys.discard(full_layer_name)
        return {}


def chosen_parameters(model: Any, config: QLoRAKernelsConfig, *, heads: bool = True) -> set[str]:
    """Return the names of the weights and expert stacks that `config` selects for NF4.

    heads: whether "lm_head" also stands for the heads of classifiers, which PEFT trains.
    Raises ValueError for a name in skip_modules that matches nothing in the model.
    """
    names = [*dict(model.named_modules()), *dict(model.named_parameters())]
    wanted = config.named_modules
    check_names("QLoRAKernelsConfig: skip_modules", wanted, [name for name in names if name])
    skip = [*wanted, *_wanted_in_float32(model)]
    if "lm_head" in config.skip_modules:
        skip += ["lm_head", *get_keys_to_not_convert(model)]
        if heads:
            skip += [name for name, _ in model.named_children() if name in _TASK_HEADS]
            skip.append(list(model.state_dict())[-1].rpartition(".")[0])  # the last layer, also if it has a bias
    linears = {f"{name}.{WEIGHT}": name for name in dense_linears(model)}
    tied = {name.removesuffix(f".{WEIGHT}") for pair in _tied(model).items() for name in pair}
    chosen = {w for w, name in linears.items() if not contained_in(skip, name) and name not in tied}
    return chosen | {name for name in expert_stacks(model) if not contained_in(skip, name)}


def _tied(model: Any) -> dict[str, str]:
    return getattr(model, "all_tied_weights_keys", None) or {}


def _wanted_in_float32(model: Any) -> Iterator[str]:
    for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
        yield from getattr(model, attribute, None) or ()


def _dtype_of_parameters(model: Any, dtype: Any) -> dict[str, torch.dtype]:
    """Return the dtype in which transformers keeps each parameter."""
    plan = model._get_dtype_plan(dtype) or {}
    patterns = [(re.compile(pattern.replace("*", ".*")), wanted) for pattern, wanted in plan.items()]
    return {
        name: next((wanted for pattern, wanted in patterns if pattern.search(name)), parameter.dtype)
        for name, parameter in model.named_parameters()
    }


def owner_of(model: Any, name: str) -> tuple[Any, str]:
    """Return (the module that has the parameter, its name there)."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _is_linear_weight(model: Any, name: str) -> bool:
    owner, attribute = owner_of(model, name)
    return attribute == WEIGHT and (isinstance(owner, nn.Linear) or is_conv1d(owner))


def require_shape(model: Any, name: str, tensor: Tensor) -> None:
    """Raise ValueError unless `tensor` has the shape of the model's parameter."""
    shape = tuple(model.get_parameter(name).shape)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: must have shape {shape}, got {tuple(tensor.shape)}")


def put_experts(model: Any, name: str, experts: ExpertsNF4) -> None:
    """Replace the parameter `name` by `experts`."""
    owner, attribute = owner_of(model, name)
    delattr(owner, attribute)
    setattr(owner, attribute, experts)


def use_plain_experts(model: Any) -> None:
    """Select transformers' loop over experts, which multiplies by one expert's weight at a time, as ExpertsNF4
    needs.
    """
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"


def describe(model: Any) -> None:
    """Update a transformers model's quantization config to its present layers.

    This is called after layers have been quantized, merged or replaced. A model whose NF4 layers bitsandbytes can read
    gets the config of bitsandbytes. A model with experts in NF4 gets QLoRAKernelsConfig, and so does one with a layer
    that would be wrong in bitsandbytes, if all layers have one blocksize and kind of constants. A model that was
    loaded with QLoRAKernelsConfig keeps it. A model without NF4 layers gets no config. The config of another library's
    quantizer is not changed.
    Raises ValueError if experts differ in blocksize or kind of constants, which one config cannot describe.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, QLoRAKernelsQuantizer):
        return
    quantized = quantized_modules(model)
    if not quantized:
        if quantizer is not None:
            quantizer.remove_quantization_config(model)
        return
    if quantizer is None:
        quantizer = QLoRAKernelsQuantizer(QLoRAKernelsConfig(), pre_quantized=False)
        quantizer.quantization_config._storage = "bitsandbytes"
        model.hf_quantizer = quantizer
    config = quantizer.quantization_config
    experts = {name: module for name, module in quantized.items() if isinstance(module, ExpertsNF4)}
    kinds = {(m.blocksize, m.double_quant) for m in cast(Any, experts or quantized).values()}
    skip = [*dense_linears(model), *expert_stacks(model)]
    if experts or (len(kinds) == 1 and _wrong_in_bitsandbytes(model, quantized, skip)):
        config._storage = "qlora_kernels"
    if experts and len(kinds) > 1:
        raise ValueError(f"save: all experts must have one (blocksize, double_quant), got {sorted(kinds)}")
    config.blocksize, config.double_quant = max(kinds)
    config.skip_modules = skip
    config._model_dtype = model.dtype
    quantizer.chosen = {name if name in experts else f"{name}.{WEIGHT}" for name in quantized}
    model.config.quantization_config = config
    model._weight_conversions = quantizer._conversions_for_saving(model)


def write_config(model: Any, folder: Path) -> None:
    """Write config.json and generation_config.json as save_pretrained does."""
    describe(model)
    model.config.architectures = [type(model).__name__.removeprefix("FSDP")]  # fully_shard changes the class
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def _wrong_in_bitsandbytes(model: Any, layers: dict[str, Any], skip: list[str]) -> bool:
    """Whether some layer would be wrong in a model that transformers loads with bitsandbytes.

    bitsandbytes' CPU code dequantizes some shapes to wrong values (docs/format.md), and its weight, which is read as
    codes, cannot serve models that read the weight of a layer instead of calling it. transformers leaves out layers
    that the model keeps in float32 (T5's wo), those whose names end like the name of a skipped one, and subclasses of
    nn.Linear, of which replace_linear replaces Falcon's.
    skip: names of dense layers.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    skip = [*skip, *(getattr(model, "_keep_in_fp32_modules", None) or ())]
    read = read_but_never_called(model)
    return any(
        (layer.in_features % 16 == 0 and layer.in_features % layer.blocksize != 0)
        or name in read
        or not should_convert_module(name, skip)
        or type(model.get_submodule(name.rpartition(".")[0])).__module__ == _FALCON
        for name, layer in layers.items()
    )


if METHOD not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(METHOD)(QLoRAKernelsQuantizer)
