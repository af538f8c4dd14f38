"""More than 2**31 weights in one tensor, with which a 32-bit index would overflow."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.format import reference
from qlora_kernels.ops.registry import unavailable
from tests.support.free_memory import free_bytes
from tests.support.problems import gaussian
from tests.support.tolerances import assert_within, exactly, product

NEEDED_BYTES = 8 << 30
ROWS, COLUMNS = 32769, 65536  # 2**31 + 2**16 weights
TAIL = 2 * COLUMNS


pytestmark = [
    pytest.mark.skipif(unavailable("cpu") is not None, reason=f"cpu backend: {unavailable('cpu')}"),
    pytest.mark.skipif(free_bytes() is None, reason="the system does not tell how much memory is free"),
]


def test_more_than_two_to_the_31_weights():
    if (free := free_bytes()) < NEEDED_BYTES:
        pytest.skip(f"needs {NEEDED_BYTES >> 30} GiB of free memory, there are {free >> 30}")
    w = torch.zeros(ROWS * COLUMNS, dtype=torch.bfloat16)
    w[-TAIL:] = gaussian(TAIL, dtype=torch.bfloat16)
    w[:TAIL] = gaussian(TAIL, dtype=torch.bfloat16, seed=1)
    with qk.use_backend("cpu"):
        packed, state = qk.quantize_nf4(w.view(ROWS, COLUMNS), double_quant=False)
        for part in (slice(0, TAIL), slice(-TAIL, None)):
            expected, absmax = reference.quantize_nf4(w[part], 64)
            half = slice(0, TAIL // 2) if part.start == 0 else slice(-TAIL // 2, None)
            blocks = slice(0, TAIL // 64) if part.start == 0 else slice(-TAIL // 64, None)
            assert torch.equal(packed.reshape(-1)[half], expected)
            assert torch.equal(state.absmax[blocks], absmax)
        x = gaussian(1, COLUMNS, dtype=torch.bfloat16)
        y = qk.linear_nf4(x, packed, state)
        out = qk.dequantize_nf4(packed, state, out=w.view(ROWS, COLUMNS))  # reuses w's memory
    last = reference.dequantize_nf4(
        packed.reshape(-1)[-TAIL // 2 :], state.absmax[-TAIL // 64 :], 64, torch.Size((2, COLUMNS)), torch.bfloat16
    )
    assert torch.equal(out[-2:], last)
    assert out[2:-2].abs().amax() == 0
    assert_within(y[:, -2:], product(exactly(x), exactly(last).T).to(torch.bfloat16), "y")
    assert y[0, 2:-2].abs().amax() == 0
