"""All ops in plain torch, on any device: the reference of the tests, and the fallback for unsupported problems."""

from __future__ import annotations

from ...ops import composed_lora_group, composed_merged_lora, composed_multi_lora
from ...ops.registry import KernelPlan, KernelSpec, Problem, supports_all
from .adamw_step import adamw_step
from .attention import attention, attention_backward
from .codec import dequantize_nf4, quantize_absmax, quantize_nf4
from .elementwise import glu, glu_backward, rms_norm, rms_norm_backward, rope
from .linear_cross_entropy import linear_cross_entropy
from .linear_nf4 import linear_nf4, linear_nf4_grad_x
from .linear_nf4_lora import linear_nf4_lora, linear_nf4_lora_backward

_FUNCTIONS = (
    quantize_nf4,
    quantize_absmax,
    dequantize_nf4,
    linear_nf4,
    linear_nf4_grad_x,
    linear_nf4_lora,
    linear_nf4_lora_backward,
    *composed_multi_lora.compose_multi_lora(linear_nf4, linear_nf4_grad_x),
    *composed_lora_group.compose_lora_group(linear_nf4_lora, linear_nf4_lora_backward),
    *composed_merged_lora.compose_lora_merged(dequantize_nf4),
    adamw_step,
    rms_norm,
    rms_norm_backward,
    rope,
    glu,
    glu_backward,
    linear_cross_entropy,
    attention,
    attention_backward,
)


def _plan(problem: Problem) -> KernelPlan:
    return KernelPlan("torch operations over the dequantized weight", {}, "runs where no other backend can")


KERNELS = tuple(
    KernelSpec(function.__name__, "reference", function, supports_all, priority=lambda problem: -2, plan=_plan)
    for function in _FUNCTIONS
)


def unavailable() -> str | None:
    """Return None: this backend needs only torch and can always run."""
    return None
