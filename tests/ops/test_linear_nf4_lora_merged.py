"""Class 2 (matmul): the LoRA linear whose update is added to W while it is decoded, and its gradients."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.ops.operands import LoRA, weight_of
from tests.support.linear_formulas import Arithmetic, assert_lora_merged
from tests.support.problems import DTYPES, Shape, dtype_name, gaussian, usable_backends
from tests.support.tolerances import assert_within, exactly, total

backends = pytest.mark.parametrize("backend", usable_backends("linear_nf4_lora_merged"))
SHAPES = (
    Shape(7, 33, 96),
    Shape(5, 17, 31, r=1, blocksize=32),
    Shape(0, 32, 64),
    Shape(70, 130, 257, r=8, blocksize=128),
    Shape(67, 96, 576, r=40, blocksize=256),
)
SCALING = 1.7
OP = torch.ops.qlora_kernels.linear_nf4_lora_merged


def problem(shape, dtype):
    packed, state = qk.quantize_nf4(gaussian(shape.N, shape.K, seed=1) / shape.K**0.5, shape.blocksize)
    leaves = [
        gaussian(shape.M, shape.K, dtype=dtype),
        (gaussian(shape.r, shape.K, seed=2) / shape.K**0.5).to(dtype).float(),
        (gaussian(shape.N, shape.r, seed=3) * 0.3).to(dtype).float(),
        gaussian(shape.N, seed=4, dtype=dtype),
    ]
    return packed, state, [leaf.requires_grad_() for leaf in leaves]


@backends
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(backend, dtype, shape):
    packed, state, leaves = problem(shape, dtype)
    x, A, B, bias = leaves
    grad_y = gaussian(shape.M, shape.N, dtype=dtype, seed=5)
    with qk.use_backend(backend):
        y = OP(x, *weight_of("test", packed, state), bias, *LoRA(A, B, None, SCALING, 0.0))
        grads = torch.autograd.grad(y, leaves, grad_y)
    inputs = (x, qk.dequantize_nf4(packed, state, torch.float32), bias, A, B, grad_y)
    assert_lora_merged((y, *grads[:3]), inputs, SCALING, Arithmetic(dtype))
    assert_within(grads[3], total(exactly(grad_y)).to(dtype), "grad of bias")
    assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]


def test_one_rounding_of_the_weight():
    """fp32 decides: W and the update are not rounded apart. A sum of two rounded terms differs in 16-bit dtypes."""
    packed, state, (_, A, B, _) = problem(Shape(1, 64, 64), torch.bfloat16)
    x = torch.eye(64, dtype=torch.bfloat16)
    with qk.use_backend("reference"):
        y = OP(x, *weight_of("test", packed, state), None, *LoRA(A, B, None, SCALING, 0.0)).detach()
    w, update = qk.dequantize_nf4(packed, state, torch.float32), SCALING * (B.detach() @ A.detach())
    once, twice = (w + update).bfloat16(), w.bfloat16() + update.bfloat16()
    assert (once != y.T).float().mean() < 0.01, "sums of another order may fall on the other side of a boundary"
    assert (twice != y.T).float().mean() > 0.1


@backends
def test_dropout_is_refused(backend):
    packed, state, (x, A, B, _) = problem(Shape(3, 32, 64), torch.float32)
    with qk.use_backend(backend), pytest.raises(ValueError, match=r"dropout_p must be 0, got 0\.1"):
        OP(x, *weight_of("test", packed, state), None, *LoRA(A, B, torch.tensor([1]), 1.0, 0.1))


def test_registration():
    packed, state, (x, A, B, bias) = problem(Shape(3, 32, 64), torch.float32)
    arguments = (x, *weight_of("test", packed, state), bias, *LoRA(A, B, None, SCALING, 0.0))
    torch.library.opcheck(OP, arguments)


def test_second_derivatives_and_forward_mode():
    packed, state, (x, A, B, _) = problem(Shape(3, 8, 32, r=2), torch.float32)

    def y(x, A, B):
        return OP(x, *weight_of("test", packed, state), None, *LoRA(A, B, None, SCALING, 0.0))

    tangents = tuple(gaussian(*t.shape, seed=9) for t in (x, A, B))
    _, forward = torch.func.jvp(y, (x.detach(), A.detach(), B.detach()), tangents)
    _, backward = torch.autograd.functional.jvp(y, (x, A, B), tangents)  # by two reverse passes
    torch.testing.assert_close(forward, backward)


def test_only_x_and_the_factors_are_saved():
    packed, state, (x, A, B, _) = problem(Shape(3, 64, 128), torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        OP(x, *weight_of("test", packed, state), None, *LoRA(A, B, None, SCALING, 0.0))
    owned = {t.untyped_storage().data_ptr() for t in (packed, *state.constants, x, A, B) if t is not None}
    assert all(t.untyped_storage().data_ptr() in owned for t in saved)
