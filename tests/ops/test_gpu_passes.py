"""Launches of a LoRA linear on a GPU, and its passes over activations, counted from the calls of both backends.

The backends run on meta tensors: nothing is computed. A pass reads or writes a tensor of at least M * 1024 elements
once; the operands of the products with W are not counted, which every implementation reads and writes.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qlora_kernels.ops.operands import GroupLoRA, LoRA, Needs, Weight
from tests.cuda.launching import load_bindings, needs_library

M = K = 4096
BF16 = torch.bfloat16


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weight(N: int) -> Weight:
    blocks = N * K // 64
    packed, absmax_q = (meta(count, dtype=torch.uint8) for count in (N * K // 2, blocks))
    return Weight(packed, None, absmax_q, meta(blocks // 256, dtype=torch.float32), meta(dtype=torch.float32), 64, N, K)


class Counter:
    """launches, and passes in units of [M, 4096]."""

    def __init__(self) -> None:
        self.launches, self.passes = 0, 0.0

    def moved(self, *tensors: Any) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.dim() == 2 and M in tensor.shape and tensor.numel() >= M * 1024:
                self.passes += tensor.numel() / (M * 4096)


VIEWS = (
    *("view", "t.", "transpose", "permute", "slice", "split", "detach", "expand", "as_strided", "alias"),
    *("empty", "new_empty", "lift_fresh"),
)
"""Ops that launch nothing."""


class CountedOps(TorchDispatchMode):
    """Counts torch's own kernels, and the calls of the CUDA library."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.split("::")[1] + "."
        if "qlora_kernels_C" in function._schema.name:
            self.counter.launches += 1
            self.counter.moved(*args) if name not in ("cuda_dequantize_nf4.", "cuda_merge_lora.") else None
            return None
        result = function(*args, **kwargs)
        if name.startswith(VIEWS):
            return result
        self.counter.launches += 1
        operands = [t for t in (*args, kwargs.get("out")) if isinstance(t, Tensor)]
        if name.startswith(("mm", "addmm")):
            adds = name.startswith("addmm")
            left = operands[1] if adds else operands[0]
            in_place = adds and name.startswith("addmm_")
            if min(left.shape[1], operands[-1].shape[1], left.shape[0]) >= 1024:  # a product with W
                self.counter.moved(*(operands[0], result) if in_place else ())
            else:
                self.counter.moved(*(operands if kwargs.get("beta", 1) else operands[1:]), result)
        elif not name.startswith(("mul", "_to_copy", "zero_")):
            self.counter.moved(*operands)
        return result


@contextmanager
def counted(backend: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    counter = Counter()
    if backend == "triton":
        from triton.runtime.jit import JITFunction

        def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
            counter.launches += 1
            values = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
            if kernel.__name__ not in ("dequantize_nf4_kernel", "merge_lora_kernel"):
                names = [n for n in values if n in ("p_x", "p_grad_y", "p_out", "p_parts")]
                names += ["p_copy"] if values.get("COPY") else []
                counter.moved(*(values[n] for n in names))

        monkeypatch.setattr(JITFunction, "run", run)
        with CountedOps(counter):
            yield counter
        return
    load_bindings()
    products = importlib.import_module("qlora_kernels.backends.cuda.torch_products")
    monkeypatch.setattr(products, "in_fp32", lambda a, b: a @ b)  # as on a GPU: one call
    with CountedOps(counter):
        yield counter


Count = tuple[int, float]


def count(
    backend: str, widths: tuple[int, ...], extended: bool, monkeypatch: pytest.MonkeyPatch
) -> tuple[Count, Count]:
    """Return (launches, passes) of forward and of backward, without dropout, r = 16.

    extended: by products over K + r where the routing chooses them; otherwise by additions.
    """
    names = {"cuda": ("routing", "linear_nf4"), "triton": ("planner", "linear_nf4", "linear_nf4_lora_group")}[backend]
    modules = [importlib.import_module(f"qlora_kernels.backends.{backend}.{name}") for name in names]
    with monkeypatch.context() as patch:
        if not extended:
            for module in modules[:2]:
                patch.setattr(module, "addition_reason", lambda *arguments: "counted for comparison")
        return count_group(modules[-1], backend, widths, patch)


def count_group(group: Any, backend: str, widths: tuple[int, ...], patch: pytest.MonkeyPatch) -> tuple[Count, Count]:
    """Return (launches, passes) of forward and backward of a backend's module with the group ops."""
    weights = [weight(N) for N in widths]
    A, B = meta(16 * len(widths), K, dtype=torch.float32), [meta(N, 16, dtype=torch.float32) for N in widths]
    lora, x = GroupLoRA(A, B, None, [2.0] * len(widths), 0.0), meta(M, K)
    grad_ys = [meta(M, N) for N in widths]
    with counted(backend, patch) as forward:
        _, s = group.linear_nf4_lora_group(x, weights, [None] * len(widths), lora)
    with counted(backend, patch) as backward:
        group.linear_nf4_lora_group_backward(grad_ys, x, s, weights, lora, Needs())
    return (forward.launches, forward.passes), (backward.launches, backward.passes)


TRITON = pytest.param(
    "triton",
    marks=pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1",
        reason="TRITON_INTERPRET=1 interprets kernels instead of launching them",
    ),
)
QKV, GQA, GATE_UP = (4096, 4096, 4096), (4096, 1024, 1024), (14336, 14336)
COUNTS = {
    # (backend, widths): ((launches, passes) forward, the same backward) by additions, and by products over K + r
    ("triton", (4096,)): (((5, 3), (8, 4)), ((6, 2), (9, 3))),
    ("triton", QKV): (((14, 7), (22, 10)), ((14, 2), (21, 7))),
    ("triton", GQA): (((14, 4), (22, 8.5)), ((14, 2), (21, 4))),
    ("triton", GATE_UP): (((10, 15), (16, 12)), ((10, 2), (16, 12))),
    ("cuda", (4096,)): (((6, 3), (11, 5)), ((6, 2), (12, 4))),
    ("cuda", QKV): (((17, 7), (29, 13)), ((14, 2), (30, 10))),
    ("cuda", GQA): (((17, 4), (29, 10)), ((14, 2), (30, 5.5))),
    ("cuda", GATE_UP): (((12, 15), (21, 19)), ((10, 2), (21, 19))),
}


@pytest.mark.parametrize("widths", [(4096,), QKV, GQA, GATE_UP], ids=str)
@pytest.mark.parametrize("backend", [pytest.param("cuda", marks=needs_library), TRITON])
def test_launches_and_passes(backend: str, widths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    found = (count(backend, widths, False, monkeypatch), count(backend, widths, True, monkeypatch))
    assert found == COUNTS[backend, widths]


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        pytest.param("cuda", ((4, 0), (13, 4)), marks=needs_library),
        pytest.param("triton", ((2, 0), (9, 3)), marks=TRITON.marks),
    ],
)
def test_launches_and_passes_of_a_merged_update(
    backend: str, expected: tuple[Count, Count], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward reads and writes nothing but the operands of its product; backward reads x twice and grad_y."""
    module = importlib.import_module(f"qlora_kernels.backends.{backend}.linear_nf4_lora_merged")
    lora = LoRA(meta(16, K, dtype=torch.float32), meta(4096, 16, dtype=torch.float32), None, 2.0, 0.0)
    with counted(backend, monkeypatch) as forward:
        module.linear_nf4_lora_merged(meta(M, K), weight(4096), None, lora)
    with counted(backend, monkeypatch) as backward:
        module.linear_nf4_lora_merged_backward(meta(M, 4096), meta(M, K), weight(4096), lora, Needs())
    assert ((forward.launches, forward.passes), (backward.launches, backward.passes)) == expected
