"""The ops with which transformers' from_pretrained turns the tensors of a checkpoint into NF4 layers.

transformers 5 reads a checkpoint tensor by tensor. It passes a dense tensor of a chosen layer to `QuantizeNF4`, and the
tensors of an NF4 weight with its constants to `ReadNF4`; both put the finished layer into the model. They share one
`NF4Loading` during a load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.base import HfQuantizer

from ..format import bnb_layout
from ..format.quant_state import QuantState
from ..io.safetensors_reader import aligned
from ..nn.experts_nf4 import ExpertsNF4
from ..nn.linear_nf4 import LinearNF4, is_conv1d
from ..nn.match import contained_in
from ..nn.module_tree import set_submodule
from ..ops.quantize_nf4 import quantize_nf4
from .quantization_config import QLoRAKernelsConfig
from .quantized_modules import WEIGHT, is_linear_weight, owner_of, replace_parameter


class NF4Loading:
    """The state of one load in NF4, and how quantized layers are put into the model.

    chosen: names of the parameters that are in NF4 or will be.   missing: transformers' set of parameters that the
    checkpoint lacks, known once an op has run.   dtypes: of dense parameters that `ReadNF4` returns.
    """

    def __init__(self, config: QLoRAKernelsConfig) -> None:
        self.config = config
        self.chosen: set[str] = set()
        self.missing: set[str] | None = None
        self.dtypes: dict[str, torch.dtype] = {}

    def put(self, model: nn.Module, name: str, dense: Tensor) -> None:
        """Put the layer, or the experts, with the weight `dense` into the model, in NF4."""
        config = self.config
        if not is_linear_weight(model, name):
            experts = ExpertsNF4.from_parameter(dense, blocksize=config.blocksize, double_quant=config.double_quant)
            replace_parameter(model, name, experts)
            return
        linear, _ = owner_of(model, name)
        packed, state = quantize_nf4(dense.T if is_conv1d(linear) else dense, config.blocksize, config.double_quant)
        self.put_linear(model, name, packed, state)

    def put_linear(self, model: nn.Module, name: str, packed: Tensor, state: QuantState) -> None:
        """Replace the layer whose weight is called `name` by a LinearNF4."""
        linear, _ = owner_of(model, name)
        layer = LoadedLinearNF4.from_quantized(packed, state, like=linear, compute_dtype=self.config.compute_dtype)
        set_submodule(model, name.removesuffix(f".{WEIGHT}"), layer)

    def quantize_rest(self, model: nn.Module) -> None:
        """Quantize chosen weights that no op has converted, because the first result of their conversion stays dense.

        Weights that the checkpoint lacks, such as a new head, have been initialized at random and stay dense.
        """
        lacks = self.missing or set()
        for name in sorted(self.chosen - lacks):
            owner, attribute = owner_of(model, name)
            parameter = owner._parameters.get(attribute)
            if parameter is not None:
                self.put(model, name, parameter.detach())


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

    def __init__(self, loading: NF4Loading) -> None:
        self.loading = loading

    def convert(self, input_dict: dict[str, Any], model: Any = None, missing_keys: Any = None, **kwargs: Any) -> Any:
        """Return the tensors that transformers has to assign, by name."""
        self.loading.missing = missing_keys
        rest = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if name not in self.loading.chosen:
                rest[name] = tensor
                continue
            _require_shape(name, model.get_parameter(name).shape, tensor.shape)
            self.loading.put(model, name, tensor)
            missing_keys.discard(name)
        return rest


class Unchanged(ConversionOps):
    """The op that returns its tensors as they are."""

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return the tensors as they are, by name."""
        return input_dict


class ReadNF4(ConversionOps):
    """The op that makes a LinearNF4 of its tensors in a checkpoint; dense weights are returned unchanged."""

    def __init__(self, loading: NF4Loading, hf_quantizer: HfQuantizer) -> None:
        self.loading = loading
        self.hf_quantizer = hf_quantizer  # by this attribute, transformers knows not to cast the tensors that it passes

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
        self.loading.missing = missing_keys
        tensors = {key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        if len(tensors) == 1:
            ((key, dense),) = tensors.items()
            return {key: self._dense_weight(full_layer_name, dense)}
        self._put_nf4_weight(model, full_layer_name, tensors)
        missing_keys.discard(full_layer_name)
        return {}

    def _dense_weight(self, name: str, weight: Tensor) -> Tensor:
        """Return a weight that the checkpoint holds without constants, in the dtype in which the model keeps it."""
        if not weight.is_floating_point():
            if name in self.loading.chosen:
                raise ValueError(
                    f"from_pretrained: {name} must have its NF4 constants beside it, got {weight.dtype} alone; save "
                    "the model again"
                )
            return weight
        self.loading.chosen.discard(name)
        return weight.to(self.loading.dtypes.get(name, weight.dtype))

    def _put_nf4_weight(self, model: nn.Module, name: str, tensors: dict[str, Tensor]) -> None:
        """Put the layer with the NF4 weight `name` into the model.

        tensors: "weight", which is the packed codes, and its constants as "weight.<suffix>".
        """
        if contained_in(self.loading.config.named_modules, name):
            raise ValueError(
                f"from_pretrained: {name} must be dense by skip_modules of the model's quantization_config, got NF4; "
                "remove its name from skip_modules in config.json"
            )
        self.loading.chosen.add(name)
        constants = {key.removeprefix(f"{WEIGHT}."): aligned(value) for key, value in tensors.items() if key != WEIGHT}
        stored = bnb_layout.decode(name, constants)
        linear, _ = owner_of(model, name)
        shape = tuple(linear.weight.shape)
        _require_shape(name, shape, stored.shape[::-1] if is_conv1d(linear) else stored.shape)
        packed = tensors[WEIGHT].reshape(-1).view(torch.uint8).reshape(-1, 1)
        state = QuantState(  # linear.weight has the requested dtype
            stored.shape, linear.weight.dtype, stored.blocksize, *stored.to(packed.device).constants
        )
        self.loading.put_linear(model, name, packed, state)


def _require_shape(name: str, shape: Sequence[int], stored: Sequence[int]) -> None:
    """Raise ValueError unless the shape `stored` in the checkpoint is the model's."""
    if tuple(stored) != tuple(shape):
        raise ValueError(
            f"from_pretrained: {name} must have the model's shape {tuple(shape)}, got {tuple(stored)}; check that "
            "config.json belongs to the weights"
        )
