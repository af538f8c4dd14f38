"""The tables of docs/scaling.md equal the formulas, which checks_fsdp.py compares with gloo processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_kernels.distributed.byte_plan import LLAMA_70B, LLAMA_405B, Rows, held_bytes, nf4_rows, step_bytes

DOCS = Path(__file__).parents[2] / "docs" / "scaling.md"


@pytest.mark.parametrize(("name", "model"), [("70B", LLAMA_70B), ("405B", LLAMA_405B)])
@pytest.mark.parametrize("world", [8, 64])
@pytest.mark.parametrize("nf4", [True, False])
def test_rows_of_the_documentation(name, model, world, nf4):
    plan = step_bytes(model, world, nf4=nf4)
    numbers = [plan.weights, plan.adapters, plan.block, plan.received, plan.reduced]
    cells = " | ".join(f"{number / 1e9:.2f}" for number in numbers)
    assert f"| {name} | {world} | {'NF4' if nf4 else '16 bits'} | {cells} |" in DOCS.read_text(encoding="utf-8")


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_parts_sum_to_whole(world):
    tensors = [*nf4_rows(203, 80), Rows(5, 12)]
    assert sum(held_bytes(tensors, world, rank) for rank in range(world)) == sum(t.total for t in tensors)
