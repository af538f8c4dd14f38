"""One small call of each op of the cuda backend, with the CPU's results."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

import qlora_kernels as qk
from qlora_kernels.ops import managed_memory
from qlora_kernels.ops.operands import LoRA, weight_of
from tests.support.problems import gaussian
from tests.support.tolerances import assert_same_function

N, K, R = 40, 256, 8
DTYPE = torch.bfloat16
EXACT_CALLS = ("quantize", "quantize_double", "quantize_absmax", "dequantize", "paged_adamw", "managed_memory")
"""Names of calls whose results must be equal bit for bit."""


@cache
def _weight() -> tuple[Tensor, qk.QuantState]:
    with qk.use_backend("cpu"):
        return qk.quantize_nf4(gaussian(N, K) / K**0.5)


def _on(device: str, tensor: Tensor) -> Tensor:
    return tensor.detach().to(device)


def _weight_on(device: str) -> tuple[Tensor, qk.QuantState]:
    packed, state = _weight()
    return _on(device, packed), state.to(device)


def _quantize(device: str) -> list[Tensor]:
    packed, state = qk.quantize_nf4(_on(device, gaussian(N, K)), 64, False)
    return [packed, state.absmax]


def _quantize_double(device: str) -> list[Tensor]:
    packed, state = qk.quantize_nf4(_on(device, gaussian(N, K)))
    assert state.absmax_q is not None
    return [packed, state.absmax_q]


def _quantize_absmax(device: str) -> list[Tensor]:
    absmax_q, absmax_scale, _ = torch.ops.qlora_kernels.quantize_absmax(_on(device, gaussian(600, seed=9).abs()))
    return [absmax_q, absmax_scale]


def _dequantize(device: str) -> list[Tensor]:
    return [qk.dequantize_nf4(*_weight_on(device), DTYPE)]


def _linear(rows: int) -> Callable[[str], list[Tensor]]:
    def call(device: str) -> list[Tensor]:
        x = _on(device, gaussian(rows, K, seed=1, dtype=DTYPE)).requires_grad_()
        y = qk.linear_nf4(x, *_weight_on(device), _on(device, gaussian(N, seed=2, dtype=DTYPE)))
        grad_y = _on(device, gaussian(rows, N, seed=3, dtype=DTYPE))
        return [y.detach(), *torch.autograd.grad(y, x, grad_y)]

    return call


def _linear_lora(rows: int, dropout_p: float) -> Callable[[str], list[Tensor]]:
    def call(device: str) -> list[Tensor]:
        x = _on(device, gaussian(rows, K, seed=1, dtype=DTYPE)).requires_grad_()
        A = _on(device, gaussian(R, K, seed=4) / K**0.5).requires_grad_()
        B = _on(device, gaussian(N, R, seed=5)).requires_grad_()
        seed = _on(device, torch.tensor([7]))
        y = qk.linear_nf4_lora(x, *_weight_on(device), A, B, scaling=0.5, dropout_p=dropout_p, seed=seed)
        grad_y = _on(device, gaussian(rows, N, seed=3, dtype=DTYPE))
        return [y.detach(), *torch.autograd.grad(y, (x, A, B), grad_y)]

    return call


def _lora_backward(device: str) -> list[Tensor]:
    """The backward op alone, on the caller's thread: autograd's own threads set the current device themselves."""
    x, grad_y = _on(device, gaussian(20, K, seed=1, dtype=DTYPE)), _on(device, gaussian(20, N, seed=3, dtype=DTYPE))
    s = _on(device, gaussian(20, R, seed=6, dtype=DTYPE))
    lora = LoRA(_on(device, gaussian(R, K, seed=4) / K**0.5), _on(device, gaussian(N, R, seed=5)), None, 0.5, 0.3)
    lora = lora._replace(seed=_on(device, torch.tensor([7])))
    weight = weight_of("test", *_weight_on(device))
    return list(torch.ops.qlora_kernels.linear_nf4_lora_backward(grad_y, x, s, *weight, *lora, True, True, True))


def _merged_lora(rows: int) -> Callable[[str], list[Tensor]]:
    def call(device: str) -> list[Tensor]:
        x = _on(device, gaussian(rows, K, seed=1, dtype=DTYPE)).requires_grad_()
        A = _on(device, gaussian(R, K, seed=4) / K**0.5).requires_grad_()
        B = _on(device, gaussian(N, R, seed=5)).requires_grad_()
        operands = (*weight_of("test", *_weight_on(device)), None, *LoRA(A, B, None, 0.5, 0.0))
        y = torch.ops.qlora_kernels.linear_nf4_lora_merged(x, *operands)
        grad_y = _on(device, gaussian(rows, N, seed=3, dtype=DTYPE))
        return [y.detach(), *torch.autograd.grad(y, (x, A, B), grad_y)]

    return call


def _group(rows: int) -> Callable[[str], list[Tensor]]:
    def call(device: str) -> list[Tensor]:
        x = _on(device, gaussian(rows, K, seed=1, dtype=DTYPE)).requires_grad_()
        A = [_on(device, gaussian(R, K, seed=s) / K**0.5).requires_grad_() for s in (4, 6)]
        B = [_on(device, gaussian(N, R, seed=s)).requires_grad_() for s in (5, 7)]
        packed, states = zip(*[_weight_on(device)] * 2, strict=True)
        ys = qk.linear_nf4_lora_group(x, packed, states, A, B, scalings=[0.5, 2.0])
        grads = [_on(device, gaussian(rows, N, seed=s, dtype=DTYPE)) for s in (3, 8)]
        return [*(y.detach() for y in ys), *torch.autograd.grad(ys, (x, *A, *B), grads)]

    return call


def _paged_adamw(device: str) -> list[Tensor]:
    params = [torch.nn.Parameter(_on(device, gaussian(n, seed=n))) for n in (5000, 70)]
    for param in params:
        param.grad = _on(device, gaussian(param.numel(), seed=1))
    with qk.PagedAdamW(params, lr=1e-2) as optimizer:
        optimizer.step()
        states = [state.clone() for param in params for state in optimizer.state[param].values()]
    return [*(param.detach() for param in params), *states]


def _managed_memory(device: str) -> list[Tensor]:
    """Zeros in unified memory, allocated against the device and written on the current stream."""
    if device == "cpu":
        return [torch.zeros(5000, dtype=torch.uint8)]
    on = torch.device("cuda", torch.device(device).index or 0)
    arena = managed_memory.managed_alloc(5000, on)
    managed_memory.managed_prefer_device(arena)
    managed_memory.managed_prefetch(arena, 0, 5000)
    assert _allocated_against(arena) == on.index
    return [arena]  # alive until it is compared: freeing it would wait for all streams


class _PointerAttributes(ctypes.Structure):
    """cudaPointerAttributes."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("device", ctypes.c_int),
        ("device_pointer", ctypes.c_void_p),
        ("host_pointer", ctypes.c_void_p),
        ("reserved", ctypes.c_long * 8),
    )


def _allocated_against(tensor: Tensor) -> int:
    """Return the device that was current when the tensor's memory was allocated."""
    attributes = _PointerAttributes()
    runtime = ctypes.CDLL("libcudart.so.13")
    assert runtime.cudaPointerGetAttributes(ctypes.byref(attributes), ctypes.c_void_p(tensor.data_ptr())) == 0
    return attributes.device


CALLS: dict[str, Callable[[str], list[Tensor]]] = {
    "managed_memory": _managed_memory,
    "quantize": _quantize,
    "quantize_double": _quantize_double,
    "quantize_absmax": _quantize_absmax,
    "dequantize": _dequantize,
    "linear_small_m": _linear(1),
    "linear_pairs": _linear(8),
    "linear_gemm": _linear(20),
    "linear_dequantize": _linear(200),
    "lora_small_m": _linear_lora(1, 0.0),
    "lora_pairs": _linear_lora(8, 0.0),
    "lora_gemm": _linear_lora(20, 0.0),
    "lora_dequantize": _linear_lora(200, 0.0),
    "lora_dropout": _linear_lora(20, 0.3),
    "lora_backward": _lora_backward,
    "lora_merged": _merged_lora(200),
    "lora_group": _group(5),
    "lora_group_over_k_and_r": _group(200),
    "paged_adamw": _paged_adamw,
}


EXPECTED: dict[str, list[Tensor]] = {}
"""The results on the CPU, by name of a call; computed when first needed."""


def expected(name: str) -> list[Tensor]:
    """Return a call's results on the CPU."""
    if name not in EXPECTED:
        with qk.use_backend("cpu"):
            EXPECTED[name] = CALLS[name]("cpu")
    return EXPECTED[name]


def check(name: str, results: list[Tensor]) -> None:
    """Compare a call's results with the CPU's, bit for bit or within the roundings of three successive products."""
    for result, wanted in zip(results, expected(name), strict=True):
        actual = result.cpu()
        assert actual.shape == wanted.shape
        if name in EXACT_CALLS:
            assert torch.equal(actual, wanted), name
        else:
            assert_same_function(actual, wanted, name, products=3, terms=K, arithmetic=DTYPE)


def check_on_a_side_stream(name: str) -> None:
    """Run one call on a new stream, synchronize that stream alone, and check the results.

    Under a lazy schedule only that stream runs, so that a launch on another stream would not be finished.
    """
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), qk.use_backend("cuda"):
        results = CALLS[name]("cuda")
        side.synchronize()
        check(name, results)
