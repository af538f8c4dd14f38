"""The parameters of one device and their states, stored in slots of one arena and shown as torch's tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import dlpack

from ..ops.adamw_step import STATE_BLOCKSIZE, dequantize_blockwise, quantize_blockwise
from ..rounding import cdiv
from .paging_plan import Slot
from .parameter_rules import check_param
from .shards import as_part_of, is_dtensor, local, local_grad, local_state
from .state_memory import StateMemory

STATES = {"exp_avg": True, "exp_avg_sq": False}
"""torch's names of the states, and whether their 8-bit map is signed."""


class StateArena:
    """params[i] has slots[i] in `memory` and steps[i]; states have the element order of the parameter's memory."""

    def __init__(self, params: Sequence[Tensor], slots: Sequence[Slot], memory: StateMemory) -> None:
        self.params = list(params)
        self.slots = slots
        self.memory = memory
        self.device = params[0].device
        self.steps = torch.zeros(len(params), dtype=torch.float32, device=self.device)
        self.unstepped = set(range(len(params)))
        """Indices of the parameters that were not updated yet."""
        self.members = set(self.unstepped)
        """Indices of the parameters that are in the optimizer's groups."""
        self._sharded = any(map(is_dtensor, params))
        self.shapes = [local(param).shape for param in params]
        self.strides = [local(param).stride() for param in params]

    def tensors(self) -> list[Tensor]:
        """Return each parameter's memory: the parameter itself, or this process's part of a DTensor."""
        return [local(param) for param in self.params] if self._sharded else self.params

    def follow(self) -> list[int]:
        """Reorder the states of parameters whose memory order changed (channels_last), and return their indices.

        A parameter may change its address and its dtype. Raises ValueError, before anything is changed, for another
        shape, another device, or memory with gaps.
        """
        tensors = self.tensors()
        changed = [
            index
            for index, param in enumerate(tensors)
            if param.stride() != self.strides[index] or param.shape != self.shapes[index] or param.device != self.device
        ]
        for index in changed:
            param = tensors[index]
            check_param(param)
            if param.shape != self.shapes[index] or param.device != self.device:
                states = f"shape {tuple(self.shapes[index])} on {self.device}"
                raise ValueError(
                    f"PagedAdamW: a parameter must keep its shape and device, got {tuple(param.shape)} on "
                    f"{param.device} where its states have {states}; make a new optimizer"
                )
        for index in changed:
            copies = {name: value.clone() for name, value in self.torch_state_of(index).items()}
            self.strides[index] = tensors[index].stride()
            for name in STATES:  # the absmax values are those of the old order
                copies.pop(f"{name}_absmax", None)
            self.load(index, copies)
        return changed

    def grads(self) -> list[Tensor | None]:
        """Return each parameter's gradient in the parameter's memory layout; None without one or for a non-member.

        Raises NotImplementedError for a sparse gradient, and ValueError for one with another dtype or shape than its
        parameter's.
        """
        grads: list[Tensor | None] = []
        for index, param in enumerate(self.tensors()):
            grad = None
            if index in self.members:
                grad = local_grad(self.params[index]) if self._sharded else param.grad
            if grad is not None:
                if grad.layout is not torch.strided:
                    raise NotImplementedError(
                        f"PagedAdamW: gradients must be dense, got {grad.layout}; use sparse=False in the embedding"
                    )
                if grad.dtype != param.dtype or grad.shape != param.shape:
                    got, expected = f"{grad.dtype} {tuple(grad.shape)}", f"{param.dtype} {tuple(param.shape)}"
                    raise ValueError(f"PagedAdamW: a gradient must be like its parameter, {expected}, got {got}")
                if grad.stride() != param.stride():
                    grad = torch.empty_like(param).copy_(grad)
            grads.append(grad)
        return grads

    def active_chunks(self, grads: Sequence[Tensor | None]) -> list[int]:
        """Return the chunks in which some parameter has a gradient; the others are not fetched."""
        return [
            index
            for index, chunk in enumerate(self.memory.chunks)
            if any(grad is not None for grad in grads[chunk.first_param : chunk.last_param + 1])
        ]

    def state_of(self, index: int) -> dict[str, Tensor]:
        """Return the entry of `optimizer.state`: tensors in the arena's memory.

        An 8-bit state is `<name>_q` and `<name>_absmax`, both flat. Each tensor has a storage of its own, so that
        saving it saves only its own bytes.
        """
        shown = {name: _own_storage(flat) for name, flat in self._flat_views(index).items()}
        shown["step"] = shown["step"].view(())
        return {name: self._whole(index, value) if name in STATES else value for name, value in shown.items()}

    def show(self, index: int, entry: dict[str, Any]) -> None:
        """Put the parameter's state into `entry`, replacing any other form of it; keep other values."""
        for name in STATES:
            for form in (name, f"{name}_q", f"{name}_absmax"):
                entry.pop(form, None)
        entry.update(self.state_of(index))

    def torch_state_of(self, index: int, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return `state`, by default the parameter's, with 8-bit states decoded under torch's names.

        Each decoded state is accompanied by the absmax with which it is encoded again exactly.
        """
        state = self.state_of(index) if state is None else state
        result = {name: value for name, value in state.items() if not name.endswith(("_q", "_absmax"))}
        for name in STATES:
            if name not in state:
                result[name] = as_part_of(self.params[index], self._decoded(index, state, name))
                if not is_dtensor(self.params[index]):  # blocks are those of one process's part
                    result[f"{name}_absmax"] = state[f"{name}_absmax"]
        return result

    def owns(self, value: object) -> bool:
        """Whether `value` is a tensor in the arena's memory."""
        if not isinstance(value, Tensor):
            return False
        value = local(value)
        return any(
            whole.data_ptr() <= value.data_ptr() < whole.data_ptr() + whole.nbytes
            for whole in (self.memory.arena, self.steps)
        )

    def clear(self, index: int) -> None:
        """Reset a parameter's state to that before its first update."""
        for value in self._flat_views(index).values():
            value.zero_()

    def check_load(self, index: int, saved: Mapping[str, Any]) -> None:
        """Raise ValueError unless `saved` is a state of AdamW for this parameter."""
        param, where = local(self.params[index]), "PagedAdamW.load_state_dict"
        saved = local_state(self.params[index], saved)
        step = saved.get("step")
        if step is None or (isinstance(step, Tensor) and step.numel() != 1):
            raise ValueError(f"{where}: step must be a number, got {step if step is None else tuple(step.shape)}")
        for name in STATES:
            packed = f"{name}_q" in saved
            value = saved.get(f"{name}_q" if packed else name)
            if not isinstance(value, Tensor):
                raise ValueError(f"{where}: {name} must be given for each parameter with a state, got {list(saved)}")
            if value.numel() != param.numel() or not (packed or value.shape == param.shape):
                got = f"{tuple(value.shape)} for a parameter of shape {tuple(param.shape)}"
                raise ValueError(f"{where}: {name} must have its parameter's shape, got {got}")
            absmax, blocks = saved.get(f"{name}_absmax"), cdiv(param.numel(), STATE_BLOCKSIZE)
            if packed and not (isinstance(absmax, Tensor) and value.dtype == torch.uint8):
                raise ValueError(f"{where}: {name}_q must be uint8 and come with {name}_absmax, got {list(saved)}")
            if isinstance(absmax, Tensor) and absmax.numel() != blocks:
                raise ValueError(f"{where}: {name}_absmax must have {blocks} elements, got {absmax.numel()}")

    def load(self, index: int, saved: Mapping[str, Any]) -> None:
        """Copy a saved state, torch's or packed, into the slot, for any state_bits; nothing else is allocated.

        Raises ValueError, before anything is written, if check_load does.
        """
        self.check_load(index, saved)
        saved = local_state(self.params[index], saved)
        views = self._flat_views(index)
        views["step"].fill_(float(saved["step"]))
        for name, signed in STATES.items():
            is_packed = f"{name}_q" in saved
            if name in views:
                value = saved[name] if not is_packed else self._decoded(index, saved, name)
                self._shaped(index, views[name]).copy_(value)
                continue
            if is_packed:
                packed, absmax = saved[f"{name}_q"].view(-1), saved[f"{name}_absmax"]
            else:
                values, absmax = self._encodable(index, saved, name), saved.get(f"{name}_absmax")
                packed, absmax = quantize_blockwise(values, signed=signed, absmax=absmax)
            views[f"{name}_q"].copy_(packed)
            views[f"{name}_absmax"].copy_(absmax)

    def _decoded(self, index: int, packed: Mapping[str, Any], name: str) -> Tensor:
        values = dequantize_blockwise(packed[f"{name}_q"], packed[f"{name}_absmax"], signed=STATES[name])
        return self._shaped(index, values)

    def _encodable(self, index: int, saved: Mapping[str, Any], name: str) -> Tensor:
        """Return the state as fp32 [numel] in memory order, with zero for values without an 8-bit code."""
        values = [saved[each] for each in STATES if each in saved]
        finite = torch.stack([value.isfinite() for value in values]).all(dim=0)
        value = torch.where(finite, saved[name].to(torch.float32), 0.0)
        laid_out = torch.empty_strided(self.shapes[index], self.strides[index], device=value.device).copy_(value)
        return laid_out.as_strided((laid_out.numel(),), (1,))

    def _whole(self, index: int, flat: Tensor) -> Tensor:
        """Return the elements as _shaped does; as a DTensor over that memory if the parameter is a DTensor."""
        return as_part_of(self.params[index], self._shaped(index, flat))

    def _shaped(self, index: int, flat: Tensor) -> Tensor:
        """Return elements in memory order as a view of the parameter's shape."""
        return flat.as_strided(self.shapes[index], self.strides[index], flat.storage_offset())

    def _flat_views(self, index: int) -> dict[str, Tensor]:
        """Return each state of a parameter, flat, as a view of the arena; the step is a view of `steps`."""
        slot = self.slots[index]
        spans = slot.spans(0, slot.numel)
        views = {"step": self.steps[index : index + 1]}
        for place, name in enumerate(STATES):
            if slot.bits == 8:
                views[f"{name}_q"] = self._view(spans[place], torch.uint8)
                views[f"{name}_absmax"] = self._view(spans[place + 2], torch.float32)
            else:
                views[name] = self._view(spans[place], torch.float32)
        return views

    def _view(self, span: tuple[int, int], dtype: torch.dtype) -> Tensor:
        offset, nbytes = span
        return self.memory.arena[offset : offset + nbytes].view(dtype)


def _own_storage(flat: Tensor) -> Tensor:
    """Return a tensor over the same memory whose storage is only that memory."""
    return dlpack.from_dlpack(dlpack.to_dlpack(flat))  # type: ignore[attr-defined]
