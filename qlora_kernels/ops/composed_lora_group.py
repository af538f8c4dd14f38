"""linear_nf4_lora_group composed of a backend's linear_nf4_lora, which runs once for each linear with one seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .operands import GroupLoRA, Needs, Weight
from .tensor_memory import check_memory


def compose_lora_group(
    linear_nf4_lora: Callable[..., tuple[Tensor, Tensor]],
    linear_nf4_lora_backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
) -> tuple[Callable[..., tuple[list[Tensor], Tensor]], Callable[..., tuple[Tensor, Tensor, list[Tensor]]]]:
    """Return linear_nf4_lora_group and its backward op, composed of one backend's single-linear kernels."""

    def linear_nf4_lora_group(
        x: Tensor, weights: Sequence[Weight], biases: Sequence[Tensor | None], lora: GroupLoRA
    ) -> tuple[list[Tensor], Tensor]:
        """Return (ys, s)."""
        results = [linear_nf4_lora(x, *each) for each in zip(weights, biases, lora.split_per_linear(), strict=True)]
        return [y for y, _ in results], torch.cat([part for _, part in results], dim=1)

    def linear_nf4_lora_group_backward(
        grad_ys: Sequence[Tensor],
        x: Tensor,
        s: Tensor,
        weights: Sequence[Weight],
        lora: GroupLoRA,
        needs: Needs,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Return (grad_x, grad_A, grads of B), empty where not needed."""
        grad_x, grads_A, grads_B = x.new_empty(0), [], []
        for grad_y, part, weight, member in zip(
            grad_ys, split_by_rank(s, lora), weights, lora.split_per_linear(), strict=True
        ):
            of_x, of_A, of_B = linear_nf4_lora_backward(grad_y, x, part, weight, member, needs)
            grad_x = grad_x.add_(of_x) if grad_x.numel() else of_x
            grads_A.append(of_A)
            grads_B.append(of_B)
        return grad_x, torch.cat(grads_A), grads_B

    return linear_nf4_lora_group, linear_nf4_lora_group_backward


def split_by_rank(s: Tensor, lora: GroupLoRA) -> list[Tensor]:
    """Split s [M, sum of r_i] into one contiguous [M, r_i] for each linear."""
    check_memory("linear_nf4_lora_group_backward", s)
    return [part.contiguous() for part in torch.split(s, lora.ranks, dim=1)]
