"""Run commands with --device cuda standing for the simulated device: python -m tests.cli.on_simulated_device COMMANDS.

COMMANDS: a JSON list of argument lists. Prints one JSON object: exit codes, what the commands printed, and how often
each operator ran on the device. Raises where a module of a loaded model is left on the CPU.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys

import torch

from tests.support import simulated_device


def main(commands: list[list[str]]) -> None:
    device = simulated_device.install()
    from qlora_kernels.cli import device as choice
    from qlora_kernels.cli import finetune, limits, main, model_source

    def chosen_device(name: str, environment: object) -> torch.device:
        assert name == "cuda"
        return device

    for module in (choice, model_source):
        module.chosen_device = chosen_device  # type: ignore[attr-defined]
    of_folder = model_source.load_model

    def load_model(*args: object, **options: object) -> torch.nn.Module:
        model = of_folder(*args, **options)
        places = {t.device for t in [*model.parameters(), *model.buffers()]}
        assert places == {device}, places
        return model

    model_source.load_model = finetune.load_model = load_model
    limits.memory_bytes = lambda place: 1 << 34
    results = []
    for command in commands:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            code = main(command)
        results.append({"code": code, "out": out.getvalue()})
    sys.stdout.write(json.dumps({"results": results, "calls": simulated_device.CALLS}))
    sys.stdout.flush()
    os._exit(0)  # the autograd thread of a device that Python implements cannot be joined


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
