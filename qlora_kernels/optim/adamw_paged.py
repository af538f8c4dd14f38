"""PagedAdamW: torch's AdamW with its states in one arena, which can be paged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..ops.tensor_memory import check_memory
from .adamw_update import count_step, grad_multiplier, update_arena
from .managed_memory import cuda_memory
from .mapped_memory import MappedMemory
from .paging_report import PagingReport
from .parameter_rules import HYPERPARAMETERS, check_flags, check_group
from .shards import is_dtensor
from .state_memory import ResidentMemory, StateMemory
from .state_placement import StatePlacement, params_of

LOOK_AHEAD = 2
"""Number of chunks that are fetched in advance while one is updated."""


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
    Raises ValueError, naming the argument, for a value out of its range or a group with an option that is not
    supported.
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
        self._placement.replan_if_edited(self.param_groups, self._memory)

    def _set_options(
        self, state_bits: int, max_grad_norm: float | None, stochastic_rounding: bool, page_dir: str | Path | None
    ) -> None:
        self.state_bits = state_bits
        self.max_grad_norm = max_grad_norm
        self.stochastic_rounding = stochastic_rounding
        self.page_dir = page_dir
        self._placement = StatePlacement(state_bits, page_dir)
        self._closed = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch does. Its states get an arena of their own; groups given at construction share one."""
        started = bool(self._placement.planned)
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
            if started:
                self._placement.replan_if_edited(self.param_groups, self._memory)
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
        grads_of = {arena: arena.grads() for arena in self._placement.arenas}
        chunks_of = {arena: arena.active_chunks(grads) for arena, grads in grads_of.items()}
        several = sum(map(len, chunks_of.values())) > 1
        if several:  # a single kernel call makes this check before it writes anything
            for arena, grads in grads_of.items():
                stepped = [(p, g) for p, g in zip(arena.tensors(), grads, strict=True) if g is not None]
                check_memory("PagedAdamW", stepped)
        multiplier = grad_multiplier(grads_of, getattr(self, "grad_scale", None), self.max_grad_norm)
        seeds: dict[torch.device, Tensor] = {}
        for arena, grads in grads_of.items():
            steps = None if several else arena.steps.clone()
            count_step(arena, grads, found_inf)
            try:
                if self.stochastic_rounding and arena.device not in seeds:
                    seeds[arena.device] = torch.randint(-(1 << 63), (1 << 63) - 1, (1,), device=arena.device)
                update_arena(
                    arena,
                    chunks_of[arena],
                    grads,
                    self.param_groups,
                    multiplier=multiplier,
                    found_inf=found_inf,
                    seed=seeds.get(arena.device),
                )
            except Exception:
                if steps is not None:
                    arena.steps.copy_(steps)
                raise
            self._placement.show_first_states(arena, grads, self.state)
        return loss

    def _follow_changes(self) -> None:
        """Adopt changes since the last step to groups, their flags, parameters and states."""
        for group in self.param_groups:
            check_flags(group)
        self._placement.follow(self.param_groups, self.state, self._memory)

    def state_dict(self) -> dict[str, Any]:
        """Return torch.optim.AdamW's state_dict.

        8-bit states are decoded to fp32 and accompanied by `<name>_absmax`, with which loading here is exact. 32-bit
        states are views, not copies.
        """

        def decode(_optimizer: Optimizer, packed: dict[str, Any]) -> dict[str, Any]:
            params, state = params_of(self.param_groups), {}
            for key, value in packed["state"].items():
                place = self._placement.places.get(params[key]) if isinstance(key, int) and value else None
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
        self._placement.settle()
        if not self._placement.watch.is_unchanged(self.state):
            self._placement.take_states(self.param_groups, self.state, self._memory)
        return super().state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy a state_dict of PagedAdamW or of torch.optim.AdamW into the arena, which stays paged.

        Raises ValueError for groups or shapes that do not fit, and for unsupported flags, before anything is changed.
        """
        self._check_open("load_state_dict")
        self._placement.settle()
        saved: dict[str, Any] = {}

        # torch checks and replaces the groups, and runs the user's hooks. The two hooks below skip torch's default of
        # copying the states to the device in the parameter's dtype.
        def take_states(_optimizer: Optimizer, incoming: dict[str, Any]) -> dict[str, Any]:
            self._check_incoming(incoming)
            saved.update(incoming)
            return {**incoming, "state": {}}

        def place_states(_optimizer: Optimizer) -> None:
            params = dict(zip(_numbers(saved), params_of(self.param_groups), strict=True))
            self._replace_states({params[i]: state for i, state in saved["state"].items() if i in params and state})
            self.state.update({key: value for key, value in saved["state"].items() if key not in params})
            self._placement.watch.look(self.state)

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
        sizes = [[len(group["params"]) for group in those] for those in (groups, self.param_groups)]
        if sizes[0] != sizes[1]:
            return  # torch raises its own error
        for group, own in zip(groups, self.param_groups, strict=True):
            check_group({**self.defaults, **group, "params": own["params"]})
        params = dict(zip(_numbers(incoming), params_of(self.param_groups), strict=True))
        states = {params[i]: state for i, state in incoming["state"].items() if i in params and state}
        self._placement.check_load(self.param_groups, states, self._memory)

    def _replace_states(self, states: Mapping[Tensor, Mapping[str, Any]]) -> None:
        self._placement.replace_states(self.param_groups, self.state, states, self._memory)

    def paging_report(self) -> PagingReport:
        """Return the bytes of states that are resident, paged out, and were prefetched."""
        arenas = self._placement.arenas
        memories = [arena.memory for arena in arenas]
        state_bytes = sum(memory.arena.nbytes for memory in memories)
        sizes = [memory.resident_bytes() for memory in memories]
        resident = None if None in sizes else sum(size for size in sizes if size is not None)
        return PagingReport(
            kinds=tuple(memory.kind for memory in memories),
            parameters=sum(slot.numel for arena in arenas for slot in arena.slots),
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
        self._placement.watch.look(self.state)
        self._placement.close()
        self._closed = True

    def __enter__(self) -> PagedAdamW:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        self._placement.check_process()
        self._placement.settle()
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
            self._replace_states({param: entry for param, entry in self.state.items() if entry})

    def _check_open(self, method: str) -> None:
        if self._closed:
            raise RuntimeError(
                f"PagedAdamW.{method}: must be called before close(), got a call when the optimizer is closed; make "
                "a new one"
            )
        self._placement.check_process()

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


def _numbers(state_dict: Mapping[str, Any]) -> list[Any]:
    """Return a state dict's parameter numbers, in order."""
    return [number for group in state_dict["param_groups"] for number in group["params"]]
