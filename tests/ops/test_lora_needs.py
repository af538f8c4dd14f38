"""Backward of the LoRA ops computes nothing for gradients that are not needed: products and launches are counted."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import qlora_kernels as qk
from qlora_kernels.ops import compose
from qlora_kernels.ops.operands import GroupLoRA, LoRA, MultiLoRA, Needs, Weight, weight_of
from qlora_kernels.ops.registry import kernels_of
from tests.cuda.launching import load_bindings, needs_library
from tests.support.op_recorder import OpResults
from tests.support.problems import gaussian, usable_backends

M, N, K, R = 48, 40, 128, 5
EVERY_NEED = [Needs(*flags) for flags in product((False, True), repeat=3)]
needs_of_op = pytest.mark.parametrize("needs", EVERY_NEED, ids=lambda needs: "".join("01"[flag] for flag in needs))
SINGLE, MERGED, MULTI, GROUP = (
    f"linear_nf4_{kind}_backward" for kind in ("lora", "lora_merged", "multi_lora", "lora_group")
)
BY_TORCH = [("reference", op) for op in (SINGLE, MERGED, MULTI, GROUP)] + [("cpu", MERGED), ("cpu", MULTI)]
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def arguments(op: str, needs: Needs, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Return the arguments of a kernel. Everything that only gradients read which are not needed is NaN."""
    weight = weight_of("test", *qk.quantize_nf4(gaussian(N, K, seed=1)))
    x, s, grad_y = (gaussian(*size, seed=seed, dtype=dtype) for size, seed in (((M, K), 2), ((M, R), 3), ((M, N), 4)))
    E = (2,) if op == MULTI else ()
    A, B = gaussian(*E, R, K, seed=5), gaussian(*E, N, R, seed=6)
    merged_s = op == MERGED and needs.need_grad_B  # its backward computes s of x and A
    if not needs.need_grad_B:
        s = torch.full_like(s, torch.nan)
    if not (needs.need_grad_A or merged_s):
        x = torch.full_like(x, torch.nan)
    if not needs.need_ds:
        B = torch.full_like(B, torch.nan)
    if not (needs.need_grad_x or merged_s):
        A = torch.full_like(A, torch.nan)
    if not needs.need_grad_x:
        weight = weight._replace(absmax_offset=torch.full_like(weight.absmax_offset, torch.nan))
    if op == MERGED:
        return grad_y, x, weight, LoRA(A, B, None, 2.0, 0.0), needs
    if op == MULTI:
        adapter = torch.arange(M).remainder(3) - 1
        return grad_y, x, s, weight, MultiLoRA(A, B, torch.tensor([2.0, 0.5]), adapter, None, 0.0), needs
    if op == GROUP:
        return [grad_y], x, s, [weight], GroupLoRA(A, [B], None, [2.0], 0.0), needs
    return grad_y, x, s, weight, LoRA(A, B, None, 2.0, 0.0), needs


def flat(results: tuple[Any, ...]) -> list[Tensor]:
    return [each[0] if isinstance(each, (list, tuple)) else each for each in results]


@pytest.mark.parametrize("op", [SINGLE, MERGED, MULTI, GROUP])
@needs_of_op
def test_results_read_only_what_they_need(op: str, needs: Needs) -> None:
    for backend in usable_backends(op):
        if backend == "triton" and sum(needs) == 2:
            continue  # the interpreter is slow; its launches are counted below for all needs
        run = kernels_of(backend)[op].run
        every, found = flat(run(*arguments(op, Needs()))), flat(run(*arguments(op, needs)))
        for expected, result, need, factor in zip(every, found, needs, ("x", "A", "B"), strict=True):
            if need:
                torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4, msg=f"{backend}: grad_{factor}")
            else:
                assert result.numel() == 0, f"{backend}: grad_{factor}"


class Products(TorchDispatchMode):
    """Counts torch's matrix products by the shape of their result.

    calls_library: whether the native libraries are called; otherwise, their products of low-rank factors are counted.
    """

    def __init__(self, *, calls_library: bool = True) -> None:
        super().__init__()
        self.counts: Counter[tuple[int, ...]] = Counter()
        self.calls_library = calls_library

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        library, name = function._schema.name.split("::")
        if library == "qlora_kernels_C" and not self.calls_library:
            self.counts[M, R] += name == "cuda_lora_down"
            return 1 if name == "cuda_linear_nf4_gemm_splits" else None
        result = function(*args, **(kwargs or {}))
        if name in ("mm", "addmm", "addmm_", "bmm"):
            self.counts[tuple(result.shape)] += 1
        return result


def check_products(
    counts: Counter[tuple[int, ...]], op: str, needs: Needs, *, members: int = 1, apart: bool = False
) -> None:
    """Compare the products with those of the formulas.

    members: of adapters, each with a part of the rows.   apart: the merged op keeps the update apart, as others do.
    """
    rows = M // 3 if members > 1 else M
    s_again = op == MERGED and needs.need_grad_B
    need_ds = needs.need_grad_A if op == MERGED and not apart else needs.need_ds
    assert counts[N, R] == members * needs.need_grad_B
    assert counts[R, K] == members * needs.need_grad_A
    assert counts[rows, R] == members * (need_ds + s_again)
    assert (counts[rows, K] > 0) == needs.need_grad_x
    assert needs.need_grad_x or counts[N, K] == 0  # B A, where the update is added to the weight


@pytest.mark.parametrize(("backend", "op"), BY_TORCH, ids=str)
@needs_of_op
def test_products_of_torch(backend: str, op: str, needs: Needs) -> None:
    values = arguments(op, needs)
    with Products() as products:
        kernels_of(backend)[op].run(*values)
    check_products(products.counts, op, needs, members=2 if op == MULTI else 1)


@pytest.mark.parametrize("kind", [LoRA, MultiLoRA])
@needs_of_op
def test_products_of_composed_derivatives(kind: type, needs: Needs) -> None:
    """They serve second derivatives, and recompute s = x A^T for grad_B where A is trained."""
    grad_y, x, s, weight, lora, _ = arguments(MULTI if kind is MultiLoRA else SINGLE, Needs())
    with Products() as products:
        results = compose.lora_backward(grad_y, x, s, weight, lora, needs)
    members = 2 if kind is MultiLoRA else 1
    assert products.counts[N, R] == members * needs.need_grad_B
    assert products.counts[R, K] == members * needs.need_grad_A
    assert products.counts[M, R] == members * (needs.need_ds + (needs.need_grad_A and needs.need_grad_B))
    assert (products.counts[M, K] > 0) == needs.need_grad_x
    assert [result.numel() > 0 for result in results] == [*needs]


def to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("meta")
    if hasattr(value, "_fields"):
        return value._make(map(to_meta, value))
    return [to_meta(each) for each in value] if isinstance(value, list) else value


@needs_library
@pytest.mark.parametrize("path", ["fused", "decode"])
@pytest.mark.parametrize("op", [SINGLE, MERGED, GROUP])
@needs_of_op
def test_products_of_the_cuda_backend(op: str, path: str, needs: Needs, monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta tensors; the base product of the path `fused` is a kernel of the library."""
    load_bindings()
    backend = importlib.import_module("qlora_kernels.backends.cuda")
    routing, products_module, linear = (
        importlib.import_module(f"{backend.__name__}.{name}") for name in ("routing", "torch_products", "linear_nf4")
    )
    run = getattr(backend, op)
    monkeypatch.setattr(products_module, "in_fp32", lambda a, b: a @ b)
    monkeypatch.setattr(linear, "_multiprocessors", lambda device: 108)
    values = to_meta(arguments(op, Needs(), torch.bfloat16))[:-1]
    with routing.use_path(path), Products(calls_library=False) as products:
        results = run(*values, needs)
    assert [result.numel() > 0 for result in flat(results)] == [*needs]
    fused = path == "fused"
    check_products(products.counts + Counter({(M, K): fused and needs.need_grad_x}), op, needs, apart=fused)


@contextmanager
def triton_launches() -> Iterator[list[str]]:
    """Yield the launched kernels by name; those of ds and grad_B with what they compute."""
    from triton.runtime.jit import JITFunction

    launches: list[str] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **flags: Any) -> None:
        computed = "".join(f" {flag}" for flag in ("DS", "GRAD_B") if flags.get(flag))
        launches.append(kernel.__name__.removesuffix("_kernel") + computed)

    with mock.patch.object(JITFunction, "run", run):
        yield launches


def expected_launches(op: str, path: str, needs: Needs) -> set[str]:
    """Return the launches of a backward of each need, without those that add partial sums."""
    separate = op == MERGED and path == "decode"  # the decoder adds the update, so that grad_x needs no ds
    need_ds = needs.need_grad_A if separate else needs.need_ds
    launches = set()
    if op == MULTI:
        flags = " DS" * need_ds + " GRAD_B" * needs.need_grad_B
        launches |= {f"multi_lora_ds_grad_B{flags}"} if flags else set()
        launches |= {"multi_lora_grad_A"} if needs.need_grad_A else set()
    else:
        launches |= {"lora_ds_grad_B DS" if need_ds else "lora_ds_grad_B"} if needs.need_grad_B else set()
        launches |= {"lora_down"} if need_ds and not needs.need_grad_B else set()
        launches |= {"lora_down"} if op == MERGED and needs.need_grad_B else set()
        launches |= {"lora_grad_A"} if needs.need_grad_A else set()
    if needs.need_grad_x:
        base = {"fused": "linear_nf4_grad_x", "decode": "merge_lora" if op == MERGED else "dequantize_nf4"}
        launches |= {base[path]} | ({"multi_lora_up"} if op == MULTI else set())
    return launches


@pytest.mark.skipif(TRITON_INTERPRETED, reason="TRITON_INTERPRET=1 interprets kernels instead of launching them")
@pytest.mark.parametrize("path", ["fused", "decode"])
@pytest.mark.parametrize("op", [SINGLE, MERGED, MULTI, GROUP])
@needs_of_op
def test_launches_of_the_triton_backend(op: str, path: str, needs: Needs) -> None:
    pytest.importorskip("triton")
    planner = importlib.import_module("qlora_kernels.backends.triton.planner")
    backend = importlib.import_module("qlora_kernels.backends.triton")
    run: Callable[..., Any] = getattr(importlib.import_module(f"{backend.__name__}.{backend._MODULES[op]}"), op)
    values = to_meta(arguments(op, Needs(), torch.bfloat16))[:-1]
    plan = planner.Plan("decode") if path == "decode" else planner.Plan("fused", 64, 64, 64)
    with planner.use_plan("linear_nf4_grad_x", plan), triton_launches() as launches:
        results = run(*values, needs)
    assert [result.numel() > 0 for result in flat(results)] == [*needs]
    assert set(launches) - {"sum_partials", "lora_up"} == expected_launches(op, path, needs)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_autograd_tells_the_merged_op_what_it_needs(frozen: str) -> None:
    packed, state = qk.quantize_nf4(gaussian(N, K, seed=1))
    leaves = {"x": gaussian(M, K), "lora_A": gaussian(R, K, seed=5), "lora_B": gaussian(N, R, seed=6)}
    learned = [leaf.requires_grad_() for name, leaf in leaves.items() if name != frozen]
    weight: Weight = weight_of("test", packed, state)
    lora = LoRA(leaves["lora_A"], leaves["lora_B"], None, 2.0, 0.0)
    with qk.use_backend("reference"), OpResults("linear_nf4_lora_merged_backward") as backward:
        y = torch.ops.qlora_kernels.linear_nf4_lora_merged(leaves["x"], *weight, None, *lora)
        grads = torch.autograd.grad(y.sum(), learned)
    ((_, grad_A, grad_B),) = backward.results
    assert [grad_A.numel() > 0, grad_B.numel() > 0] == [frozen != "lora_A", frozen != "lora_B"]
    assert torch.equal(grads[-1], grad_B if frozen == "lora_A" else grad_A)
