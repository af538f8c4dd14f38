"""Profile of a training step: torch.profiler's self times by part of the model, forward and backward.

Each module's forward is a region, and the innermost region counts. Autograd tags a backward event with its forward op's
sequence number, by which both are attributed to the same region. In a fused model, norms that a decoder layer calls as
an op count as residual adds, and the output head counts as loss. Attention and MLP of a fused model, which are one
graph node each in a step, run as separate ops under the hooks.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import ProfilerActivity, profile, record_function

PREFIX = "region: "

OPTIMIZER, REST = "optimizer and clipping", "rest"

PARTS = (
    (r"lm_head", "lm_head"),
    (r"q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj", "adapted linears"),
    (r"norm", "norms"),
    (r"self_attn|rotary", "attention"),
    (r"mlp", "activation"),
    (r"embed_tokens", "embedding"),
    (r"layers\.\d+", "residual adds"),
)
"""The last component of a module's name -> part; the forward of the whole model is `loss`."""

COPIES = re.compile(r"aten::(_to_copy|copy_|to|clone|contiguous)$")

WARM_UP = 2


def profile_step(model: nn.Module, call: Callable[[], Any]) -> dict[str, dict[str, float]]:
    """Return milliseconds of one call by part: the `total`, and the share of `copies` (casts and layout changes)."""
    with regions(model):
        for _ in range(WARM_UP):
            call()
        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            call()
    return by_part(recorded.events())


@contextmanager
def regions(model: nn.Module) -> Iterator[None]:
    """Record each module's forward inside the block under the name of its part.

    The hooks are global, because a fused module runs its original code if the module itself has hooks.
    """
    parts: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        part = "loss" if name == "" else part_of(name)
        if part is not None:
            parts[module] = part
    opened: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        if module in parts:
            opened.append(record_function(PREFIX + parts[module]))
            opened[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if module in parts:
            opened.pop().__exit__(None, None, None)

    with ExitStack() as hooks:
        hooks.callback(register_module_forward_pre_hook(enter).remove)
        hooks.callback(register_module_forward_hook(leave).remove)
        yield


def optimizer_region() -> record_function:
    """Return the region for everything after the backward pass."""
    return record_function(PREFIX + OPTIMIZER)


def part_of(name: str) -> str | None:
    """Return the part of a module with this name, or None if it belongs to its parent's part."""
    for pattern, part in PARTS:
        if re.search(rf"(^|\.)\w*({pattern})$", name):
            return part
    return None


def by_part(events: Any) -> dict[str, dict[str, float]]:
    """Return self times by part, the longest first."""
    parts_of_nodes: dict[int, str] = {}
    for event in sorted(events, key=lambda e: e.time_range.start):
        if event.sequence_nr >= 0 and not is_backward(event):
            # Ops without a graph node have the number of the next op, so the last op with a number made the node.
            parts_of_nodes[event.sequence_nr] = enclosing_part(event)
    sums: dict[str, dict[str, float]] = defaultdict(lambda: {"total": 0.0, "copies": 0.0})
    for event in events:
        node = backward_root(event)
        part = enclosing_part(event) if node is None else parts_of_nodes.get(node.sequence_nr, REST)
        sums[part]["total"] += event.self_cpu_time_total / 1e3
        if COPIES.search(event.name):
            sums[part]["copies"] += event.self_cpu_time_total / 1e3
    return dict(sorted(sums.items(), key=lambda item: -item[1]["total"]))


def is_backward(event: Any) -> bool:
    """Whether an event belongs to the backward pass."""
    return backward_root(event) is not None


def backward_root(event: Any) -> Any:
    """Return the evaluation of a graph node that contains the event, or None."""
    while event is not None:
        if event.name.startswith("autograd::engine::evaluate_function"):
            return event
        event = event.cpu_parent
    return None


def enclosing_part(event: Any) -> str:
    """Return the part of the step that encloses an event, or REST."""
    while event is not None:
        if event.name.startswith(PREFIX):
            return str(event.name.removeprefix(PREFIX))
        event = event.cpu_parent
    return REST


def table(parts: Mapping[str, Mapping[str, float]]) -> str:
    """Return the parts and their times as a text table."""
    total = sum(times["total"] for times in parts.values())
    lines = [f"{'part':<24} {'ms':>8} {'share':>7} {'copies, ms':>11}"]
    for part, times in parts.items():
        lines.append(f"{part:<24} {times['total']:8.1f} {times['total'] / total:7.1%} {times['copies']:11.1f}")
    lines.append(f"{'all':<24} {total:8.1f}")
    return "\n".join(lines)
