"""Definition of the forward and backward op of a LoRA linear, shared by the single- and multi-adapter ops.

Kernel contract, x [M, K] and grad_y [M, N] contiguous, M, N, K, r >= 1, lora's factors contiguous:

    <op>           run(x, weight, bias, lora) -> (y [M, N], s [M, r]) of x.dtype
    <op>_backward  run(grad_y, x, s, weight, lora, needs)
                   -> (grad_x [M, K] of x.dtype, grad_A, grad_B in lora_A's and lora_B's dtype)

needs: Needs. A kernel returns an empty tensor for a gradient that is not needed, and computes nothing for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from . import compose
from ._implement import compose_derivatives, differentiate, fake, implement
from ._linear import CONSTANTS, bias_only_output, flatten_to_2d, is_empty, problem_of, restore_leading_dims
from .checks import check_bias, check_grad_y, check_s, check_x
from .operands import LoRA, MultiLoRA, Needs, Weight
from .registry import select
from .tensor_memory import contiguous

Adapter = LoRA | MultiLoRA
Result = tuple[Tensor, Tensor]
"""Result of forward: (y [..., N], s [M, r])."""
Gradients = tuple[Tensor, Tensor, Tensor]
"""Result of backward: (grad_x [..., K], grad_A, grad_B), empty where not needed."""


@dataclass(frozen=True)
class LoRAOp:
    """The forward and backward op of a LoRA linear.

    name: of the forward op; the backward op is <name>_backward.   kind: the bundle of the adapters' arguments.
    check_adapter(op, x, weight, lora): raises ValueError or TypeError, naming the argument.
    constants: names of the float arguments in `kind` that must not require a gradient.
    """

    name: str
    kind: type[Adapter]
    check_adapter: Callable[..., None]
    constants: tuple[str, ...] = ()

    @cached_property
    def backward_name(self) -> str:
        """The name of the backward op."""
        return f"{self.name}_backward"

    def define(self, apply: Callable[..., Result]) -> None:
        """Define both ops. apply(x, weight, bias, lora, run): calls the forward op's torch.autograd.Function."""
        forward, backward = f"qlora_kernels::{self.name}", f"qlora_kernels::{self.backward_name}"
        weight, lora = Weight.schema(), self.kind.schema()
        torch.library.define(forward, f"(Tensor x, {weight}, Tensor? bias, {lora}) -> (Tensor, Tensor)")
        torch.library.define(
            backward,
            f"(Tensor grad_y, Tensor x, Tensor s, {weight}, {lora}, {Needs.schema()}) -> (Tensor, Tensor, Tensor)",
        )
        takes_forward = (Tensor, Weight, Tensor, self.kind)
        takes_backward = (Tensor, Tensor, Tensor, Weight, self.kind, Needs)
        implement(forward, takes_forward)(self.forward)
        implement(backward, takes_backward)(self.backward)
        fake(forward, takes_forward)(self.forward_fake)
        fake(backward, takes_backward)(self.backward_fake)
        constants = (*CONSTANTS, *self.constants)
        differentiate(forward, takes_forward, apply, compose=self.forward_composed, constants=constants)
        compose_derivatives(backward, takes_backward, self.backward_composed)

    def forward(self, x: Tensor, weight: Weight, bias: Tensor | None, lora: Adapter) -> Result:
        """Check the arguments, then run the selected kernel over x as a matrix."""
        self._check_forward(x, weight, bias, lora)
        if is_empty(x, weight):
            return bias_only_output(x, weight, bias), x.new_zeros((x.shape[:-1].numel(), lora.r))
        y, s = select(problem_of(self.name, x, weight, lora)).run(flatten_to_2d(x), weight, bias, _contiguous(lora))
        return restore_leading_dims(y, x), s

    def forward_fake(self, x: Tensor, weight: Weight, bias: Tensor | None, lora: Adapter) -> Result:
        """Return empty tensors with the shapes and dtypes of y and s."""
        self._check_forward(x, weight, bias, lora)
        return x.new_empty((*x.shape[:-1], weight.N)), x.new_empty((x.shape[:-1].numel(), lora.r))

    def forward_composed(self, x: Tensor, weight: Weight, bias: Tensor | None, lora: Adapter) -> Result:
        """Check the arguments, then compose y and s of torch's ops."""
        self._check_forward(x, weight, bias, lora)
        return compose.lora_linear(x, weight, bias, lora)

    def backward(self, grad_y: Tensor, x: Tensor, s: Tensor, weight: Weight, lora: Adapter, needs: Needs) -> Gradients:
        """Check the arguments, then run the selected kernel over grad_y and x as matrices."""
        self._check_backward(grad_y, x, s, weight, lora)
        if is_empty(x, weight):
            return needs.only(torch.zeros_like(x), torch.zeros_like(lora.A), torch.zeros_like(lora.B))
        run = select(problem_of(self.backward_name, x, weight, lora)).run
        grad_x, grad_A, grad_B = run(flatten_to_2d(grad_y), flatten_to_2d(x), s, weight, _contiguous(lora), needs)
        return restore_leading_dims(grad_x, x) if needs.need_grad_x else grad_x, grad_A, grad_B

    def backward_fake(
        self, grad_y: Tensor, x: Tensor, s: Tensor, weight: Weight, lora: Adapter, needs: Needs
    ) -> Gradients:
        """Return empty tensors with the shapes and dtypes of the gradients."""
        self._check_backward(grad_y, x, s, weight, lora)
        return needs.only(x.new_empty(x.shape), torch.empty_like(lora.A), torch.empty_like(lora.B))

    def backward_composed(
        self, grad_y: Tensor, x: Tensor, s: Tensor, weight: Weight, lora: Adapter, needs: Needs
    ) -> Gradients:
        """Check the arguments, then compose the gradients of torch's ops."""
        self._check_backward(grad_y, x, s, weight, lora)
        return compose.lora_backward(grad_y, x, s, weight, lora, needs)

    def _check_forward(self, x: Tensor, weight: Weight, bias: Tensor | None, lora: Adapter) -> None:
        check_x(self.name, x, weight)
        check_bias(self.name, bias, weight.N, x.device)
        self.check_adapter(self.name, x, weight, lora)

    def _check_backward(self, grad_y: Tensor, x: Tensor, s: Tensor, weight: Weight, lora: Adapter) -> None:
        op = self.backward_name
        check_x(op, x, weight)
        check_grad_y(op, grad_y, weight, x)
        self.check_adapter(op, x, weight, lora)
        check_s(op, s, x, lora.r)


def _contiguous(lora: Adapter) -> Adapter:
    """Return the adapter with contiguous factors, which kernels require."""
    if lora.A.is_contiguous() and lora.B.is_contiguous():
        return lora
    return lora._replace(A=contiguous("lora_A", lora.A), B=contiguous("lora_B", lora.B))
