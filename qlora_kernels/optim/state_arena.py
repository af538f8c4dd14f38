"""The parameters of one device and their states: slots of one arena, shown as torch's state tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.adamw_step import dequantize_blockwise, quantize_blockwise
from .paging_plan import Slot
from .state_memory import StateMemory

STATES = {"exp_avg": True, "exp_avg_sq": False}
"""torch's names, and whether the 8-bit map is the signed one."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class StateArena:
    """params[i] has slots[i] in `memory` and steps[i]."""

    def __init__(self, params: Sequence[Tensor], slots: Sequence[Slot], memory: StateMemory) -> None:
        self.params = list(params)
        self.slots = slots
        self.memory = memory
        self.steps = torch.zeros(len(params), dtype=torch.float32, device=params[0].device)
        self.unstepped = set(range(len(params)))
        """Indices of the parameters that no step has updated yet."""

    def grads(self) -> list[Tensor | None]:
        """Each parameter's gradient in the parameter's own memory layout; None where it has none."""
        grads: list[Tensor | None] = []
        for param in self.params:
            grad = param.grad
            if grad is not None:
                if grad.layout is not torch.strided:
                    raise NotImplementedError(
                        f"PagedAdamW: gradients must be dense, got {grad.layout}; use sparse=False in the embedding"
                    )
                if grad.stride() != param.stride():
                    grad = torch.empty_like(param).copy_(grad)
            grads.append(grad)
        return grads

    def active_chunks(self, grads: Sequence[Tensor | None]) -> list[int]:
        """Chunks in which some parameter has a gradient: the others are not even fetched."""
        return [
            index
            for index, chunk in enumerate(self.memory.chunks)
            if any(grad is not None for grad in grads[chunk.first_param : chunk.last_param + 1])
        ]

    def state_of(self, index: int) -> dict[str, Tensor]:
        """`optimizer.state[param]`: views of the arena. An 8-bit state is `<name>_q` and `<name>_absmax`, both flat."""
        slot = self.slots[index]
        spans = slot.spans(0, slot.numel)
        state = {"step": self.steps[index]}
        for place, name in enumerate(STATES):
            if slot.bits == 8:
                state[f"{name}_q"] = self._view(spans[place], torch.uint8)
                state[f"{name}_absmax"] = self._view(spans[place + 2], torch.float32)
            else:
                state[name] = self._shaped(index, self._view(spans[place], torch.float32))
        return state

    def torch_state_of(self, index: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`state` with each 8-bit state decoded under torch's name, beside the absmax that encodes it again exactly."""
        result = {"step": state["step"]}
        for name, signed in STATES.items():
            if name in state:
                result[name] = state[name]
            else:
                absmax = state[f"{name}_absmax"].clone()  # a view would drag the whole arena into torch.save
                result[name] = self._shaped(index, dequantize_blockwise(state[f"{name}_q"], absmax, signed=signed))
                result[f"{name}_absmax"] = absmax
        return result

    def clear(self, index: int) -> None:
        """The state of a parameter that has never been updated."""
        for value in self.state_of(index).values():
            value.zero_()

    def load(self, index: int, saved: Mapping[str, Any]) -> None:
        """Copy a saved state, torch's or packed, into the slot, whichever bits that has; nothing else is allocated."""
        state, param = self.state_of(index), self.params[index]
        state["step"].fill_(float(saved["step"]))
        for name, signed in STATES.items():
            packed = f"{name}_q" in saved
            value = saved[f"{name}_q" if packed else name]
            if value.numel() != param.numel() or not (packed or value.shape == param.shape):
                got = f"{tuple(value.shape)} for a parameter of shape {tuple(param.shape)}"
                raise ValueError(f"PagedAdamW.load_state_dict: {name} must have its parameter's shape, got {got}")
            if packed and name in state:
                value = self._shaped(index, dequantize_blockwise(value, saved[f"{name}_absmax"], signed=signed))
            if name in state:
                state[name].copy_(value)
                continue
            absmax = saved.get(f"{name}_absmax")
            if not packed:
                value, absmax = quantize_blockwise(self._flat(index, value), signed=signed, absmax=absmax)
            if absmax is None:
                raise ValueError(f"PagedAdamW.load_state_dict: {name}_q must come with {name}_absmax")
            state[f"{name}_q"].copy_(value)
            state[f"{name}_absmax"].copy_(absmax)

    def _shaped(self, index: int, flat: Tensor) -> Tensor:
        """Elements in the order of the parameter's memory, as a view of the parameter's shape."""
        param = self.params[index]
        return flat.as_strided(param.shape, param.stride(), flat.storage_offset())

    def _flat(self, index: int, value: Tensor) -> Tensor:
        """The reverse, as a copy: fp32 [numel]."""
        laid_out = torch.empty_like(self.params[index], dtype=torch.float32, device=value.device).copy_(value)
        return laid_out.as_strided((laid_out.numel(),), (1,))

    def _view(self, span: tuple[int, int], dtype: torch.dtype) -> Tensor:
        offset, nbytes = span
        return self.memory.arena[offset : offset + nbytes].view(dtype)
