"""Operands on a device that is not the current one: each op runs on the device of its operands."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from tests.support.problems import gaussian

from .calls import CALLS, check


@pytest.mark.parametrize("name", CALLS)
def test_operands_on_the_second_device(name: str) -> None:
    torch.zeros(1, device="cuda:0")  # makes device 0 the runtime's current one, in which a missing guard would launch
    with qk.use_backend("cuda"):
        results = CALLS[name]("cuda:1")
    assert torch.cuda.current_device() == 0
    assert {result.device for result in results} == {torch.device("cuda:1")}
    check(name, results)


def test_operands_of_two_devices_are_refused() -> None:
    """The error names the argument, before a kernel uses an address of another GPU."""
    packed, state = qk.quantize_nf4(gaussian(8, 64).to("cuda:1"))
    with qk.use_backend("cuda"), pytest.raises(ValueError, match="packed must be on cuda:0, got cuda:1"):
        qk.linear_nf4(gaussian(2, 64).to("cuda:0"), packed, state)
