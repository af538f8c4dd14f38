"""A block of a decoder layer as one autograd node, with the norm in front of it and the addition behind it:
y = x + block(norm(x)).

A backend may have one kernel for a whole block (`kernel_of`). Otherwise a node runs the kernels of the block's ops.
Either saves what these ops would save.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ._linear import flatten_to_2d, restore_leading_dims
from .dispatch_fast_path import below_autograd, is_plain_call
from .lora_projection import Projection, run_as_one_node, wanted, with_seeds
from .registry import KernelSpec, Problem, device_type, find, select
from .rms_norm import rms_norm


class BlockNorm(NamedTuple):
    """The arguments of the op rms_norm for the norm of a block's input.   weight: [C]."""

    weight: Tensor
    eps: float
    weight_offset: float

    def fits(self, x: Tensor) -> bool:
        """Whether the norm of x can run inside a node, with a result of x's dtype."""
        weight = self.weight
        return (
            weight.shape == x.shape[-1:]
            and weight.device == x.device
            and weight.is_contiguous()
            and (weight.dtype == x.dtype or self.weight_offset == 1.0)
            and self.eps >= 0
            and is_plain_call(weight)
        )


class NodeNeeds(NamedTuple):
    """The gradients that a node's backward has to compute: of x, of the norm's weight, and of each factor."""

    x: bool
    norm_weight: bool
    factors: Sequence[bool]

    @staticmethod
    def of(ctx: Any) -> NodeNeeds:
        """Return the needs of a node whose arguments are (block, x, norm_weight, *factors)."""
        _, x, norm_weight, *factors = ctx.needs_input_grad
        return NodeNeeds(x, norm_weight, factors)


BlockGradients = tuple[Tensor | None, Tensor | None, list[Tensor | None]]
"""Of x, of the norm's weight, and of lora_A and lora_B of each projection."""


class ResidualBlock(Protocol):
    """The parameters of a block, and its computation by the kernels of its ops and by the ops."""

    @property
    def op(self) -> str:
        """The name of the kernel that runs the whole block; "_backward" is appended for its gradients."""

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All linears of the block."""

    @property
    def norm(self) -> BlockNorm | None:
        """The norm of the input, to which the result is added, or None for neither."""

    @property
    def state_type(self) -> type[Any]:
        """The named tuple of what backward needs besides x and the parameters.

        Its last field, `of_input`, is the tuple that SharedInput saves. `kept(needs)` drops what the needed gradients
        do not read, and `complete(x)` puts other tensors in its place.
        """

    def with_projections(self, projections: Sequence[Projection], norm: BlockNorm | None) -> Any:
        """Return this block with other projections and another norm."""

    def fits(self, x: Tensor) -> bool:
        """Whether the block of x can run as one node."""

    def by_ops(self, n: Tensor) -> Tensor:
        """Compute block(n), without norm and addition, from ops that are differentiable to any order."""

    def run(self, rows: Tensor) -> tuple[Tensor, Any]:
        """Return (y, state) by the kernels of the ops, for x [M, K]."""

    def run_backward(self, grad_y: Tensor, rows: Tensor, state: Any, needs: NodeNeeds) -> BlockGradients:
        """Return the gradients by the kernels of the ops, for x [M, K]."""


def ops_save_input(projections: Sequence[Projection], norm: BlockNorm | None) -> bool:
    """Whether the ops of a block save its input for backward, as its node does, for the projections of the input."""
    loras = [each.lora for each in projections if each.lora is not None]
    return bool(loras) if norm is not None else any(lora.A.requires_grad for lora in loras)


def kernel_of(op: str, x: Tensor, projections: Sequence[Projection]) -> KernelSpec | None:
    """Return the kernel that runs a whole block, or None if the block's ops have to run one after the other."""
    dropout = any(each.lora is not None and each.lora.dropout_p > 0 for each in projections)
    return find(Problem(op, device_type(x), x.dtype, dropout=dropout))


def normalized(rows: Tensor, norm: BlockNorm | None) -> tuple[Tensor, Tensor | None]:
    """Return (norm(rows), scale) by the kernel of rms_norm, or (rows, None) without a norm."""
    if norm is None:
        return rows, None
    run = select(Problem("rms_norm", rows.device.type, rows.dtype)).run
    n, _, scale = run(rows, None, norm.weight, norm.eps, norm.weight_offset)
    return n, scale


def normalized_backward(
    grad_n: Tensor | None, grad_y: Tensor, rows: Tensor, norm: BlockNorm | None, scale: Tensor | None, needs: NodeNeeds
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of rows and of the norm's weight, for grad_n of norm(rows) and grad_y of the block."""
    if norm is None or grad_n is None:
        return grad_n, None
    run = select(Problem("rms_norm_backward", rows.device.type, rows.dtype)).run
    grad_x, grad_weight = run(
        grad_n, grad_y, rows, norm.weight, scale, norm.weight_offset, need_grad_weight=needs.norm_weight
    )
    return grad_x, grad_weight if needs.norm_weight else None


def apply_block(x: Tensor, block: ResidualBlock, node: type[BlockFunction]) -> Tensor:
    """Return x + block(norm(x)), or block(x) without a norm, for x [..., K].

    node: the autograd function, if the block can run as one node; its ops run otherwise, and raise the errors for
    operands that do not fit.
    """
    block = block.with_projections(with_seeds(block.projections, x.device), block.norm)
    factors = [factor for projection in block.projections for factor in projection.factors]
    norm_weight = None if block.norm is None else block.norm.weight
    if not block.fits(x) or not run_as_one_node(x, block.projections):
        return _by_ops(block, x, norm_weight, *factors)
    y: Tensor = node.apply(block, x, norm_weight, *factors)  # type: ignore[no-untyped-call]
    return y


class BlockFunction(torch.autograd.Function):
    """The result of a block and its gradients. Each block has a subclass, whose name profilers show."""

    @staticmethod
    def forward(
        ctx: Any, block: ResidualBlock, x: Tensor, norm_weight: Tensor | None, *factors: Tensor | None
    ) -> Tensor:
        """Return y, and save what the ops would save."""
        with below_autograd():
            rows = flatten_to_2d(x)
            ctx.is_one_kernel = (kernel := kernel_of(block.op, x, block.projections)) is not None
            y, state = block.run(rows) if kernel is None else kernel.run(rows, block)
            state = state.kept(NodeNeeds.of(ctx))
            ctx.save_for_backward(x, norm_weight, *factors, *state[:-1], *state.of_input)
            ctx.block = block
            return restore_leading_dims(y, x)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of (block, x, norm_weight, *factors)."""
        block: ResidualBlock = ctx.block
        x, norm_weight, *rest = ctx.saved_tensors
        factors_end = 2 * len(block.projections)
        state_end = factors_end + len(block.state_type._fields) - 1
        factors, state_tensors, of_input = rest[:factors_end], rest[factors_end:state_end], tuple(rest[state_end:])
        if torch.is_grad_enabled() or not is_plain_call(grad_y):
            return _gradients_by_ops(block, ctx, grad_y, x, norm_weight, *factors)
        block, needs = _with_tensors(block, norm_weight, factors), NodeNeeds.of(ctx)
        with below_autograd():
            kernel = kernel_of(f"{block.op}_backward", x, block.projections) if ctx.is_one_kernel else None
            rows, grad_rows = flatten_to_2d(x), flatten_to_2d(grad_y)
            state = block.state_type(*state_tensors, of_input).complete(rows)
            if kernel is None:
                grad_x, grad_weight, grads = block.run_backward(grad_rows, rows, state, needs)
            else:
                grad_x, grad_weight, grads = kernel.run(grad_rows, rows, block, state, needs)
            grad_x = None if grad_x is None else restore_leading_dims(grad_x, x)
        return None, grad_x, grad_weight, *wanted(grads, needs.factors)


def _with_tensors(block: ResidualBlock, norm_weight: Tensor | None, factors: Sequence[Tensor | None]) -> ResidualBlock:
    """Return the block with the norm's weight and the factors of its projections as autograd has them."""
    projections = [each.with_factors(*factors[2 * i : 2 * i + 2]) for i, each in enumerate(block.projections)]
    norm = None if block.norm is None or norm_weight is None else block.norm._replace(weight=norm_weight)
    with_them: ResidualBlock = block.with_projections(projections, norm)
    return with_them


def _by_ops(block: ResidualBlock, *inputs: Tensor | None) -> Tensor:
    """Compute the block of (x, the norm's weight, *factors) from ops that are differentiable to any order."""
    x, norm_weight, *factors = inputs
    assert x is not None
    block = _with_tensors(block, norm_weight, factors)
    if block.norm is None:
        return block.by_ops(x)
    n, _ = rms_norm(x, block.norm.weight, block.norm.eps, weight_offset=block.norm.weight_offset)
    return x + block.by_ops(n)


def _gradients_by_ops(
    block: ResidualBlock, ctx: Any, grad_y: Tensor, *inputs: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a node's arguments (block, *inputs), which can be differentiated in turn.

    inputs: x, the norm's weight and the factors.   ctx: of the node, for the gradients it needs.
    """
    needed = ctx.needs_input_grad[1 : 1 + len(inputs)]
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        given = [
            t if create_graph or t is None else t.detach().requires_grad_(need)
            for t, need in zip(inputs, needed, strict=True)
        ]
        sources = [t for t, need in zip(given, needed, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(_by_ops(block, *given), sources, grad_y, create_graph=create_graph))
    return None, *[next(found) if need else None for need in needed]
