"""What LoRA linears keep for backward: x where grad_A is needed, s where grad_B is, and all gradients without them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import qlora_kernels as qk
from qlora_kernels.ops.operands import LoRA, weight_of
from tests.support.problems import gaussian, usable_backends
from tests.support.tolerances import assert_same_gradients

B, T, K, R = 2, 24, 128, 5
WIDTHS = (40, 24)
Leaves = dict[str, Tensor]


def weights(n: int) -> list[tuple[Tensor, qk.QuantState]]:
    return [qk.quantize_nf4(gaussian(N, K, seed=N)) for N in WIDTHS[:n]]


def single(leaves: Leaves, p: float) -> list[Tensor]:
    ((packed, state),) = weights(1)
    x, A, lora_B = leaves["x"], leaves["A"], leaves["B"]
    return [qk.linear_nf4_lora(x, packed, state, A, lora_B, scaling=2.0, dropout_p=p, seed=torch.tensor([7]))]


def multi(leaves: Leaves, p: float) -> list[Tensor]:
    ((packed, state),) = weights(1)
    adapter, scalings = torch.arange(B * T).remainder(3) - 1, torch.tensor([2.0, 0.5])
    factors = (torch.stack([leaves["A"], -leaves["A"]]), torch.stack([leaves["B"], 2 * leaves["B"]]))
    operands = (leaves["x"], packed, state, *factors, scalings, adapter)
    return [qk.linear_nf4_multi_lora(*operands, dropout_p=p, seed=torch.tensor([7]))]


def group(leaves: Leaves, p: float) -> list[Tensor]:
    packed, states = zip(*weights(2), strict=True)
    factors = ([leaves["A"], leaves["A2"]], [leaves["B"], leaves["B2"]])
    settings = {"scalings": [2.0, 0.5], "dropout_p": p, "seed": torch.tensor([7])}
    return qk.linear_nf4_lora_group(leaves["x"], packed, states, *factors, **settings)


def merged(leaves: Leaves, p: float) -> list[Tensor]:
    weight = weight_of("test", *weights(1)[0])
    lora = LoRA(leaves["A"], leaves["B"], None, 2.0, 0.0)
    return [torch.ops.qlora_kernels.linear_nf4_lora_merged(leaves["x"], *weight, None, *lora)]


CALLS: dict[str, Callable[[Leaves, float], list[Tensor]]] = {
    "linear_nf4_lora": single,
    "linear_nf4_multi_lora": multi,
    "linear_nf4_lora_group": group,
    "linear_nf4_lora_merged": merged,
}
FROZEN = ["A", "B", "AB", "x", "xA", "xB"]
cases = pytest.mark.parametrize("op", CALLS)
frozen_parts = pytest.mark.parametrize("frozen", FROZEN)


def leaves_of(op: str, frozen: str) -> Leaves:
    """Return x and the factors of the op's linears.   frozen: first letters of those without a gradient."""
    sizes = {"x": (B, T, K), "A": (R, K), "B": (WIDTHS[0], R)}
    if op == "linear_nf4_lora_group":
        sizes |= {"A2": (R + 1, K), "B2": (WIDTHS[1], R + 1)}
    leaves = {name: gaussian(*size, seed=i) for i, (name, size) in enumerate(sizes.items())}
    return {name: leaf.requires_grad_(name[0] not in frozen) for name, leaf in leaves.items()}


@contextmanager
def kept_sizes() -> Iterator[list[int]]:
    """Yield the numbers of elements of saved tensors of the size of x or s."""
    widths, sizes = (R, 2 * R + 1), []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() in (B * T * K, *(B * T * r for r in widths)) and tensor.is_floating_point():
            sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield sizes


@cases
@frozen_parts
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_only_rows_that_a_gradient_reads_are_kept(op: str, frozen: str, p: float) -> None:
    leaves = leaves_of(op, frozen)
    with kept_sizes() as sizes:
        CALLS[op](leaves, p)
    needs_A, needs_B = "A" not in frozen, "B" not in frozen
    s = B * T * (2 * R + 1 if op == "linear_nf4_lora_group" else R)
    if op == "linear_nf4_lora_merged":  # its backward computes s of x
        assert sizes == [B * T * K] * (needs_A or needs_B)
    else:
        assert sizes == [B * T * K] * needs_A + [s] * needs_B


def gradients(op: str, frozen: str, p: float) -> dict[str, Tensor]:
    leaves = leaves_of(op, frozen)
    learned = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    loss = sum(y.square().mean() for y in CALLS[op](leaves, p))
    return dict(zip(learned, torch.autograd.grad(loss, list(learned.values())), strict=True))


@contextmanager
def new_memory_is_nan() -> Iterator[None]:
    """Fill memory that is not initialized with NaN, so that a kernel that reads it returns NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@cases
@frozen_parts
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradients_are_those_without_frozen_parts(op: str, frozen: str, p: float) -> None:
    for backend in usable_backends(f"{op}_backward"):
        if backend == "triton" and (p, frozen) not in ((0.3, "A"), (0.0, "B")):
            continue  # the interpreter is slow
        with qk.use_backend(backend), new_memory_is_nan():
            every, found = gradients(op, "", p), gradients(op, frozen, p)
        assert found.keys() == {name for name in every if name[0] not in frozen}
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, every[name], rtol=1e-4, atol=1e-5, msg=f"{backend}: grad of {name}")


def second_derivatives(op: str, frozen: str, p: float, *, freeze: bool) -> dict[str, Tensor]:
    """Differentiate the gradients of what is not `frozen`.   freeze: whether the rest requires no gradient."""
    leaves = leaves_of(op, frozen if freeze else "")
    learned = {name: leaf for name, leaf in leaves.items() if name[0] not in frozen}
    loss = sum(y.square().mean() for y in CALLS[op](leaves, p))
    first = torch.autograd.grad(loss, list(learned.values()), create_graph=True)
    total = sum(grad.square().sum() for grad in first)
    return dict(zip(learned, torch.autograd.grad(total, list(learned.values())), strict=True))


@cases
@frozen_parts
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_second_derivatives(op: str, frozen: str, p: float) -> None:
    expected = second_derivatives(op, frozen, p, freeze=False)
    assert_same_gradients(second_derivatives(op, frozen, p, freeze=True), expected)


@pytest.mark.parametrize("op", [op for op in CALLS if op != "linear_nf4_lora_merged"])
def test_a_constant_s_is_detected(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """grad_B depends on x through s alone where lora_A is frozen."""
    module = importlib.import_module(f"qlora_kernels.ops.{op}")
    right = module.rows_to_save

    def with_constant_s(ctx: Any, x: Tensor, s: Tensor, *needs: bool) -> tuple[Tensor | None, Tensor | None]:
        ctx.mark_non_differentiable(s)
        return right(ctx, x, s, *needs)

    expected = second_derivatives(op, "A", 0.3, freeze=False)
    monkeypatch.setattr(module, "rows_to_save", with_constant_s)
    with pytest.raises(AssertionError):
        assert_same_gradients(second_derivatives(op, "A", 0.3, freeze=True), expected)


@cases
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", ["A", "B"])
def test_recomputed_in_backward(op: str, frozen: str, reentrant: bool) -> None:
    expected, leaves = gradients(op, frozen, 0.3), leaves_of(op, frozen)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(CALLS[op]({**leaves, "x": x}, 0.3))

    sum(y.square().mean() for y in checkpoint(run, leaves["x"], use_reentrant=reentrant)).backward()
    for name, gradient in expected.items():
        assert torch.equal(leaves[name].grad, gradient), name
