"""The sm_80 PTX of linear_cross_entropy's kernel, executed on the host, within the bounds of the interpreted one."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels.backends.triton import linear_cross_entropy as module
from qlora_kernels.ops.output_head import Head
from tests.support.cross_entropy_formula import linear_cross_entropy as formula
from tests.support.problems import gaussian
from tests.support.tolerances import assert_within
from tests.support.triton_on_host import executing_ptx


@pytest.mark.parametrize(("dtype", "softcap"), [(torch.bfloat16, 0.0), (torch.float32, 3.0)], ids=str)
def test_losses_and_gradient(monkeypatch, dtype, softcap):
    """Two blocks of the vocabulary, the second short; a softcap and a bias in one of the cases."""
    monkeypatch.setattr(module, "BLOCK", 1024)
    M, V, K = 4, 1100, 16
    hidden, weight = gaussian(M, K, dtype=dtype), (gaussian(V, K, seed=1) / 2).to(dtype)
    bias = gaussian(V, seed=3) if softcap else None
    labels = torch.tensor([0, -100, V - 1, 37])
    with executing_ptx():
        losses, _, rows = module.linear_cross_entropy(
            hidden, labels, Head(weight, bias, -100, 1.0, softcap), need_grad_hidden=True
        )
    expected = formula(hidden, weight, labels, bias, softcap=softcap or None, rounds_gradient=True)
    assert_within(losses, expected.losses, "losses")
    assert_within(rows, expected.rows, "rows")
