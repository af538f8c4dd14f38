"""Short runs of `qlora-kernels finetune` and their results, shared by the tests of the command."""

from __future__ import annotations

import json

from qlora_kernels.cli import main

FAST = ["--steps", "6", "--batch", "2", "--seq-len", "32", "--eval-windows", "4", "--lr", "1e-2", "--r", "4"]
FAST += ["--max-new-tokens", "4"]


def arguments(model, data, out, *more) -> list[str]:
    return ["finetune", "--model", str(model), "--data", str(data), "--out", str(out), *FAST, *more]


def finetune(capsys, *parts) -> dict:
    assert main([*arguments(*parts), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def losses(report) -> list[tuple[float, float]]:
    return [(step["loss"], step["grad_norm"]) for step in report["steps"]]


def files_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(capsys, *argv) -> str:
    """Return the line on stderr of a run that exits with code 2."""
    try:
        code = main([str(argument) for argument in argv])
    except SystemExit as exit:
        code = exit.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if not line.startswith("[")]
    assert len(lines) == 1, captured.err
    return lines[0]
