"""The kernels of whole blocks, ops/gated_mlp.py and ops/lora_attention.py, in the native library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops.gated_mlp import GatedMLP, GatedMLPState
from ...ops.lora_attention import LoRAAttention, LoRAAttentionState
from ...ops.lora_projection import Projection
from ...ops.operands import WeightLists
from ...ops.registry import Problem
from ...ops.residual_block import BlockGradients, BlockNorm, NodeNeeds
from ...ops.tensor_memory import contiguous

_C = torch.ops.qlora_kernels_C


def unsupported(problem: Problem) -> list[str]:
    """Return why these kernels cannot run a Problem."""
    return ["each projection has its own dropout mask"] if problem.dropout else []


def gated_mlp(x: Tensor, mlp: GatedMLP) -> tuple[Tensor, GatedMLPState]:
    """Return (y [M, K'], the state for backward)."""
    projections = mlp.projections
    y, n, scale, gate, up, s, h, s_h = _C.cpu_gated_mlp(
        x, *_norm(mlp.norm), *_weights(projections), _biases(projections), *_adapters(projections), mlp.activation
    )
    kept_n, kept_scale = (None, None) if mlp.norm is None else (n, scale)
    return y, GatedMLPState(kept_n, kept_scale, gate, up, None if mlp.down.lora is None else h, s_h, (s,))


def gated_mlp_backward(
    grad_y: Tensor, x: Tensor, mlp: GatedMLP, state: GatedMLPState, needs: NodeNeeds
) -> BlockGradients:
    """Return the gradients of x, of the norm's weight and of the factors."""
    projections, (s,) = mlp.projections, state.of_input
    n, scale, gate, up, h, s_h, _ = state
    weight, _, offset = _norm(mlp.norm)
    results = _C.cpu_gated_mlp_backward(
        grad_y,
        x,
        weight,
        offset,
        n,
        scale,
        gate,
        up,
        s,
        h,
        s_h,
        *_weights(projections),
        *_adapters(projections),
        mlp.activation,
        *_flags(needs),
    )
    return _gradients(projections, mlp.norm, needs, *results)


def lora_attention(x: Tensor, attention: LoRAAttention) -> tuple[Tensor, LoRAAttentionState]:
    """Return (y [M, K'], the state for backward)."""
    projections = attention.projections
    y, n, scale, q, k, v, out, log_sums, s, s_o = _C.cpu_lora_attention(
        x,
        *_norm(attention.norm),
        *_weights(projections),
        _biases(projections),
        *_adapters(projections),
        *_heads(attention),
    )
    kept_n, kept_scale = (None, None) if attention.norm is None else (n, scale)
    return y, LoRAAttentionState(kept_n, kept_scale, q, k, v, out, log_sums, s_o, (s,))


def lora_attention_backward(
    grad_y: Tensor, x: Tensor, attention: LoRAAttention, state: LoRAAttentionState, needs: NodeNeeds
) -> BlockGradients:
    """Return the gradients of x, of the norm's weight and of the factors."""
    projections, (s,) = attention.projections, state.of_input
    n, scale, q, k, v, out, log_sums, s_o, _ = state
    weight, _, offset = _norm(attention.norm)
    results = _C.cpu_lora_attention_backward(
        grad_y,
        x,
        weight,
        offset,
        n,
        scale,
        q,
        k,
        v,
        out,
        log_sums,
        s,
        s_o,
        *_weights(projections),
        *_adapters(projections),
        *_heads(attention),
        *_flags(needs),
    )
    return _gradients(projections, attention.norm, needs, *results)


def _norm(norm: BlockNorm | None) -> tuple[Tensor | None, float, float]:
    return (None, 0.0, 0.0) if norm is None else (norm.weight, norm.eps, norm.weight_offset)


def _weights(projections: Sequence[Projection]) -> WeightLists:
    return WeightLists.of([each.weight for each in projections])


def _biases(projections: Sequence[Projection]) -> list[Tensor | None]:
    return [None if each.bias is None else contiguous("linear_nf4", each.bias) for each in projections]


def _adapters(projections: Sequence[Projection]) -> tuple[list[Tensor | None], list[Tensor | None], list[float]]:
    loras = [each.lora for each in projections]
    return (
        [None if lora is None else lora.A for lora in loras],
        [None if lora is None else lora.B for lora in loras],
        [0.0 if lora is None else lora.scaling for lora in loras],
    )


def _heads(attention: LoRAAttention) -> tuple[Any, ...]:
    """Return the arguments from length to softcap."""
    cos, sin = (contiguous("lora_attention", angles) for angles in (attention.cos, attention.sin))
    return cos.shape[1], attention.head_dim, cos, sin, *attention.keys


def _flags(needs: NodeNeeds) -> tuple[bool, bool, list[int], list[int]]:
    """Return the needs of the library: of x, the norm's weight, A of the first projections and of the last, each B."""
    of_A, of_B = [*map(int, needs.factors[::2])], [*map(int, needs.factors[1::2])]
    return needs.x, needs.norm_weight, [max(of_A[:-1]), of_A[-1]], of_B


def _gradients(
    projections: Sequence[Projection],
    norm: BlockNorm | None,
    needs: NodeNeeds,
    grad_x: Tensor,
    grad_weight: Tensor,
    grads_A: Sequence[Tensor],
    grads_B: Sequence[Tensor],
) -> BlockGradients:
    """Return the library's results as gradients of the projections; it computes those of parameters in fp32."""
    ranks = [0 if each.lora is None else each.lora.r for each in projections[:-1]]
    of_first = torch.split(grads_A[0], ranks) if grads_A[0].numel() else [None] * len(ranks)
    factors: list[Tensor | None] = []
    for (A, B), grad_A, grad_B in zip(
        (each.factors for each in projections), [*of_first, grads_A[1]], grads_B, strict=True
    ):
        factors.append(None if A is None or grad_A is None else _as(grad_A, A))
        factors.append(None if B is None else _as(grad_B, B))
    weight = None if norm is None or not needs.norm_weight else _as(grad_weight, norm.weight)
    return grad_x if needs.x else None, weight, factors


def _as(gradient: Tensor, parameter: Tensor) -> Tensor:
    return gradient if parameter.dtype == torch.float32 else gradient.to(parameter.dtype)
