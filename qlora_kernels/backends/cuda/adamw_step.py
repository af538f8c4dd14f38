"""AdamW by csrc/cuda/adamw_step.cu: one launch, no host synchronization, safe under graph capture."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ...format.quant_state import DTYPE_CODES
from ...ops.adamw_step import Step


def adamw_step(step: Step) -> None:
    """Run the step of ops/adamw_step.py in one launch."""
    rows: list[int] = []
    for param, grad in zip(step.params, step.grads, strict=True):
        rows += (param.data_ptr(), 0 if grad is None else grad.data_ptr(), DTYPE_CODES[param.dtype], param.numel())
    on_device = step.lr.device == step.arena.device
    skipped = torch.empty(0, device=step.arena.device)  # the library skips a parameter whose gradient is empty
    torch.ops.qlora_kernels_C.cuda_adamw_step(
        step.params,
        [skipped if grad is None else grad for grad in step.grads],
        _address_table(step.segments, tuple(rows), step.arena.device),
        step.segments,
        step.steps,
        step.arena,
        step.lr if on_device else None,
        0.0 if on_device else float(step.lr),
        step.seed,
        step.grad_multiplier,
        step.found_inf,
        step.beta1,
        step.beta2,
        step.eps,
        step.weight_decay,
    )


@dataclass
class _Table:
    """The address table that the last step of one chunk used."""

    rows: tuple[int, ...]
    on_host: Tensor  # pinned; a captured graph copies from it at each replay
    on_device: Tensor
    read_by_graph: bool


@dataclass
class _Tables:
    """The address tables of one chunk; those that a captured graph reads are kept while the chunk is planned."""

    last: _Table | None = None
    captured: list[_Table] = field(default_factory=list)


_tables = WeakTensorKeyDictionary()
"""segments tensor of a chunk, owned by its optimizer -> its _Tables."""


def _address_table(segments: Tensor, rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the addresses in device memory; they are copied again only if they differ from those of the last step.

    A table is never overwritten, because a captured graph may read it.
    """
    if device.type == "cpu":
        return torch.tensor(rows, dtype=torch.int64)
    tables: _Tables = _tables.setdefault(segments, _Tables())
    table, capturing = tables.last, torch.cuda.is_current_stream_capturing()
    if table is None or table.rows != rows:
        on_host = torch.tensor(rows, dtype=torch.int64).pin_memory()
        table = tables.last = _Table(rows, on_host, on_host.to(device, non_blocking=True), False)
    if capturing and not table.read_by_graph:
        table.read_by_graph = True
        tables.captured.append(table)
    return table.on_device
