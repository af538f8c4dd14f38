"""--device and --compute-dtype: the values they resolve to, results equal to the CPU's, and device-independent code."""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

from qlora_kernels.cli import main
from qlora_kernels.cli.arguments import UsageError, device_name
from qlora_kernels.cli.device import chosen_device, chosen_dtype
from qlora_kernels.cli.finetune_report import FinetuneReport
from qlora_kernels.training.workers import joined
from tests.support.tiny_model import LAYERS, LINEARS, write_tiny_llama

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("cli", "training", "integrations")


@pytest.fixture
def two_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    ("name", "environment", "device"),
    [
        ("auto", {}, "cuda:0"),
        ("auto", {"LOCAL_RANK": "1"}, "cuda:1"),
        ("cuda", {"LOCAL_RANK": "1"}, "cuda:1"),
        ("cuda:1", {"LOCAL_RANK": "0"}, "cuda:1"),
        ("cpu", {"LOCAL_RANK": "1"}, "cpu"),
    ],
)
def test_device_on_a_machine_with_two_gpus(two_devices, name, environment, device):
    assert chosen_device(name, environment) == torch.device(device)


def test_device_beyond_the_last_is_refused(two_devices):
    with pytest.raises(UsageError, match="--device: must be one of the 2 CUDA devices that torch sees, got 2"):
        chosen_device("cuda:2", {})
    with pytest.raises(UsageError, match="LOCAL_RANK must number one of the 2 CUDA devices that torch sees, got 5"):
        chosen_device("auto", {"LOCAL_RANK": "5"})


def test_device_on_a_machine_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert chosen_device("auto", {"LOCAL_RANK": "3"}) == torch.device("cpu")
    assert main(["generate", "--model", "none", "--prompt", "x", "--device", "cuda:1"]) == 2
    assert "--device: must be a device of this machine, got cuda:1, but torch" in capsys.readouterr().err
    for text in ("gpu", "cuda:", "cuda:-1", "CPU", "cuda:0,1"):
        with pytest.raises(argparse.ArgumentTypeError, match="must be auto, cpu, cuda or cuda:N"):
            device_name(text)


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16")])
def test_dtype_follows_the_capability_of_the_device(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert chosen_dtype("auto", torch.device("cuda", 0)) == dtype
    assert chosen_dtype("bf16", torch.device("cuda", 0)) == "bf16"
    assert chosen_dtype("auto", torch.device("cpu")) == "bf16"


def test_gradients_of_a_gpu_are_summed_by_nccl(monkeypatch):
    from datetime import timedelta

    import torch.distributed as dist

    seen = []
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: seen.append(device))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: seen.append(backend))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    for device in (torch.device("cpu"), torch.device("cuda", 1)):
        with joined({"WORLD_SIZE": "2"}, timedelta(seconds=9), device):
            pass
    assert seen == ["gloo", torch.device("cuda", 1), "cpu:gloo,cuda:nccl"]


def test_reports_without_a_device_are_of_the_cpu():
    report = json.loads(FinetuneReport("m", "d", "o", device="cuda:0", peak_device_bytes=7).to_json())
    assert FinetuneReport.of(dict(report)).device == "cuda:0"
    for name in ("device", "peak_device_bytes", "fused"):
        del report[name]
    assert FinetuneReport.of(report).device == "cpu"


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices in Python",
)
def test_commands_run_on_a_device_that_is_not_the_cpu(tmp_path):
    """Every operator of loading, training, evaluation, saving and generation gets tensors of one device."""
    model = write_tiny_llama(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    sizes = ["--steps", "2", "--batch", "2", "--micro-batch", "1", "--seq-len", "32", "--eval-windows", "2", "--r", "4"]
    more = ["--dropout", "0.1", "--gradient-checkpointing", "--checkpoint-every", "1", "--max-new-tokens", "2"]
    files = ["--model", str(model), "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    adapter = str(tmp_path / "out" / "adapter")
    commands = [
        ["finetune", *files, *sizes, *more, "--device", "cuda", "--json"],
        ["generate", "--model", str(model), "--adapter", adapter, "--prompt", "a", "--device", "cuda"],
        ["eval", "--model", str(model), "--adapter", adapter, "--data", files[3], "--device", "cuda", "--json"],
        ["quantize", str(model), str(tmp_path / "nf4"), "--device", "cuda"],
        ["quality", "--model", str(model), "--device", "cuda"],
    ]
    done = subprocess.run(
        [sys.executable, "-m", "tests.cli.on_simulated_device", json.dumps(commands)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert [one["code"] for one in result["results"]] == [0] * len(commands), done.stderr
    report = json.loads(result["results"][0]["out"])
    assert report["device"] == "simulated:0"
    assert len(report["steps"]) == 2
    backward = result["calls"]["qlora_kernels::linear_nf4_lora_backward"]
    assert backward == 2 * 2 * LINEARS, "two steps of two micro-batches, every layer on the device"
    assert result["calls"]["qlora_kernels::linear_nf4_lora"] > backward
    assert result["calls"]["aten::embedding"] > LAYERS


FACTORIES = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor",
    "zeros", "Generator", "from_numpy", "frombuffer",
}  # fmt: skip
LAYERS_WITH_WEIGHTS = {"LinearNF4", "Linear", "Embedding"}
FORBIDDEN = {"cpu", "cuda", "numpy", "is_cpu", "is_cuda"}
ALLOWED = {
    ("training/windows.py", "_example", "tensor"): "examples are rows of a data set; a step moves its batch",
    ("training/windows.py", "encode_rows", "tensor"): "examples are rows of a data set; a step moves its batch",
    ("training/run_state.py", "fingerprint", "numpy"): "bytes of examples, which are in CPU memory",
    ("training/workers.py", "Workers.total", "tensor"): "a number of Python, summed by gloo whatever the device",
    ("training/batches.py", "BatchOrder._permuted", "Generator"): "the order must not depend on the device",
    ("training/batches.py", "BatchOrder._permuted", "randperm"): "the order must not depend on the device",
    ("training/chunked_loss.py", "_runs_on_the_op", "is_cpu"): "the op's kernel was measured only on the CPU",
    ("integrations/nf4_folders.py", "WeightMaker._copied", "LinearNF4"): "load_model moves the whole model at its end",
    ("training/sharded_model.py", "gathered", "cpu"): "a checkpoint is written from CPU memory",
    ("cli/limits.py", "", "device"): "ids and labels of a step are in CPU memory",
    ("integrations/gguf_export.py", "_add", "to"): "a file is written from CPU memory",
    ("integrations/gguf_export.py", "_add", "numpy"): "a file is written from CPU memory",
    ("integrations/gguf_export.py", "_rope_factors", "tensor"): "a file is written from CPU memory",
    ("integrations/quantization_report.py", "normal_shares", "linspace"): "numbers about the format, not a model's",
    ("integrations/quantization_report.py", "normal_shares", "tensor"): "numbers about the format, not a model's",
    ("cli/device.py", "chosen_device", "device"): "the device is chosen here",
    ("cli/info.py", "_facts", "cpu"): "torch.backends.cpu",
}
"""(file, function, call) -> the reason why it is permitted. Methods are named with their class."""


class Assumptions(ast.NodeVisitor):
    """Collects expressions that tie code to one device."""

    def __init__(self) -> None:
        self.place: list[str] = []
        self.found: list[tuple[str, str, int]] = []

    def _inside(self, node: ast.AST) -> None:
        self.place.append(node.name)  # type: ignore[attr-defined]
        self.generic_visit(node)
        self.place.pop()

    visit_FunctionDef = visit_ClassDef = _inside

    def _note(self, what: str, node: ast.AST) -> None:
        self.found.append((".".join(self.place), what, node.lineno))  # type: ignore[attr-defined]

    def visit_Attribute(self, node: ast.Attribute) -> None:
        of_torch = isinstance(node.value, ast.Name) and node.value.id == "torch"
        if node.attr in FORBIDDEN and not (of_torch or ast.unparse(node) == "torch.version.cuda"):
            self._note(node.attr, node)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        of_torch = isinstance(function, ast.Attribute) and getattr(function.value, "id", "") == "torch"
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        texts = [value.value for value in [*node.args, *keywords.values()] if isinstance(value, ast.Constant)]
        if ((of_torch and name in FACTORIES) or name in LAYERS_WITH_WEIGHTS) and "device" not in keywords:
            self._note(name, node)
        for argument in node.args:  # map(torch.tensor, ...)
            if isinstance(argument, ast.Attribute) and ast.unparse(argument) in {f"torch.{one}" for one in FACTORIES}:
                self._note(argument.attr, node)
        if name in ("device", "to", "load") and any(str(text).startswith(("cpu", "cuda")) for text in texts):
            self._note(name, node)
        self.generic_visit(node)


def assumptions(source: str) -> list[tuple[str, str, int]]:
    visitor = Assumptions()
    visitor.visit(ast.parse(source))
    return visitor.found


def test_code_assumes_no_device():
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / "qlora_kernels" / package).rglob("*.py")):
            name = path.relative_to(ROOT / "qlora_kernels").as_posix()
            for place, what, line in assumptions(path.read_text()):
                found[name, place, what] = f"{name}:{line}: {what} in {place or 'the module'}"
    assert [text for key, text in found.items() if key not in ALLOWED] == []
    assert ALLOWED.keys() - found.keys() == set(), "no longer there: take it off the list"


@pytest.mark.parametrize(
    "line",
    [
        "x.cpu()",
        "x.cuda()",
        "torch.zeros(3)",
        "torch.tensor([1])",
        "x.to('cpu')",
        "torch.device('cuda')",
        "map(torch.tensor, x)",
        "x.numpy()",
    ],
)
def test_assumptions_are_found(line):
    assert assumptions(f"def f(x):\n    return {line}\n")
    assert not assumptions("def f(x):\n    return torch.zeros(3, device=x.device) + torch.cuda.device_count()\n")
