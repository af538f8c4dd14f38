"""Seeds of every test, fixes of Triton's interpreter under TRITON_INTERPRET=1, and the order of test files in a run by
several processes."""

from __future__ import annotations

import os
import random
from collections import Counter

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.support import triton_interpreter

    triton_interpreter.install()

START_FIRST = (
    "tests/bench/test_fidelity.py",
    "tests/bench/test_gpu_check.py",
    "tests/bench/test_quick.py",
    "tests/cli/test_device.py",
    "tests/cli/test_finetune.py",
    "tests/cli/test_hostile_files.py",
    "tests/cli/test_smollm2.py",
    "tests/cpu/test_failing_allocator.py",
    "tests/cpu/test_large.py",
    "tests/cpu/test_planted_faults.py",
    "tests/cuda/emulator/test_hopper_faults.py",
    "tests/cuda/emulator/test_planted_faults.py",
    "tests/cuda/test_compile_gates.py",
    "tests/distributed/",
    "tests/docs/",
    "tests/examples/",
    "tests/fuzz/",
    "tests/integrations/test_vllm.py",
    "tests/io/test_faults.py",
    "tests/io/test_training_state.py",
    "tests/triton/test_model_part_mutations.py",
    "tests/triton/test_mutations.py",
)
"""Files and folders with few tests that run compilers or whole programs: the longest ones by `--durations`."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort the files of a run by several processes, so that none of the long ones is left to the end.

    `make test` passes --no-loadscope-reorder, because pytest-xdist would sort the files by their number of tests alone.
    """
    if not hasattr(config, "workerinput"):
        return
    files = [item.nodeid.partition("::")[0] for item in items]
    tests = Counter(files)
    order = {file: (not file.startswith(START_FIRST), -tests[file]) for file in tests}
    items.sort(key=lambda item: order[item.nodeid.partition("::")[0]])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Seed all generators, before the fixtures of the test: no test depends on the tests before it, or on chance."""
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)  # torch.manual_seed records a traceback where CUDA is not initialized
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)
