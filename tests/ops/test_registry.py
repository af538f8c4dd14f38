"""The registry's user interface: qk.backends(), use_backend, and the messages of refusals."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from tests.support.problems import gaussian


def test_backends_remains_a_function_after_loading():
    qk.quantize_nf4(gaussian(64))
    report = qk.backends()
    assert set(report) == {"reference", "cpu", "triton", "cuda"}
    assert report["reference"].startswith("available: ")


def test_forced_unavailable_backend_raises_with_reason():
    unusable = [name for name, state in qk.backends().items() if not state.startswith("available")]
    if not unusable:
        pytest.skip("every backend runs here")
    with qk.use_backend(unusable[0]), pytest.raises(NotImplementedError, match=f"backend '{unusable[0]}' cannot serve"):
        qk.quantize_nf4(gaussian(64))


def test_use_backend_is_reset_after_error():
    with pytest.raises(TypeError), qk.use_backend("reference"):
        qk.quantize_nf4(torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"use_backend: name must be one of"), qk.use_backend("tpu"):
        pass
