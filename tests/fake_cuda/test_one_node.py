"""A gated MLP with LoRA as one autograd node on a CUDA device, with the results of its ops and of the CPU.

Attention does not run as one node there, because the op attention runs on the CPU only.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import qlora_kernels as qk
from qlora_kernels.ops import gated_mlp as mlp_ops
from qlora_kernels.ops.lora_projection import Projection
from qlora_kernels.ops.operands import LoRA, weight_of
from tests.support.fake_cuda import FakeDevice
from tests.support.problems import gaussian
from tests.support.tolerances import assert_same_function

M, N, K, R = 32, 192, 128, 16
"""Those of test_triton.py, which share compiled kernels."""


def projection(n: int, k: int, seed: int, device: str) -> Projection:
    packed, state = qk.quantize_nf4((gaussian(n, k, seed=seed) / k**0.5).to(device))
    A = (gaussian(R, k, seed=seed + 1) / k**0.5).to(device).requires_grad_()
    B = gaussian(n, R, seed=seed + 2).to(device).requires_grad_()
    return Projection(weight_of("gated_mlp", packed, state), None, LoRA(A, B, None, 0.5, 0.0))


def results(device: str, compute: Callable[[Tensor, mlp_ops.GatedMLP], Tensor], *, freeze: bool) -> list[Tensor]:
    """Return y and the gradients of x and of the six factors, or without lora_A of down if `freeze`."""
    gate, up, down = (projection(*shape, seed, device) for seed, shape in ((1, (N, K)), (4, (N, K)), (7, (K, N))))
    mlp = mlp_ops.GatedMLP(gate, up, down, "silu")
    if freeze:
        down.factors[0].requires_grad_(False)
    x = gaussian(M, K, seed=10, dtype=torch.bfloat16).to(device).requires_grad_()
    y = compute(x, mlp)
    factors = [factor for each in (gate, up, down) for factor in each.factors if factor.requires_grad]
    grads = torch.autograd.grad(y, [x, *factors], gaussian(M, K, seed=11, dtype=torch.bfloat16).to(device))
    return [each.detach().cpu() for each in (y, *grads)]


def by_ops(x: Tensor, mlp: mlp_ops.GatedMLP) -> Tensor:
    return mlp.by_ops(x)


@pytest.mark.parametrize("freeze", [False, True], ids=["trained", "frozen lora_A"])
def test_gated_mlp_has_the_bits_of_the_ops_and_the_values_of_the_cpu(device: FakeDevice, freeze: bool) -> None:
    nodes = []

    def as_node(x: Tensor, mlp: mlp_ops.GatedMLP) -> Tensor:
        y = mlp_ops.gated_mlp(x, mlp)
        nodes.append(type(y.grad_fn).__name__)
        return y

    calls = (("cuda", as_node), ("cuda", by_ops), ("cpu", as_node))
    on_gpu, of_ops, on_cpu = (results(*call, freeze=freeze) for call in calls)
    assert nodes == ["GatedMLPFunctionBackward"] * 2
    assert all(torch.equal(a, b) for a, b in zip(on_gpu, of_ops, strict=True))
    for actual, expected in zip(on_gpu, on_cpu, strict=True):
        assert_same_function(actual, expected)
