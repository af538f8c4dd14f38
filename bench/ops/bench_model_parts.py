"""model_parts: the parts between a model's linear layers, forward and backward, against transformers and torch.

One call computes the part and its input gradients, as a training step does; the weights of norms are frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import qlora_kernels as qk

from ..layers import gaussian
from ..registry import WARM, Call, Case, Contender, Cost, Suite

EPS = 1e-5
TOKENS = 1024
HEAD_DIM = 64
WIDTHS = {"rms_norm": (576, 2048), "swiglu": (1536, 8192), "geglu": (1536, 8192), "rope": (9, 32)}
"""Hidden sizes, intermediate sizes and heads of SmolLM2-135M and of a 1 B Llama."""

TENSORS_MOVED = {"rms_norm": 4 + 4, "swiglu": 3 + 5, "geglu": 3 + 5, "rope": 2 + 2}
"""Number of tensors of the part's size that forward and backward read or write, each counted once."""


@dataclass(frozen=True)
class Inputs:
    """Tensors of a case: inputs with a gradient, constants, and the gradients of the results."""

    trained: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]


def cases(device: str) -> Iterator[Case]:
    """Yield every part at both sizes."""
    for part, widths in WIDTHS.items():
        for width in widths:
            yield Case("model_parts", M=TOKENS, N=width, device=device, label=f"{part} {width}", quick=width < 1000)


def part_of(case: Case) -> str:
    """Return the part, the first word of the label."""
    return case.label.split()[0]


def elements(case: Case) -> int:
    """Return the elements of one tensor of the part; k counts as a third of q in rope."""
    per_token = case.N * HEAD_DIM * 4 // 3 if part_of(case) == "rope" else case.N
    return case.M * per_token


def cost(case: Case) -> Cost:
    """Return the cost of reading or writing each tensor once."""
    return Cost(TENSORS_MOVED[part_of(case)] * elements(case) * case.dtype.itemsize, 0, "copy")


def inputs(case: Case) -> Inputs:
    """Return two tensors with a gradient for every part: x and residual, gate and up, q and k."""

    def random(*shape: int, seed: int) -> Tensor:
        return gaussian(*shape, dtype=case.dtype, device=case.device, seed=seed)

    if part_of(case) == "rope":
        shapes = [(4, case.M // 4, heads, HEAD_DIM) for heads in (case.N, max(case.N // 3, 1))]
        q, k = (random(*shape, seed=i).transpose(1, 2) for i, shape in enumerate(shapes))
        angles = random(1, case.M // 4, HEAD_DIM // 2, seed=2).repeat(1, 1, 2)
        grads = tuple(random(*shape, seed=3 + i).transpose(1, 2) for i, shape in enumerate(shapes))
        return Inputs((q.requires_grad_(), k.requires_grad_()), (angles.cos(), angles.sin()), grads)
    first, second, grad, other = (random(case.M, case.N, seed=seed) for seed in range(4))
    if part_of(case) == "rms_norm":
        weight = torch.ones(case.N, dtype=case.dtype, device=case.device)
        return Inputs((first.requires_grad_(), second.requires_grad_()), (weight,), (grad, other))
    return Inputs((first.requires_grad_(), second.requires_grad_()), (), (grad,))


Part = Callable[..., tuple[Tensor, ...]]


def _llama_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    s = x + residual
    wide = s.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * wide.to(s.dtype), s


def _torch_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    s = x + residual
    return F.rms_norm(s, (s.shape[-1],), weight, EPS), s


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-b, a], dim=-1) * sin[:, None]


OURS: dict[str, Part] = {
    "rms_norm": lambda x, residual, weight: qk.rms_norm(x, weight, EPS, residual=residual),
    "swiglu": lambda gate, up: (qk.glu(gate, up, "silu"),),
    "geglu": lambda gate, up: (qk.glu(gate, up, "gelu_tanh"),),
    "rope": qk.rope,
}
TRANSFORMERS: dict[str, Part] = {
    "rms_norm": _llama_norm,
    "swiglu": lambda gate, up: (F.silu(gate) * up,),
    "geglu": lambda gate, up: (F.gelu(gate, approximate="tanh") * up,),
    "rope": lambda q, k, cos, sin: (_rotated(q, cos, sin), _rotated(k, cos, sin)),
}
TORCH: dict[str, Part] = {"rms_norm": _torch_norm}


def contender(name: str, parts: dict[str, Part]) -> Contender:
    """Return one implementation, for the parts that it has."""

    def run(case: Case, made: Inputs) -> tuple[Tensor, ...]:
        results = parts[part_of(case)](*made.trained, *made.constants)
        return (*results, *torch.autograd.grad(results, made.trained, made.grads))

    def build(case: Case, made: Any, copies: int) -> Sequence[Call]:
        return [partial(run, case, made)] * copies

    return Contender(
        name, build, lambda case: elements(case) * case.dtype.itemsize, lambda case: part_of(case) in parts
    )


def verify(case: Case, made: Inputs, name: str, results: tuple[Tensor, ...]) -> None:
    """Compare with transformers' formula in fp32, within a few roundings of the dtype."""
    wide = Inputs(*(tuple(t.detach().float() for t in group) for group in (made.trained, made.constants, made.grads)))
    with torch.enable_grad():
        leaves = tuple(t.requires_grad_() for t in wide.trained)
        expected = TRANSFORMERS[part_of(case)](*leaves, *wide.constants)
        expected = (*expected, *torch.autograd.grad(expected, leaves, wide.grads))
    bound = 8 * torch.finfo(case.dtype).eps
    for actual, right in zip(results, expected, strict=True):
        error = (actual.float() - right).abs().max() / right.abs().max()
        assert error <= bound, f"{name}: off by {error:.1e} of the largest element, more than {bound:.1e}"


SUITE = Suite(
    op="model_parts",
    cases=cases,
    cost=cost,
    inputs=inputs,
    contenders=(
        contender("ours", OURS),
        contender("transformers", TRANSFORMERS),
        contender("torch", TORCH),
    ),
    verify=verify,
    modes=(WARM,),
)
