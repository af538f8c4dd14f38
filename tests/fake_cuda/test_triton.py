"""Triton's kernels on the fake device: a stock Triton compiles them for sm_80 and launches them through the driver.

Only a few kernels in small tiles are run, because each is compiled twice, by Triton and from PTX to host code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import qlora_kernels as qk
from qlora_kernels.backends.triton.planner import Plan, use_plan
from tests.support.fake_cuda import FakeDevice
from tests.support.problems import gaussian
from tests.support.tolerances import assert_same_function

from .calls import CALLS

pytest.importorskip("triton")

M, N, K, R = 32, 192, 128, 16
"""Multiples of 16, as in the rehearsal of the GPU check and in a case of tests/gpu: all share the compiled kernels."""
TILE = Plan("fused", block_m=16, block_n=64, block_k=64)
DTYPE = torch.bfloat16


@pytest.fixture(autouse=True)
def _small_tiles() -> Iterator[None]:
    with use_plan("linear_nf4", TILE), use_plan("linear_nf4_grad_x", TILE):
        yield


def linear(device: str) -> list[Tensor]:
    """Run forward and backward of the fused kernels."""
    packed, state = qk.quantize_nf4((gaussian(N, K) / K**0.5).to(device))
    x = gaussian(M, K, seed=1, dtype=DTYPE).to(device).requires_grad_()
    y = qk.linear_nf4(x, packed, state, gaussian(N, seed=2, dtype=DTYPE).to(device))
    return [y.detach(), *torch.autograd.grad(y, x, gaussian(M, N, seed=3, dtype=DTYPE).to(device))]


def lora(dropout_p: float) -> Callable[[str], list[Tensor]]:
    """Run forward and backward of the LoRA kernels, with gradients of x, lora_A, lora_B and the bias."""

    def call(device: str) -> list[Tensor]:
        packed, state = qk.quantize_nf4((gaussian(N, K) / K**0.5).to(device))
        x = gaussian(M, K, seed=1, dtype=DTYPE).to(device).requires_grad_()
        A = (gaussian(R, K, seed=4) / K**0.5).to(device).requires_grad_()
        B = gaussian(N, R, seed=5).to(device).requires_grad_()
        bias = gaussian(N, seed=2, dtype=DTYPE).to(device).requires_grad_()
        seed = torch.tensor([7], device=device)
        y = qk.linear_nf4_lora(x, packed, state, A, B, bias, scaling=0.5, dropout_p=dropout_p, seed=seed)
        return [y.detach(), *torch.autograd.grad(y, (x, A, B, bias), gaussian(M, N, seed=3, dtype=DTYPE).to(device))]

    return call


OWN_CALLS: dict[str, Callable[[str], list[Tensor]]] = {
    "linear": linear,
    "lora": lora(0.0),
    "lora_dropout": lora(0.3),
}
NAMES = ("quantize", "quantize_double", "dequantize", *OWN_CALLS)


def call_of(name: str) -> Callable[[str], list[Tensor]]:
    return OWN_CALLS.get(name) or CALLS[name]


def check(name: str, results: list[Tensor]) -> None:
    """Compare with the CPU's results: the codec bit for bit, products within their roundings."""
    with qk.use_backend("cpu"):
        expected = call_of(name)("cpu")
    for actual, e in zip(results, expected, strict=True):
        if name in OWN_CALLS:
            products = 2 if name == "linear" else 3  # both sides round each of them
            assert_same_function(actual.cpu(), e, name, products=products, terms=K, arithmetic=DTYPE)
        else:
            assert torch.equal(actual.cpu(), e), name


def test_the_backend_is_available() -> None:
    assert qk.backends()["triton"].startswith("available")


@pytest.mark.parametrize("name", NAMES)
def test_side_stream(name: str) -> None:
    """Only the current stream is synchronized. The second call is by kept launches."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), qk.use_backend("triton"):
        call_of(name)("cuda")
        results = call_of(name)("cuda")
        side.synchronize()
        check(name, results)


@pytest.mark.parametrize("name", NAMES)
def test_operands_on_the_second_device(name: str) -> None:
    with qk.use_backend("triton"):
        call_of(name)("cuda:1")
        results = call_of(name)("cuda:1")
    assert all(result.device.index == 1 for result in results)
    check(name, results)


def test_a_captured_graph_replays_new_inputs() -> None:
    with qk.use_backend("triton"):
        packed, state = qk.quantize_nf4((gaussian(N, K) / K**0.5).cuda())
        x, other = (gaussian(M, K, seed=seed, dtype=DTYPE).cuda() for seed in (1, 9))
        expected = [qk.linear_nf4(each, packed, state).cpu() for each in (x, other)]
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = qk.linear_nf4(x, packed, state)
        x.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        assert not torch.equal(*expected)
        assert torch.equal(y.cpu(), expected[1])


def test_untranslatable_ptx_raises(device: FakeDevice) -> None:
    assert device.load_module(b".version 8.0\n.target sm_80\n.visible .entry k() { nothing.b32 %r1; }") != 0
