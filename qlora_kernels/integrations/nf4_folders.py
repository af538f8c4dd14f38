"""Models assembled from a folder's tensors, of which those of NF4 weights are put in place without a conversion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..format.bnb_layout import META_KEY, decode, stored_shape
from ..format.quant_state import QuantState
from ..io.safetensors_reader import aligned
from ..nn.experts_nf4 import ExpertsNF4
from ..nn.linear_nf4 import LinearNF4, is_conv1d
from ..nn.module_tree import set_submodule
from ..nn.quantized_weight import TENSORS
from .model_structure import ModelError, ModelStructure, as_model_error, require_nothing
from .quantized_modules import replace_parameter, use_plain_experts

_WEIGHT = ".weight"


@dataclass
class StoredWeights:
    """The tensors of a folder's NF4 weights.

    layers: name of a layer -> its state for LinearNF4, without a bias.   experts: name of a stack of experts -> the
    buffers of ExpertsNF4.   shapes: name in the files -> shape there of the dense weight.
    """

    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    experts: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def taken_from(cls, tensors: dict[str, Tensor], structure: ModelStructure) -> StoredWeights:
        """Remove the tensors of NF4 weights from `tensors`, and return them."""
        weights = {name.removesuffix(f".{META_KEY}") for name in tensors if name.endswith(f"{_WEIGHT}.{META_KEY}")}
        stems = [name.removesuffix(".packed") for name in tensors if name.endswith(".packed")]
        stacks = {stem: structure.parameter_of(stem) for stem in stems}
        stored = cls()
        for name in list(tensors):
            stem, _, suffix = name.rpartition(f"{_WEIGHT}.")
            weight = f"{stem}{_WEIGHT}" if stem else name
            if weight in weights:
                layer = (structure.parameter_of(weight) or weight).removesuffix(_WEIGHT)
                stored.layers.setdefault(layer, {})[f"weight.{suffix}" if stem else "weight"] = tensors.pop(name)
                continue
            stem, _, own_name = name.rpartition(".")
            stack = stacks.get(stem)
            if own_name in TENSORS and stack is not None and stack in structure.shapes:
                stored.experts.setdefault(stack, {})[own_name] = tensors.pop(name)
                stored.shapes[stem] = tuple(structure.shapes[stack])
        stored.shapes |= {
            f"{layer}{_WEIGHT}": _shape(layer, state, structure) for layer, state in stored.layers.items()
        }
        return stored


def _shape(layer: str, state: Mapping[str, Tensor], structure: ModelStructure) -> tuple[int, ...]:
    shape = stored_shape(layer, {name.removeprefix("weight."): tensor for name, tensor in state.items()})
    return shape[::-1] if structure.is_transposed(layer) else shape


class WeightMaker(NamedTuple):
    """Makes NF4 modules of their tensors.

    dtype: of the dense weights.   mapped: use the files' own tensors instead of copies.
    config: the QLoRAKernelsConfig of a folder that was written with one, otherwise None.
    """

    structure: ModelStructure
    dtype: torch.dtype
    mapped: bool
    config: Any = None

    def linear(self, awaiting: _Awaiting, name: str, state: dict[str, Tensor]) -> LinearNF4:
        """Return the layer of the placeholder `awaiting`."""
        made = self._over_tensors(awaiting, name, state) if self.mapped else self._copied(awaiting, name, state)
        made.dense_class = awaiting.dense_class
        return made

    def experts(self, name: str, tensors: dict[str, Tensor]) -> ExpertsNF4:
        """Return the experts of a stack, over their tensors.

        Raises ModelError for tensors that are no stack of the model's shape in this package's format.
        """
        if self.config is None:
            raise ModelError(f"{name}: experts in NF4 must be of a folder with quant_method qlora_kernels")
        shape = cast("tuple[int, int, int]", tuple(self.structure.shapes[name]))
        try:
            tensors = {key: aligned(tensor) for key, tensor in tensors.items()}
            return ExpertsNF4.from_tensors(tensors, shape, self.config.blocksize, self.dtype)
        except ValueError as error:
            raise ModelError(f"{name}: {error}") from error

    def _copied(self, awaiting: _Awaiting, name: str, state: dict[str, Tensor]) -> LinearNF4:
        bias, sizes = awaiting._parameters["bias"], (awaiting.in_features, awaiting.out_features)
        layer = LinearNF4(*sizes, bias is not None, compute_dtype=self.dtype, dtype=self.dtype)
        try:
            layer.load_state_dict(state if bias is None else {**state, "bias": bias.detach()})
        except RuntimeError as error:
            raise ModelError(f"{name}: {' '.join(str(error).split())}") from error
        return layer

    def _over_tensors(self, awaiting: _Awaiting, name: str, state: dict[str, Tensor]) -> LinearNF4:
        constants = {key.removeprefix("weight."): aligned(tensor) for key, tensor in state.items() if key != "weight"}
        try:
            quant_state = decode(f"{name}{_WEIGHT}", constants)
        except (ValueError, TypeError) as error:
            raise ModelError(" ".join(str(error).split())) from error
        packed = state["weight"].reshape(-1).view(torch.uint8).reshape(-1, 1)
        if tuple(quant_state.shape) != (awaiting.out_features, awaiting.in_features) or (
            packed.numel() != (quant_state.numel + 1) // 2
        ):
            raise ModelError(
                f"{name}: must hold the packed bytes of a weight {(awaiting.out_features, awaiting.in_features)}, got "
                f"{packed.numel()} bytes and shape {tuple(quant_state.shape)}"
            )
        compute_dtype = self.dtype
        if self.config is not None:  # as from_pretrained makes the layers of such a folder
            compute_dtype = self.config.compute_dtype
            quant_state = QuantState(quant_state.shape, self.dtype, quant_state.blocksize, *quant_state.constants)
        return LinearNF4.from_quantized(packed, quant_state, like=awaiting, compute_dtype=compute_dtype)


class _Awaiting(nn.Module):
    """A placeholder for an NF4 layer while transformers loads the rest: it has the layer's bias but no weight."""

    def __init__(
        self, in_features: int, out_features: int, bias: nn.Parameter | None, dense_class: type[nn.Module]
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dense_class = in_features, out_features, dense_class
        self.register_parameter("bias", bias)
        # Some models initialize their layers' weights themselves; transformers skips weights with this attribute.
        weight: Any = torch.empty(out_features, in_features, device="meta")
        weight._is_hf_initialized = True
        self.weight = weight


class _AwaitingExperts(nn.Module):
    """A placeholder for a stack of experts, which transformers' initialization skips."""

    _is_hf_initialized = True


def load_parts(
    structure: ModelStructure, tensors: dict[str, Tensor], weights: StoredWeights, make: WeightMaker
) -> nn.Module:
    """Return the model with `tensors` loaded by transformers and the NF4 weights put in place."""
    kind = type(cast(Any, structure.model))

    class WithoutQuantized(kind):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            for name in weights.layers:
                set_submodule(self, name, _awaiting(self, name))
            for name in weights.experts:
                replace_parameter(self, name, _AwaitingExperts())

    # transformers looks up conversions and other rules by the name of the class.
    WithoutQuantized.__name__, WithoutQuantized.__module__ = kind.__name__, kind.__module__
    with as_model_error(structure.folder, "must hold the weights that its config.json describes"):
        model, info = WithoutQuantized.from_pretrained(
            None,
            config=structure.config,
            state_dict=tensors,
            dtype=make.dtype,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
        )
    model.__class__ = kind
    misshapen = [f"{name} is {list(has)}, must be {list(want)}" for name, has, want in info["mismatched_keys"]]
    require_nothing(structure.folder, info["missing_keys"], info["unexpected_keys"], misshapen)
    for name, state in weights.layers.items():
        set_submodule(model, name, make.linear(model.get_submodule(name), name, state))
    for name, buffers in weights.experts.items():
        replace_parameter(model, name, make.experts(name, buffers))
    if make.config is not None:
        from .quantizer import QLoRAKernelsQuantizer

        model.hf_quantizer = QLoRAKernelsQuantizer(make.config, pre_quantized=True)
        if weights.experts:
            use_plain_experts(model)
    return cast(nn.Module, model)


def _awaiting(model: nn.Module, name: str) -> _Awaiting:
    try:
        linear: Any = model.get_submodule(name)
    except AttributeError as error:
        raise ModelError(
            f"{name}: must be a layer of the model that config.json describes, got an NF4 weight for it in the files "
            "alone; check that config.json belongs to the weights"
        ) from error
    shape = (linear.nx, linear.nf) if hasattr(linear, "nx") else (linear.in_features, linear.out_features)
    return _Awaiting(*shape, linear.bias, type(linear) if is_conv1d(linear) else nn.Linear)
