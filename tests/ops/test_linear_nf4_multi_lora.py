"""Class 2 (matmul): every row with its own adapter equals that row computed separately."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.ops.operands import weight_of
from tests.support.multi_lora_checks import SHAPES, check_forward_and_gradients
from tests.support.problems import DTYPES, dtype_name, gaussian, usable_backends
from tests.support.tolerances import assert_repeats, model_error

backends = pytest.mark.parametrize("backend", usable_backends("linear_nf4_multi_lora"))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)


@backends
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_forward_and_gradients(backend, dtype, shape, p):
    check_forward_and_gradients(backend, dtype, shape, p)


@backends
def test_minus_one_is_the_base(backend):
    packed, state = qk.quantize_nf4(gaussian(32, 64))
    x = gaussian(5, 64)
    factors = gaussian(2, 4, 64), gaussian(2, 32, 4), torch.ones(2)
    with qk.use_backend(backend):
        y = qk.linear_nf4_multi_lora(x, packed, state, *factors, torch.full((5,), -1))
        assert_repeats(y, qk.linear_nf4(x, packed, state), backend, terms=64)


def test_refuses_bad_arguments():
    packed, state = qk.quantize_nf4(gaussian(8, 64))
    x, A, B, scalings = torch.zeros(3, 64), torch.zeros(2, 4, 64), torch.zeros(2, 8, 4), torch.ones(2)
    with pytest.raises(ValueError, match=r"adapter must be int64 \[M=3\], got torch.int64 \(2,\)"):
        qk.linear_nf4_multi_lora(x, packed, state, A, B, scalings, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"lora_B must have shape \[E=2, N=8, r=4\], got \(1, 8, 4\)"):
        qk.linear_nf4_multi_lora(x, packed, state, A, B[:1], scalings, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"scalings must be float32 \[E=2\]"):
        qk.linear_nf4_multi_lora(x, packed, state, A, B, scalings[:1], torch.zeros(3, dtype=torch.int64))


@backends
def test_opcheck(backend):
    packed, state = qk.quantize_nf4(gaussian(8, 96))
    x, A = gaussian(3, 96).requires_grad_(), (gaussian(2, 4, 96) / 96**0.5).requires_grad_()
    B, adapter = gaussian(2, 8, 4).requires_grad_(), torch.tensor([1, -1, 0])
    # Eager and traced calls of the reference may add in another order; no result exceeds 50.
    error = model_error(products=3, terms=96) if backend == "reference" else None
    with qk.use_backend(backend):
        torch.library.opcheck(
            torch.ops.qlora_kernels.linear_nf4_multi_lora,
            (x, *weight_of("opcheck", packed, state), None, A, B, torch.ones(2), adapter, None, 0.0),
            rtol=error,
            atol=None if error is None else 50 * error,
        )


@pytest.mark.parametrize("backend", usable_backends("linear_nf4_multi_lora"))
def test_adapter_number_out_of_range(backend):
    """An error if the numbers are on the host; on a GPU, which would have to synchronize, only the base is computed."""
    packed, state = qk.quantize_nf4(gaussian(8, 64))
    x, A, B = gaussian(3, 64), gaussian(2, 4, 64), gaussian(2, 8, 4)
    adapter = torch.tensor([0, 2**40, -1])
    with qk.use_backend(backend):
        try:
            y = qk.linear_nf4_multi_lora(x, packed, state, A, B, torch.ones(2), adapter)
        except (IndexError, RuntimeError):
            return
        assert_repeats(y[1:], qk.linear_nf4(x, packed, state)[1:], backend, terms=64)
