"""PagedAdamW: torch's AdamW with its states in one arena, paged where the device or the user asks for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from ..ops.adamw_step import Step, run_adamw_step
from .managed_memory import cuda_memory
from .mapped_memory import MappedMemory
from .paging_plan import plan_chunks, plan_slots
from .state_arena import DTYPES, StateArena
from .state_memory import ResidentMemory, StateMemory

CHUNK_BYTES = 32 << 20
"""State per chunk of a paged arena: long enough to saturate a disk or PCIe, short against any memory worth saving."""

LOOK_AHEAD = 2
"""Chunks that are fetched while one is computed."""

COUNTERS_PER_ARENA = 1 << 40
"""Arenas draw their stochastic rounding from disjoint counts."""

_HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")


@dataclass(frozen=True)
class PagingReport:
    """Where the states are, in bytes. `print(report)` shows it in a line."""

    kinds: tuple[str, ...]
    """Of each arena: resident, mapped, managed or staged."""
    parameters: int
    state_bytes: int
    resident_bytes: int | None
    """In the memory where they are used; None where the system does not say."""
    paged_bytes: int | None
    """The rest: on disk, or on the host's side of unified memory."""
    prefetched_bytes: int
    """Fetched ahead of their use since the optimizer was made."""
    chunks: int
    look_ahead: int

    def __str__(self) -> str:
        resident = "unknown" if self.resident_bytes is None else f"{self.resident_bytes:,}"
        return (
            f"{self.state_bytes:,} bytes of states for {self.parameters:,} parameters in {self.chunks} chunks "
            f"({', '.join(self.kinds) or 'none'}): {resident} resident, {self.prefetched_bytes:,} prefetched"
        )


class PagedAdamW(Optimizer):
    """AdamW with decoupled decay before the update, as torch.optim.AdamW, fp32 parameters bit-equal to it.

    params, lr, betas, eps, weight_decay: as torch.optim.AdamW's; `lr` may be a tensor of one element.
    state_bits: 32, or 8: block-wise quantized states (format/blockwise8.py), but 32 for parameters of fewer than 4096
        elements.
    max_grad_norm: clip the norm over all gradients, as clip_grad_norm_ would before step(), without writing them.
    stochastic_rounding: round updated bf16 parameters up or down by chance instead of to nearest, so that updates below
        their precision are not lost but accumulate on average. The draws come from torch's generator.
    page_dir: a directory on a disk, for states in a memory-mapped unnamed file; parameters on the CPU only.
        Raises OSError (ENOSPC) here and now if the disk has no room.

    States are torch's (`step`, `exp_avg`, `exp_avg_sq`; fp32 for 16-bit parameters too), made for the parameters that
    require gradients, once, when the optimizer is made, and shown in `state` from the first step on. On CUDA they lie
    in unified memory, else in plain memory or in `page_dir`; load_state_dict copies into them, so they stay paged.
    Memory is freed by `close()`, at the end of a `with` block, or with the last reference.
    """

    _step_supports_amp_scaling = True  # GradScaler hands over grad_scale and found_inf instead of a pass of its own

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int = 32,
        max_grad_norm: float | None = None,
        stochastic_rounding: bool = False,
        page_dir: str | Path | None = None,
    ) -> None:
        if state_bits not in (8, 32):
            raise ValueError(f"PagedAdamW: state_bits must be 8 or 32, got {state_bits}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"PagedAdamW: max_grad_norm must be positive or None, got {max_grad_norm}")
        self._set_options(state_bits, max_grad_norm, stochastic_rounding, page_dir)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._reserve(lambda param: param.requires_grad)

    def _set_options(
        self, state_bits: int, max_grad_norm: float | None, stochastic_rounding: bool, page_dir: str | Path | None
    ) -> None:
        self.state_bits = state_bits
        self.max_grad_norm = max_grad_norm
        self.stochastic_rounding = stochastic_rounding
        self.page_dir = page_dir
        self._arenas: list[StateArena] = []
        self._places: dict[Tensor, tuple[StateArena, int]] = {}
        self._unplaced: list[Tensor] = []
        self._closed = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. The group's states get an arena of their own; `params` given at first share one per device."""
        started = hasattr(self, "param_groups") and bool(self._arenas)
        super().add_param_group(param_group)
        _check_group(self.param_groups[-1])
        if started:
            self._reserve(lambda param: param.requires_grad)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Returns the closure's loss."""
        self._check_open("step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(param.grad is not None for param in self._unplaced):
            self._reserve(lambda param: param.grad is not None)

        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if found_inf is not None and found_inf.device.type == "cpu":
            if found_inf.item() != 0:
                return loss
            found_inf = None
        grads_of = {arena: arena.grads() for arena in self._arenas}
        multiplier = self._grad_multiplier([g for grads in grads_of.values() for g in grads if g is not None])
        seeds: dict[torch.device, Tensor] = {}
        for arena, grads in grads_of.items():
            self._count_step(arena, grads, found_inf)
            self._update(arena, grads, multiplier, found_inf, seeds)
        return loss

    def _count_step(self, arena: StateArena, grads: Sequence[Tensor | None], found_inf: Tensor | None) -> None:
        increment: float | Tensor = 1.0 if found_inf is None else 1.0 - found_inf.to(arena.steps.device)
        absent = [index for index, grad in enumerate(grads) if grad is None]
        if absent:
            active = torch.ones(len(grads))
            active[absent] = 0.0
            increment = active.to(arena.steps.device) * increment
        arena.steps.add_(increment)
        for index in arena.unstepped.difference(absent):
            self.state[arena.params[index]] = arena.state_of(index)
        arena.unstepped.intersection_update(absent)

    def _update(
        self,
        arena: StateArena,
        grads: list[Tensor | None],
        multiplier: Tensor | None,
        found_inf: Tensor | None,
        seeds: dict[torch.device, Tensor],
    ) -> None:
        device = arena.params[0].device
        if self.stochastic_rounding and device not in seeds:
            seeds[device] = torch.randint(-(1 << 63), (1 << 63) - 1, (1,), device=device)
        multiplier = None if multiplier is None else multiplier.to(device, non_blocking=True)
        found_inf = None if found_inf is None else found_inf.to(device, non_blocking=True)

        def update(chunk: Any, arena_bytes: Tensor, segments: Tensor) -> None:
            group = self.param_groups[chunk.group]
            lr = group["lr"] if isinstance(group["lr"], Tensor) else torch.tensor(group["lr"], dtype=torch.float64)
            here = slice(chunk.first_param, chunk.last_param + 1)
            run_adamw_step(
                Step(
                    arena.params[here],
                    grads[here],
                    arena_bytes,
                    arena.steps[here],
                    segments,
                    lr,
                    seeds.get(device),
                    multiplier,
                    found_inf,
                    beta1=float(group["betas"][0]),
                    beta2=float(group["betas"][1]),
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                )
            )

        arena.memory.run(arena.active_chunks(grads), update)

    def _grad_multiplier(self, grads: list[Tensor]) -> Tensor | None:
        """What the kernel multiplies gradients by: GradScaler's 1 / scale times the clip; fp32, on the device."""
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        multiplier = None if grad_scale is None else grad_scale.double().reciprocal().float()
        if self.max_grad_norm is None or not grads:
            return multiplier
        norm = get_total_norm(grads)
        if multiplier is not None:
            norm = norm * multiplier.to(norm.device)
        clip = (self.max_grad_norm / (norm.float() + 1e-6)).clamp(max=1.0)
        return clip if multiplier is None else clip * multiplier.to(clip.device)

    def state_dict(self) -> dict[str, Any]:
        """torch.optim.AdamW's state_dict. 8-bit states are decoded to fp32, beside `<name>_absmax`, which makes loading
        them here again exact; 32-bit states are views, not copies.
        """
        packed = self.packed_state_dict()
        params = self._all_params()
        state = {}
        for key, value in packed["state"].items():
            arena, index = self._places[params[key]]
            state[key] = arena.torch_state_of(index, value)
        return {**packed, "state": state}

    def packed_state_dict(self) -> dict[str, Any]:
        """As state_dict, but 8-bit states stay 8-bit (`<name>_q`, `<name>_absmax`): views of the arena, for
        io.save_training_state. load_state_dict takes both.
        """
        self._check_open("state_dict")
        self._settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy a state_dict of PagedAdamW or of torch.optim.AdamW into the arena: the states are as paged as before.

        Raises ValueError for groups or shapes that do not fit, and for amsgrad or maximize, which are not offered.
        """
        self._check_open("load_state_dict")
        saved: dict[str, Any] = {}

        # torch checks and replaces the groups, and runs the user's hooks around that. Its own copy of the states, which
        # would lie on the device, cast to the parameter's dtype, is what the two hooks go round.
        def take_states(optimizer: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            for group in incoming["param_groups"]:
                for flag in ("amsgrad", "maximize"):
                    if group.get(flag):
                        raise ValueError(f"PagedAdamW.load_state_dict: {flag} must be false, got {group[flag]}")
            saved.update(incoming)
            return {**incoming, "state": {}}

        def place_states(optimizer: Optimizer) -> None:
            params = dict(
                zip((i for group in saved["param_groups"] for i in group["params"]), self._all_params(), strict=True)
            )
            self._place({params[i]: state for i, state in saved["state"].items()})

        hooks = (
            self.register_load_state_dict_pre_hook(take_states),
            self.register_load_state_dict_post_hook(place_states, prepend=True),
        )
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            for hook in hooks:
                hook.remove()

    def _place(self, states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Write `states` into the arenas and clear all others."""
        self._settle()
        self._reserve(lambda param: param in states)
        self.state.clear()
        for param, (arena, index) in self._places.items():
            if param in states:
                arena.load(index, states[param])
                arena.unstepped.discard(index)
                self.state[param] = arena.state_of(index)
            else:
                arena.clear(index)
                arena.unstepped.add(index)

    def paging_report(self) -> PagingReport:
        """Bytes of states that are resident, paged out, and were prefetched."""
        memories = [arena.memory for arena in self._arenas]
        state_bytes = sum(memory.arena.nbytes for memory in memories)
        each = [memory.resident_bytes() for memory in memories]
        resident = None if None in each else sum(size for size in each if size is not None)
        return PagingReport(
            kinds=tuple(memory.kind for memory in memories),
            parameters=sum(slot.numel for arena in self._arenas for slot in arena.slots),
            state_bytes=state_bytes,
            resident_bytes=resident,
            paged_bytes=None if resident is None else state_bytes - resident,
            prefetched_bytes=sum(memory.prefetched_bytes for memory in memories),
            chunks=sum(len(memory.chunks) for memory in memories),
            look_ahead=LOOK_AHEAD,
        )

    def close(self) -> None:
        """Free the states. The parameters stay; step() and state_dict() raise from now on. May be called twice."""
        self.state.clear()
        self._arenas.clear()
        self._places.clear()
        self._unplaced.clear()
        self._closed = True

    def __enter__(self) -> PagedAdamW:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        options = (self.state_bits, self.max_grad_norm, self.stochastic_rounding, self.page_dir)
        return {**super().__getstate__(), "options": options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        options = state.pop("options", None)
        super().__setstate__(state)
        for group in self.param_groups:
            for name in _HYPERPARAMETERS:
                group.setdefault(name, self.defaults[name])
        if options is not None:  # unpickled or deep-copied: the states become pages again
            self._set_options(*options)
            self._place(dict(self.state))

    def _all_params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _settle(self) -> None:
        for arena in self._arenas:
            arena.memory.settle()

    def _check_open(self, method: str) -> None:
        if self._closed:
            raise RuntimeError(f"PagedAdamW.{method}: the optimizer is closed")

    def _reserve(self, wanted: Callable[[Tensor], bool]) -> None:
        """One more arena for each device that has wanted parameters without a place."""
        missing: dict[torch.device, list[tuple[int, Tensor]]] = {}
        for group, param_group in enumerate(self.param_groups):
            for param in param_group["params"]:
                if param not in self._places and wanted(param):
                    _check_param(param)
                    missing.setdefault(param.device, []).append((group, param))
        for device, entries in missing.items():
            groups, params = zip(*entries, strict=True)
            counter = len(self._arenas) * COUNTERS_PER_ARENA
            slots, nbytes = plan_slots([param.numel() for param in params], self.state_bits, first_counter=counter)
            paged = self.page_dir is not None or device.type == "cuda"
            chunks = plan_chunks(slots, groups, CHUNK_BYTES if paged else None)
            arena = StateArena(params, slots, self._memory(nbytes, chunks, device))
            self._arenas.append(arena)
            self._places.update({param: (arena, index) for index, param in enumerate(params)})
        self._unplaced = [param for param in self._all_params() if param not in self._places]

    def _memory(self, nbytes: int, chunks: tuple[Any, ...], device: torch.device) -> StateMemory:
        if self.page_dir is not None:
            if device.type != "cpu":
                raise ValueError(f"PagedAdamW: page_dir must be None for parameters on {device}, which page without")
            return MappedMemory(nbytes, chunks, self.page_dir, look_ahead=LOOK_AHEAD)
        if device.type == "cuda":
            return cuda_memory(nbytes, chunks, device, look_ahead=LOOK_AHEAD)
        return ResidentMemory(nbytes, chunks, device)


class PagedAdamW8bit(PagedAdamW):
    """PagedAdamW with state_bits=8."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_grad_norm: float | None = None,
        stochastic_rounding: bool = False,
        page_dir: str | Path | None = None,
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            state_bits=8,
            max_grad_norm=max_grad_norm,
            stochastic_rounding=stochastic_rounding,
            page_dir=page_dir,
        )


def _check_group(group: Mapping[str, Any]) -> None:
    def refuse(name: str, rule: str) -> NoReturn:
        raise ValueError(f"PagedAdamW: {name} must {rule}, got {group[name]}")

    if isinstance(group["lr"], Tensor):
        if group["lr"].numel() != 1:
            refuse("lr", "be a number or a tensor of one element")
    elif not 0.0 <= group["lr"] < math.inf:
        refuse("lr", "be finite and >= 0")
    if len(group["betas"]) != 2 or not all(0.0 <= beta < 1.0 for beta in group["betas"]):
        refuse("betas", "be two numbers in [0, 1)")
    for name in ("eps", "weight_decay"):
        if not 0.0 <= group[name] < math.inf:
            refuse(name, "be finite and >= 0")


def _check_param(param: Tensor) -> None:
    if param.dtype not in DTYPES:
        raise TypeError(f"PagedAdamW: parameters must be float32, bfloat16 or float16, got {param.dtype}")
    strides = sorted((stride, size) for stride, size in zip(param.stride(), param.shape, strict=True) if size > 1)
    expected = 1
    for stride, size in strides:
        if stride != expected:
            got = f"shape {tuple(param.shape)} with strides {param.stride()}"
            raise ValueError(f"PagedAdamW: parameters must fill a block of memory, got {got}; use .contiguous()")
        expected *= size
