"""One step of AdamW over the parameters of an arena: the factor of the gradients, the step counts and the updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..ops.adamw_step import Step, run_adamw_step
from .shards import is_dtensor, total_norm
from .state_arena import StateArena


def grad_multiplier(
    grads_of: Mapping[StateArena, Sequence[Tensor | None]], grad_scale: Tensor | None, max_grad_norm: float | None
) -> Tensor | None:
    """Return the factor for the gradients, fp32 on the device: GradScaler's 1 / scale times the clipping factor."""
    multiplier = None if grad_scale is None else grad_scale.double().reciprocal().float()
    # For a DTensor, its gradient is taken as a DTensor, so that the norm covers all of its parts.
    grads = [
        part if param.grad is None or not is_dtensor(param) else param.grad
        for arena, parts in grads_of.items()
        for param, part in zip(arena.params, parts, strict=True)
        if part is not None
    ]
    if max_grad_norm is None or not grads:
        return multiplier
    norm = total_norm(grads)
    if multiplier is not None:
        norm = norm * multiplier.to(norm.device)
    clip = (max_grad_norm / (norm.float() + 1e-6)).clamp(max=1.0)
    return clip if multiplier is None else clip * multiplier.to(clip.device)


def count_step(arena: StateArena, grads: Sequence[Tensor | None], found_inf: Tensor | None) -> None:
    """Add one to the step counts of the parameters that have a gradient, unless found_inf is not zero."""
    increment: float | Tensor = 1.0 if found_inf is None else 1.0 - found_inf.to(arena.steps.device)
    absent = [index for index, grad in enumerate(grads) if grad is None]
    if absent:
        active = torch.ones(len(grads))
        active[absent] = 0.0
        increment = active.to(arena.steps.device) * increment
    arena.steps.add_(increment)


def update_arena(
    arena: StateArena,
    active: Sequence[int],
    grads: list[Tensor | None],
    groups: Sequence[Mapping[str, Any]],
    *,
    multiplier: Tensor | None,
    found_inf: Tensor | None,
    seed: Tensor | None,
) -> None:
    """Update the parameters of the arena's active chunks.

    active: numbers of the chunks with a gradient.   grads: one entry for each parameter of the arena.
    groups: the optimizer's param_groups.   multiplier: factor of the gradients.   seed: for stochastic rounding, on the
    arena's device.
    """
    device, params = arena.device, arena.tensors()
    multiplier = None if multiplier is None else multiplier.to(device, non_blocking=True)
    found_inf = None if found_inf is None else found_inf.to(device, non_blocking=True)

    def update(chunk: Any, arena_bytes: Tensor, segments: Tensor) -> None:
        group = groups[chunk.group]
        chunk_multiplier = multiplier
        if group["maximize"]:
            chunk_multiplier = torch.full((1,), -1.0, device=device) if multiplier is None else -multiplier
        lr = group["lr"] if isinstance(group["lr"], Tensor) else torch.tensor(group["lr"], dtype=torch.float64)
        of_chunk = slice(chunk.first_param, chunk.last_param + 1)
        run_adamw_step(
            Step(
                params[of_chunk],
                grads[of_chunk],
                arena_bytes,
                arena.steps[of_chunk],
                segments,
                lr,
                seed,
                chunk_multiplier,
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
