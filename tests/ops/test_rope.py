"""rope against float64: layouts, tables, gradients, bad input."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from tests.support.model_part_formulas import rope
from tests.support.problems import DTYPES, dtype_name, gaussian, usable_backends
from tests.support.tolerances import assert_within

B, T, H, KV = 2, 5, 3, 1
backends = pytest.mark.parametrize("backend", usable_backends("rope"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


def heads(number, D, dtype, seed, layout="tokens"):
    """Return [B, number, T, D]: a view of [B, T, number, D] as of projections, of a wider tensor, or contiguous."""
    if layout == "heads":
        return gaussian(B, number, T, D, dtype=dtype, seed=seed)
    wide = gaussian(B, T, number, D + 2 * (layout == "slice"), dtype=dtype, seed=seed)
    return wide[..., :D].transpose(1, 2)


def table(D, dtype, rows=1, seed=7):
    """Return cos or sin with arbitrary numbers, because its two halves need not be equal."""
    return gaussian(rows, T, D, dtype=dtype, seed=seed)


@backends
@dtypes
@pytest.mark.parametrize("D", [2, 6, 64, 80])
@pytest.mark.parametrize("layout", ["tokens", "heads", "slice"])
def test_forward_and_gradients(backend, dtype, D, layout):
    q, k = heads(H, D, dtype, 1, layout).requires_grad_(), heads(KV, D, dtype, 2, layout).requires_grad_()
    rows = B if layout == "heads" else 1
    cos, sin = table(D, dtype, rows), table(D, dtype, rows, seed=8)
    grads = heads(H, D, dtype, 3, "heads"), heads(KV, D, dtype, 4)
    with qk.use_backend(backend):
        rotated = qk.rope(q, k, cos, sin)
        results = torch.autograd.grad(rotated, (q, k), grads)
    for actual, x, name in zip(rotated, (q, k), "qk", strict=True):
        assert_within(actual, rope(x, cos, sin), name)
        assert actual.stride() == torch.empty_like(x).stride()
    for actual, grad, name in zip(results, grads, "qk", strict=True):
        assert_within(actual, rope(grad, cos, sin, inverse=True), f"grad_{name}")


@backends
def test_empty_batches_and_sequences_keep_their_shape(backend):
    q, cos = heads(H, 8, torch.float32, 1), table(8, torch.float32)
    with qk.use_backend(backend):
        assert qk.rope(q[:0], q[:0], cos, cos)[0].shape == (0, H, T, 8)
        assert qk.rope(q[:, :, :0], q[:, :, :0], cos[:, :0], cos[:, :0])[1].shape == (B, H, 0, 8)


def test_refuses_bad_arguments():
    q, k, cos = heads(H, 8, torch.float32, 1), heads(KV, 8, torch.float32, 2), table(8, torch.float32)
    with pytest.raises(ValueError, match=r"rope: cos must have D=8 columns, got 4; partial rotary embedding is not"):
        qk.rope(q, k, cos[..., :4], cos[..., :4])
    with pytest.raises(ValueError, match=r"rope: k must have shape \[B=2, heads, T=5, D=8\], got \(2, 1, 4, 8\)"):
        qk.rope(q, k[:, :, 1:], cos, cos)
    with pytest.raises(ValueError, match=r"rope: q must have shape \[B, heads, T, D\], got \(2, 5, 8\)"):
        qk.rope(q[:, 0], k, cos, cos)
    with pytest.raises(ValueError, match="rope: D must be even, got 7"):
        qk.rope(q[..., 1:], k[..., 1:], cos[..., 1:], cos[..., 1:])
    with pytest.raises(TypeError, match=r"rope: cos must have the dtype of q, torch.float32, got torch.bfloat16"):
        qk.rope(q, k, cos.bfloat16(), cos)
    with pytest.raises(ValueError, match=r"rope: sin must have shape \[B=2 or 1, T=5, D=8\], got \(3, 5, 8\)"):
        qk.rope(q, k, cos, cos.expand(3, -1, -1))
    with pytest.raises(NotImplementedError, match="rope: cos must not require a gradient"):
        qk.rope(q.requires_grad_(), k, cos.requires_grad_(), cos.detach())


@backends
def test_opcheck(backend):
    q, k, cos = heads(H, 8, torch.float32, 1).requires_grad_(), heads(KV, 8, torch.float32, 2), table(8, torch.float32)
    with qk.use_backend(backend):
        torch.library.opcheck(torch.ops.qlora_kernels.rope, (q, k, cos, cos, False))
