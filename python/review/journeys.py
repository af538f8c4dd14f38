"""The functions that a value passes through: `QLORA_BACKEND=reference python -m python.review.journeys [ROOT]`.

Runs four calls of the package in ROOT (default: this repository) and prints, for each, the package's functions in the
order of their first call, with their files: x to the kernel of a linear layer, w to the kernel of quantization, grad_y
through the backward pass of a LoRA layer, and a configuration to the adapted layers of a model. Each call runs once
before it is recorded. docs/notebook/code-review.md lists the results at two commits.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any


def calls_of(run: Callable[[], Any], package: Path) -> list[str]:
    """Return "file:function" of each Python call below `package` while `run` runs, on all threads, in order."""
    calls: list[str] = []
    names: dict[CodeType, str | None] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code not in names:
            path = Path(code.co_filename)
            inside = package in path.parents and not code.co_name.startswith("<")
            name = getattr(code, "co_qualname", code.co_name).replace(".<locals>", "")
            names[code] = f"{path.relative_to(package)}:{name}" if inside else None
        if (name_of_call := names[code]) is not None:
            calls.append(name_of_call)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return calls


def journeys() -> dict[str, Callable[[], Callable[[], Any]]]:
    """Return the journeys by name; each prepares its operands and returns the call to record."""
    import torch
    from torch import nn

    import qlora_kernels as qk

    peft: Any = qk.peft
    w = torch.randn(64, 64)
    x = torch.randn(4, 64, requires_grad=True)
    lora_A, lora_B = torch.randn(8, 64, requires_grad=True), torch.randn(64, 8, requires_grad=True)

    def forward() -> Callable[[], Any]:
        layer = qk.LinearNF4.from_linear(nn.Linear(64, 64, bias=False))
        return lambda: layer(x.detach())

    def backward() -> Callable[[], Any]:
        layer = qk.LinearNF4.from_linear(nn.Linear(64, 64, bias=False))
        loss = layer.forward_lora(x, lora_A, lora_B, 2.0).sum()
        return lambda: torch.autograd.backward(loss)

    def inject() -> Callable[[], Any]:
        model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
        config = peft.LoraConfig(r=8, target_modules=["0", "2"])
        return lambda: peft.get_peft_model(model, config)

    return {
        "x -> forward kernel": forward,
        "w -> quantize kernel": lambda: lambda: qk.quantize_nf4(w),
        "grad_y -> LoRA backward": backward,
        "configuration -> adapted layers": inject,
    }


def main() -> None:
    """Print the journeys of a tree."""
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else Path(__file__).parents[2]
    sys.path.insert(0, str(root))
    package = root / "qlora_kernels"
    for name, prepare in journeys().items():
        prepare()()
        calls = calls_of(prepare(), package)
        first = list(dict.fromkeys(calls))
        files = list(dict.fromkeys(call.partition(":")[0] for call in first))
        moves = sum(a.partition(":")[0] != b.partition(":")[0] for a, b in itertools.pairwise(calls))
        print(f"{name}: {len(calls)} calls, {len(first)} functions, {len(files)} files, {moves} changes of file")
        for call in first:
            print(f"    {call}")


if __name__ == "__main__":
    main()
