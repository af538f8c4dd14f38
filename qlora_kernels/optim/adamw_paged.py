"""PagedAdamW: torch's AdamW with its states in one arena, which can be paged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import is_
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from ..ops.adamw_step import Step, run_adamw_step
from ..ops.tensor_memory import check_memory
from .managed_memory import cuda_memory
from .mapped_memory import MappedMemory
from .paging_plan import plan_chunks, plan_slots
from .paging_report import PagingReport
from .parameter_rules import HYPERPARAMETERS, check_flags, check_group, check_param
from .shards import is_dtensor, local, total_norm
from .state_arena import StateArena
from .state_memory import ResidentMemory, StateMemory
from .state_watch import StateWatch

CHUNK_BYTES = 32 << 20
"""Bytes of state per chunk of a paged arena; large enough to use the full bandwidth of a disk or PCIe."""

LOOK_AHEAD = 2
"""Number of chunks that are fetched in advance while one is updated."""

COUNTERS_PER_ARENA = 1 << 40
"""Stride between the random counters of arenas, so that their stochastic rounding draws from disjoint ranges."""


class PagedAdamW(Optimizer):
    """AdamW with decoupled weight decay before the update; fp32 parameters are bit-equal to torch.optim.AdamW's.

    params, lr, betas, eps, weight_decay, maximize: as for torch.optim.AdamW; `lr` may be a tensor of one element.
    state_bits: 32; or 8 for block-wise quantized states (format/blockwise8.py), except for parameters of fewer than
    4096 elements, which keep 32.
    max_grad_norm: clip the norm over all gradients as clip_grad_norm_ would before step(), without writing the
    gradients.
    stochastic_rounding: round updated bf16 parameters up or down at random instead of to nearest, so that updates below
    their precision accumulate on average. The numbers are drawn from torch's generator.
    page_dir: a directory on a disk, for states in a memory-mapped unnamed file; only for parameters on the CPU.
        Raises OSError (ENOSPC) on construction if the disk has no room.

    The states are torch's (`step`, `exp_avg`, `exp_avg_sq`; fp32 also for 16-bit parameters). They are allocated on
    construction for the parameters that require gradients, and appear in `state` from the first step on. On CUDA they
    are in unified memory, otherwise in plain memory or in `page_dir`; load_state_dict copies into them, so that they
    stay paged. The memory is freed by `close()`, at the end of a `with` block, or with the last reference.
    """

    _step_supports_amp_scaling = (
        True  # GradScaler passes grad_scale and found_inf to step() and does not unscale the gradients itself
    )

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
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
        values = (lr, betas, eps, weight_decay, maximize)
        super().__init__(params, dict(zip(HYPERPARAMETERS, values, strict=True)))
        self._replan_if_edited()

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
        self._planned: list[list[Tensor]] = []  # the params of each group at the time the chunks were planned
        self._watch = StateWatch()
        self._closed = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does. Its states get an arena of their own; groups given at construction share one."""
        started = bool(self._planned)
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
            if started:
                self._replan_if_edited()
        except Exception:
            del self.param_groups[-1]
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient. Returns the closure's loss."""
        self._check_open("step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._follow_changes()
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if is_dtensor(found_inf):
            found_inf = found_inf.full_tensor()
        if found_inf is not None and found_inf.device.type == "cpu":
            if found_inf.item() != 0:
                return loss
            found_inf = None
        grads_of = {arena: arena.grads() for arena in self._arenas}
        chunks_of = {arena: arena.active_chunks(grads) for arena, grads in grads_of.items()}
        several = sum(map(len, chunks_of.values())) > 1
        if several:  # a single kernel call makes this check before it writes anything
            for arena, grads in grads_of.items():
                stepped = [(p, g) for p, g in zip(arena.tensors(), grads, strict=True) if g is not None]
                check_memory("PagedAdamW", stepped)
        multiplier = self._grad_multiplier(grads_of)
        seeds: dict[torch.device, Tensor] = {}
        for arena, grads in grads_of.items():
            steps = None if several else arena.steps.clone()
            self._count_step(arena, grads, found_inf)
            try:
                self._update(arena, chunks_of[arena], grads, multiplier, found_inf, seeds)
            except Exception:
                if steps is not None:
                    arena.steps.copy_(steps)
                raise
            self._show_first_states(arena, grads)
        return loss

    def _follow_changes(self) -> None:
        """Adopt changes since the last step to groups, their flags, parameters and states."""
        for group in self.param_groups:
            check_flags(group)
        self._replan_if_edited()
        if any(param.grad is not None for param in self._unplaced):
            self._reserve(lambda param: param.grad is not None)
        for arena in self._arenas:
            for index in arena.follow():
                if index not in arena.unstepped:
                    arena.show(index, self.state[arena.params[index]])
                    self._watch.look(self.state)
        if not self._watch.is_unchanged(self.state):
            self._take_states()

    def _replan_if_edited(self) -> None:
        """Plan the chunks of each arena again if the parameter lists of the groups were edited."""
        if _same_items(self._planned, [group["params"] for group in self.param_groups]):
            return
        params = self._all_params()
        if len(set(params)) != len(params):
            raise ValueError("PagedAdamW: a parameter must occur once in all groups, got one that occurs twice")
        group_of = {param: index for index, group in enumerate(self.param_groups) for param in group["params"]}
        for arena in self._arenas:
            arena.memory.settle()
            groups = [group_of.get(param) for param in arena.params]
            arena.members = {index for index, group in enumerate(groups) if group is not None}
            arena.memory.replan(plan_chunks(arena.slots, groups, self._chunk_bytes(arena.device)))
        self._reserve(lambda param: param.requires_grad and not param.is_meta)
        self._planned = [list(group["params"]) for group in self.param_groups]

    def _take_states(self) -> None:
        """Copy edited entries of `state` into the arenas, and reset states that were removed."""
        self._reserve(lambda param: bool(self.state.get(param)))
        taken = {
            param: entry
            for param, entry in self.state.items()
            if entry and param in self._places and not self._watch.holds(param, entry)
        }
        self._load(taken)
        for param, (arena, index) in self._places.items():
            if not self.state.get(param) and index not in arena.unstepped:
                arena.clear(index)
                arena.unstepped.add(index)
        self._watch.look(self.state)

    def _load(self, states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Copy states into the arenas, all of them or none, and show them in `state`."""
        for param, entry in states.items():
            arena, index = self._places[param]
            arena.check_load(index, entry)
        copies = {}  # of arena tensors in another parameter's entry, which could be overwritten before they are read
        for param, entry in states.items():
            copies[param] = {
                name: value.clone() if any(arena.owns(value) for arena in self._arenas) else value
                for name, value in entry.items()
            }
        for param, entry in copies.items():
            arena, index = self._places[param]
            arena.load(index, entry)
            arena.unstepped.discard(index)
            shown = self.state.setdefault(param, entry)
            arena.show(index, shown)

    def _count_step(self, arena: StateArena, grads: Sequence[Tensor | None], found_inf: Tensor | None) -> None:
        increment: float | Tensor = 1.0 if found_inf is None else 1.0 - found_inf.to(arena.steps.device)
        absent = [index for index, grad in enumerate(grads) if grad is None]
        if absent:
            active = torch.ones(len(grads))
            active[absent] = 0.0
            increment = active.to(arena.steps.device) * increment
        arena.steps.add_(increment)

    def _show_first_states(self, arena: StateArena, grads: Sequence[Tensor | None]) -> None:
        first = [index for index in arena.unstepped if grads[index] is not None]
        for index in first:
            arena.show(index, self.state.setdefault(arena.params[index], {}))
        if first:
            arena.unstepped.difference_update(first)
            self._watch.look(self.state)

    def _update(
        self,
        arena: StateArena,
        active: Sequence[int],
        grads: list[Tensor | None],
        multiplier: Tensor | None,
        found_inf: Tensor | None,
        seeds: dict[torch.device, Tensor],
    ) -> None:
        device, params = arena.device, arena.tensors()
        if self.stochastic_rounding and device not in seeds:
            seeds[device] = torch.randint(-(1 << 63), (1 << 63) - 1, (1,), device=device)
        multiplier = None if multiplier is None else multiplier.to(device, non_blocking=True)
        found_inf = None if found_inf is None else found_inf.to(device, non_blocking=True)

        def update(chunk: Any, arena_bytes: Tensor, segments: Tensor) -> None:
            group = self.param_groups[chunk.group]
            own = multiplier
            if group["maximize"]:
                own = torch.full((1,), -1.0, device=device) if own is None else -own
            lr = group["lr"] if isinstance(group["lr"], Tensor) else torch.tensor(group["lr"], dtype=torch.float64)
            here = slice(chunk.first_param, chunk.last_param + 1)
            run_adamw_step(
                Step(
                    params[here],
                    grads[here],
                    arena_bytes,
                    arena.steps[here],
                    segments,
                    lr,
                    seeds.get(device),
                    own,
                    found_inf,
                    beta1=float(group["betas"][0]),
                    beta2=float(group["betas"][1]),
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                )
            )

        arena.memory.run(active, update)
        if not torch.is_inference_mode_enabled():
            increment_version([param for param, grad in zip(params, grads, strict=True) if grad is not None])

    def _grad_multiplier(self, grads_of: Mapping[StateArena, Sequence[Tensor | None]]) -> Tensor | None:
        """Return the factor for the gradients, fp32 on the device: GradScaler's 1 / scale times the clipping factor."""
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        multiplier = None if grad_scale is None else grad_scale.double().reciprocal().float()
        # For a DTensor, its gradient is taken as a DTensor, so that the norm covers all of its parts.
        grads = [
            part if param.grad is None or not is_dtensor(param) else param.grad
            for arena, parts in grads_of.items()
            for param, part in zip(arena.params, parts, strict=True)
            if part is not None
        ]
        if self.max_grad_norm is None or not grads:
            return multiplier
        norm = total_norm(grads)
        if multiplier is not None:
            norm = norm * multiplier.to(norm.device)
        clip = (self.max_grad_norm / (norm.float() + 1e-6)).clamp(max=1.0)
        return clip if multiplier is None else clip * multiplier.to(clip.device)

    def state_dict(self) -> dict[str, Any]:
        """Return torch.optim.AdamW's state_dict.

        8-bit states are decoded to fp32 and accompanied by `<name>_absmax`, with which loading here is exact. 32-bit
        states are views, not copies.
        """

        def decode(optimizer: Optimizer, packed: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
            params, state = self._all_params(), {}
            for key, value in packed["state"].items():
                place = self._places.get(params[key]) if isinstance(key, int) and value else None
                state[key] = value if place is None else place[0].torch_state_of(place[1], value)
            return {**packed, "state": state}

        hook = self.register_state_dict_post_hook(decode, prepend=True)  # users' hooks get the decoded states
        try:
            return self.packed_state_dict()
        finally:
            hook.remove()

    def packed_state_dict(self) -> dict[str, Any]:
        """Return the state_dict with 8-bit states as `<name>_q` and `<name>_absmax`, for io.save_training_state.

        They are views of the arena. load_state_dict accepts both forms.
        """
        self._check_open("state_dict")
        self._settle()
        if not self._watch.is_unchanged(self.state):
            self._take_states()
        return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy a state_dict of PagedAdamW or of torch.optim.AdamW into the arena, which stays paged.

        Raises ValueError for groups or shapes that do not fit, and for unsupported flags, before anything is changed.
        """
        self._check_open("load_state_dict")
        self._settle()
        saved: dict[str, Any] = {}

        # torch checks and replaces the groups, and runs the user's hooks. The two hooks below skip torch's default of
        # copying the states to the device in the parameter's dtype.
        def take_states(optimizer: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG001
            self._check_incoming(incoming)
            saved.update(incoming)
            return {**incoming, "state": {}}

        def place_states(optimizer: Optimizer) -> None:  # noqa: ARG001
            params = dict(zip(_numbers(saved), self._all_params(), strict=True))
            self._place({params[i]: state for i, state in saved["state"].items() if i in params and state})
            self.state.update({key: value for key, value in saved["state"].items() if key not in params})
            self._watch.look(self.state)

        hooks = (
            self.register_load_state_dict_pre_hook(take_states),
            self.register_load_state_dict_post_hook(place_states, prepend=True),
        )
        try:
            super().load_state_dict(dict(state_dict))
        finally:
            for hook in hooks:
                hook.remove()

    def _check_incoming(self, incoming: Mapping[str, Any]) -> None:
        groups = incoming["param_groups"]
        sizes = [[len(group["params"]) for group in each] for each in (groups, self.param_groups)]
        if sizes[0] != sizes[1]:
            return  # torch raises its own error
        for group, own in zip(groups, self.param_groups, strict=True):
            check_group({**self.defaults, **group, "params": own["params"]})
        params = dict(zip(_numbers(incoming), self._all_params(), strict=True))
        states = {params[i]: state for i, state in incoming["state"].items() if i in params and state}
        self._replan_if_edited()
        self._reserve(lambda param: param in states)
        for param, state in states.items():
            arena, index = self._places[param]
            arena.check_load(index, state)

    def _place(self, states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Write `states` into the arenas and clear all other states."""
        self._replan_if_edited()
        self._reserve(lambda param: param in states)
        self.state.clear()
        self._load(states)
        for param, (arena, index) in self._places.items():
            if param not in states and index not in arena.unstepped:
                arena.clear(index)
                arena.unstepped.add(index)
        self._watch.look(self.state)

    def paging_report(self) -> PagingReport:
        """Return the bytes of states that are resident, paged out, and were prefetched."""
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
        """Free the states. The parameters are kept; step() and state_dict() raise afterwards. May be called twice."""
        self.state.clear()
        self._watch.look(self.state)
        self._arenas.clear()
        self._places.clear()
        self._unplaced.clear()
        self._closed = True

    def __enter__(self) -> PagedAdamW:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        self._check_process()
        self._settle()
        options = (self.state_bits, self.max_grad_norm, self.stochastic_rounding, self.page_dir)
        return {**super().__getstate__(), "options": options}

    def __setstate__(self, state: dict[str, Any]) -> None:
        options = state.pop("options", None)
        super().__setstate__(state)
        for group in self.param_groups:
            for name in HYPERPARAMETERS:
                group.setdefault(name, self.defaults.get(name, False))
        if options is not None:  # unpickled or deep-copied: move the states into arenas
            self._set_options(*options)
            self._place({param: entry for param, entry in self.state.items() if entry})

    def _all_params(self) -> list[Tensor]:
        return [param for group in self.param_groups for param in group["params"]]

    def _settle(self) -> None:
        for arena in self._arenas:
            arena.memory.settle()

    def _check_open(self, method: str) -> None:
        if self._closed:
            raise RuntimeError(f"PagedAdamW.{method}: the optimizer is closed")
        self._check_process()

    def _check_process(self) -> None:
        for arena in self._arenas:
            if isinstance(arena.memory, MappedMemory):
                arena.memory.check_process()

    def _chunk_bytes(self, device: torch.device) -> int | None:
        return CHUNK_BYTES if self.page_dir is not None or device.type == "cuda" else None

    def _reserve(self, wanted: Callable[[Tensor], bool]) -> None:
        """Allocate one more arena for each device with wanted parameters that have no slot yet."""
        missing: dict[torch.device, list[tuple[int, Tensor]]] = {}
        made: list[StateArena] = []
        for group, param_group in enumerate(self.param_groups):
            for param in param_group["params"]:
                if param not in self._places and wanted(param):
                    check_param(param)
                    missing.setdefault(param.device, []).append((group, param))
        for device, entries in missing.items():
            groups, params = zip(*entries, strict=True)
            counter = (len(self._arenas) + len(made)) * COUNTERS_PER_ARENA
            slots, nbytes = plan_slots(
                [local(param).numel() for param in params], self.state_bits, first_counter=counter
            )
            chunks = plan_chunks(slots, groups, self._chunk_bytes(device))
            made.append(StateArena(params, slots, self._memory(nbytes, chunks, device)))
        self._arenas += made
        for arena in made:
            self._places.update({param: (arena, index) for index, param in enumerate(arena.params)})
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
    """PagedAdamW with 8-bit states: the default of state_bits is 8."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
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
            maximize=maximize,
            state_bits=8,
            max_grad_norm=max_grad_norm,
            stochastic_rounding=stochastic_rounding,
            page_dir=page_dir,
        )


def _same_items(planned: list[list[Tensor]], current: list[list[Tensor]]) -> bool:
    return len(planned) == len(current) and all(
        len(a) == len(b) and all(map(is_, a, b)) for a, b in zip(planned, current, strict=True)
    )


def _numbers(state_dict: Mapping[str, Any]) -> list[Any]:
    """Return a state dict's parameter numbers, in order."""
    return [number for group in state_dict["param_groups"] for number in group["params"]]
