"""QuantizedWeight: storage of an NF4 weight's tensors in buffers or in frozen integer parameters.

Buffers are the default. DistributedDataParallel broadcasts buffers in every forward and FSDP2 does not shard them, so
for both the same tensors become parameters that never require a gradient:

    <name>_flat     packed and absmax_q as they are; fp32 constants as their bits, int32, at least one-dimensional

Mixed precision policies and casts do not change integers. FSDP2 may shard dimension 0 at any row, because it gathers
the whole tensor before use. Tensors that share memory stay one parameter.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from ..format.quant_state import FLOAT_DTYPES

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

CONSTANTS = ("absmax", "absmax_q", "absmax_scale", "absmax_offset")
TENSORS = ("packed", *CONSTANTS)
_BYTES = ("packed", "absmax_q")
_FLAT = "_flat"


def _tensor_property(name: str) -> Any:
    """Return a property, of the type with which the class annotates it."""

    def read(module: QuantizedWeight) -> Tensor | None:
        buffers = module._buffers
        return buffers[name] if name in buffers else module._from_flat(name, getattr(module, name + _FLAT))

    def write(module: QuantizedWeight, value: Tensor | None) -> None:  # nn.Module itself assigns a buffer
        flat, stored = None if value is None else module._to_flat(name, value), module._parameters.get(name + _FLAT)
        if flat is not None and is_sharded(stored):
            stored.to_local().copy_(cut_as(stored, flat).to_local())
        else:
            module.register_parameter(name + _FLAT, flat)

    return property(read, write)


def is_sharded(tensor: Any) -> TypeGuard[DTensor]:
    """Whether `tensor` is a DTensor. Each process holds a part of it."""
    return type(tensor) not in (nn.Parameter, Tensor) and hasattr(tensor, "device_mesh")


def cut_as(like: Any, whole: Tensor) -> Any:
    """Return a DTensor of `whole` sharded as `like` is; return `whole` itself if `like` is not a DTensor.

    Every process holds `whole`, so that nothing is sent. Raises ValueError for another shape.
    """
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    if whole.shape != like.shape:
        raise ValueError(f"a sharded tensor must keep its shape, {tuple(like.shape)}, got {tuple(whole.shape)}")
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def assigns(local_metadata: Mapping[str, Any]) -> bool:
    """Whether load_state_dict was called with assign=True; nn.Module passes this in the metadata of each module."""
    return bool(local_metadata.get("assign_to_params_buffers", False))


class QuantizedWeight(nn.Module):
    """Base class of LinearNF4 and ExpertsNF4, which stores `packed` and its constants in one of two ways."""

    weight_dtype: torch.dtype
    packed: Tensor = _tensor_property("packed")
    absmax: Tensor | None = _tensor_property("absmax")
    absmax_q: Tensor | None = _tensor_property("absmax_q")
    absmax_scale: Tensor | None = _tensor_property("absmax_scale")
    absmax_offset: Tensor | None = _tensor_property("absmax_offset")

    parameter_names_in_state_dict = False
    """Whether state dicts hold the parameters under their own names, as torch.distributed.checkpoint expects."""

    @property
    def in_parameters(self) -> bool:
        """Whether the tensors are frozen parameters instead of buffers."""
        return "packed" not in self._buffers and "packed" + _FLAT in self._parameters

    @property
    def double_quant(self) -> bool:
        """Whether the constants are stored in 8 bits; also known for a sharded weight."""
        return self._stored("absmax_q") is not None

    @property
    def _is_fsdp_managed_module(self) -> bool:
        """Whether FSDP manages this module. Setting it is the only event by which FSDP can be detected."""
        return bool(self.__dict__.get("_is_fsdp_managed_module", False))

    @_is_fsdp_managed_module.setter
    def _is_fsdp_managed_module(self, managed: bool) -> None:
        self.__dict__["_is_fsdp_managed_module"] = managed
        if managed and not self.in_parameters:
            warnings.warn(
                f"{type(self).__name__}: FSDP leaves the NF4 weight whole in every process, because it is kept in "
                "buffers; call qlora_kernels.make_shardable(model) before fully_shard",
                stacklevel=3,
            )

    def flat_parameters(self) -> dict[str, nn.Parameter]:
        """Return name -> parameter; empty while the tensors are buffers. Sharded parameters are DTensors."""
        parameters = {name: self._parameters.get(name + _FLAT) for name in TENSORS}
        return {name + _FLAT: parameter for name, parameter in parameters.items() if parameter is not None}

    def move_to_parameters(self, known: dict[int, nn.Parameter]) -> None:
        """Replace the buffers by frozen integer parameters over the same memory.

        known: id of a tensor -> its parameter, for tensors that several modules share; new entries are added.
        """
        if self.in_parameters:
            return
        tensors = {name: self._buffers.pop(name) for name in TENSORS}
        self._non_persistent_buffers_set.difference_update(TENSORS)
        for name, tensor in tensors.items():
            if tensor is not None and id(tensor) not in known:
                known[id(tensor)] = self._to_flat(name, tensor)
            self.register_parameter(name + _FLAT, None if tensor is None else known[id(tensor)])

    def store_as(self, other: QuantizedWeight) -> None:
        """Store the tensors in buffers or in parameters, as `other` does."""
        if other.in_parameters:
            self.move_to_parameters({})
            self.parameter_names_in_state_dict = other.parameter_names_in_state_dict

    def _set_tensors(self, tensors: Mapping[str, Tensor | None], *, persistent: bool) -> None:
        """Assign all five tensors. Raises ValueError if a sharded one has another size."""
        if self.in_parameters:
            for name, stored in self.flat_parameters().items():
                value = tensors[name.removesuffix(_FLAT)]
                if is_sharded(stored) and (value is None or value.numel() != stored.numel()):
                    got = None if value is None else value.numel()
                    raise ValueError(f"{name}: a sharded weight must keep its {stored.numel()} elements, got {got}")
        for name in TENSORS:
            if self.in_parameters:
                setattr(self, name, tensors[name])
                continue
            self._buffers[name] = tensors[name]
            if not persistent:
                self._non_persistent_buffers_set.add(name)

    def _tensors(self) -> list[Tensor | None]:
        # Read directly from nn.Module's dictionary: attribute access searches three dictionaries for each name.
        buffers = self._buffers
        if "packed_flat" not in self._parameters:
            try:
                return [buffers[name] for name in TENSORS]
            except KeyError:  # the buffer was replaced, for example by a parametrization
                pass
        return [getattr(self, name) for name in TENSORS]

    def _flat_shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor in the checkpoint format if its parameter has another shape, otherwise None."""
        return () if name == "absmax_offset" else None

    def _to_flat(self, name: str, tensor: Tensor) -> nn.Parameter:
        flat = tensor.detach()
        if self._flat_shape(name) is not None:
            flat = flat.reshape(-1)
        return nn.Parameter(flat if name in _BYTES else flat.view(torch.int32), requires_grad=False)

    def _from_flat(self, name: str, stored: Tensor | None) -> Tensor | None:
        if stored is None:
            return None
        if is_sharded(stored):
            raise RuntimeError(
                f"{type(self).__name__}: {name} must be whole to be used, got a shard of it; call fully_shard on a "
                "module that contains this one and calls it, or unshard() that module first"
            )
        tensor = stored if name in _BYTES else stored.view(torch.float32)
        shape = self._flat_shape(name)
        return tensor if shape is None else tensor.view(shape)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedWeight:
        # Casts and moves. The tensors keep their dtypes, although module.half() and .to(bf16) apply to every float
        # buffer and module.type(dtype) to the packed bytes too. weight_dtype follows the cast of a dense weight.
        own = {id(tensor) for name in TENSORS if (tensor := self._stored(name)) is not None}

        def keep_dtype(tensor: Tensor) -> Any:
            result = fn(tensor)
            return result if id(tensor) not in own or result.dtype == tensor.dtype else tensor.to(result.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        of_weight = fn(torch.empty(0, dtype=self.weight_dtype, device=self.stored_device)).dtype
        if of_weight in FLOAT_DTYPES:  # the fp32 constants would not show a cast back to fp32
            self.weight_dtype = of_weight
        return self

    def _save_rest(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> bool:
        """Save nn.Module's part. Returns whether the weight is still to be saved under the checkpoint's names."""
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        if self.in_parameters and self.parameter_names_in_state_dict:
            return False
        for name in self.flat_parameters():
            destination.pop(prefix + name, None)
        return True

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        report = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        flat = {prefix + name + _FLAT: name for name in TENSORS if prefix + name + _FLAT in state_dict}
        if not flat:
            self._load_format(state_dict, prefix, *report)
            return
        try:
            if self.in_parameters:
                whole = {key: state_dict[key] for key, name in flat.items() if not is_sharded(state_dict[key])}
                cut = {
                    key: cut_as(stored, value)
                    for key, value in whole.items()
                    if is_sharded(stored := self._parameters.get(key.removeprefix(prefix)))
                }
                nn.Module._load_from_state_dict(self, {**state_dict, **cut}, prefix, *report)
                return
            self._load_rest(state_dict, set(flat), prefix, *report)
            values = {name: self._from_flat(name, state_dict.get(prefix + name + _FLAT)) for name in TENSORS}
            self._load_tensors(prefix, values, assign=assigns(local_metadata))
        except (ValueError, RuntimeError) as error:
            error_msgs.append(f"{prefix}: {error}")

    def _load_format(self, state_dict: dict[str, Any], prefix: str, *report: Any) -> None:
        """Load the weight and the other entries from a state dict under the checkpoint's names."""
        raise NotImplementedError

    def _load_rest(
        self, state_dict: dict[str, Any], taken: set[str], prefix: str, metadata: Any, strict: bool, *report: Any
    ) -> None:
        """Run nn.Module's loading without the weight.   taken: names of the weight's tensors."""
        others = {key: value for key, value in state_dict.items() if key not in taken}
        nn.Module._load_from_state_dict(self, others, prefix, metadata, strict, *report)
        own = {prefix + name + end for name in TENSORS for end in ("", _FLAT)}
        missing: list[str] = report[0]
        missing[:] = [key for key in missing if key not in own]

    def _load_tensors(self, prefix: str, values: Mapping[str, Tensor | None], *, assign: bool) -> None:
        """Copy, or with `assign` take, a weight in the module's own format.

        Raises ValueError for another kind of constants or size.
        """
        for name in TENSORS:
            sizes = [None if t is None else t.numel() for t in (values[name], self._stored(name))]
            if sizes[0] != sizes[1]:
                raise ValueError(f"{prefix}{name} must have {sizes[1]} elements, got {sizes[0]}")
        packed = cast(Tensor, values["packed"])
        device = self._device_of_loaded(prefix + "packed", packed, assign=assign)
        loaded = {n: None if t is None else t.detach().to(device, copy=not assign) for n, t in values.items()}
        self._set_tensors(loaded, persistent=not {*TENSORS} & self._non_persistent_buffers_set)

    def _device_of_loaded(self, name: str, loaded: Tensor, *, assign: bool) -> torch.device:
        """Return the device for a weight of a state dict: that of `loaded` with `assign`, otherwise the module's.

        Warns, as nn.Module does, if the weight of a checkpoint would be copied to the meta device, and so be lost.
        """
        if assign:
            return loaded.device
        if self.stored_device.type == "meta" and not loaded.is_meta:
            warnings.warn(
                f"for {name}: copying from a non-meta tensor of the checkpoint to a meta tensor of the module has no "
                "effect; pass assign=True to load_state_dict, or call to_empty first",
                stacklevel=2,
            )
        return self.stored_device

    def _stored(self, name: str) -> Tensor | None:
        stored = self._buffers.get(name)
        return self._parameters.get(name + _FLAT) if stored is None else stored

    @property
    def stored_device(self) -> torch.device:
        """Return the device on which the quantized tensors are."""
        return next(stored for name in TENSORS if (stored := self._stored(name)) is not None).device
