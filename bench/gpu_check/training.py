"""Training step: forward and backward of a few decoder layers with LoRA on every linear, by implementation.

The layers are plain torch with the shapes of Llama-3-8B: attention by torch's kernel, RMSNorm, SwiGLU. No model library
is needed. Rows: tokens a second and peak bytes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import qlora_kernels as qk

from . import rows as rows_module
from .rows import Rows, step_arguments

R, SCALING = 16, 2.0
DROPOUT = (0.0, 0.05)
SECONDS = 8.0
"""Seconds for one implementation, including warm-up."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder layer and its batch."""

    tokens: int = 4096
    width: int = 4096
    hidden: int = 14336
    heads: int = 32
    kv_heads: int = 8
    layers: int = 4

    @property
    def kv(self) -> int:
        """The width of keys and of values."""
        return self.width // self.heads * self.kv_heads

    @property
    def weights(self) -> tuple[tuple[int, int], ...]:
        """The different shapes [N, K] of a layer's weights."""
        return (self.width, self.width), (self.kv, self.width), (self.hidden, self.width), (self.width, self.hidden)


class Linear:
    """A frozen weight with LoRA factors, and the implementation of its product."""

    def __init__(self, N: int, K: int, way: str) -> None:
        w = torch.randn(N, K, device=rows_module.DEVICE, dtype=torch.bfloat16) / K**0.5
        self.A = (torch.randn(R, K, device=rows_module.DEVICE) / K**0.5).requires_grad_()
        self.B = torch.zeros(N, R, device=rows_module.DEVICE).requires_grad_()
        self.way = way
        if way == "dense":
            self.w = w
        else:
            self.packed, self.state = qk.quantize_nf4(w)

    def __call__(self, x: Tensor, dropout_p: float) -> Tensor:
        if self.way == "fused op":
            y: Tensor = qk.linear_nf4_lora(
                x, self.packed, self.state, self.A, self.B, scaling=SCALING, dropout_p=dropout_p
            )
            return y
        # As in PEFT's layers, over the dense weight or over a frozen 4-bit layer.
        base = x @ self.w.T if self.way == "dense" else qk.linear_nf4(x, self.packed, self.state)
        dropped = torch.nn.functional.dropout(x, dropout_p)
        low_rank: Tensor = (dropped @ self.A.to(x.dtype).T) @ self.B.to(x.dtype).T * SCALING
        return torch.add(base, low_rank)


class Layer:
    """A decoder layer without position embedding, which would be the same in all implementations."""

    def __init__(self, sizes: Sizes, way: str) -> None:
        kv = sizes.kv
        self.sizes = sizes
        self.norm = torch.ones(sizes.width, device=rows_module.DEVICE, dtype=torch.bfloat16)
        self.q, self.o = Linear(sizes.width, sizes.width, way), Linear(sizes.width, sizes.width, way)
        self.k, self.v = Linear(kv, sizes.width, way), Linear(kv, sizes.width, way)
        self.gate, self.up = Linear(sizes.hidden, sizes.width, way), Linear(sizes.hidden, sizes.width, way)
        self.down = Linear(sizes.width, sizes.hidden, way)

    def __call__(self, x: Tensor, dropout_p: float) -> Tensor:
        width = self.sizes.width
        h = torch.nn.functional.rms_norm(x, (width,), self.norm)
        kv, head = self.sizes.kv_heads, width // self.sizes.heads
        projections = ((self.q, self.sizes.heads), (self.k, kv), (self.v, kv))
        q, k, v = (linear(h, dropout_p).view(1, -1, heads, head).transpose(1, 2) for linear, heads in projections)
        k, v = (t.repeat_interleave(self.sizes.heads // kv, dim=1) for t in (k, v))
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).reshape(-1, width), dropout_p)
        h = torch.nn.functional.rms_norm(x, (width,), self.norm)
        return x + self.down(torch.nn.functional.silu(self.gate(h, dropout_p)) * self.up(h, dropout_p), dropout_p)


def step_of(sizes: Sizes, way: str, dropout_p: float, checkpointing: bool) -> Callable[[], None]:
    """Return a function that runs one forward and backward of all layers."""
    layers = [Layer(sizes, way) for _ in range(sizes.layers)]
    x = torch.randn(sizes.tokens, sizes.width, device=rows_module.DEVICE, dtype=torch.bfloat16).requires_grad_()

    def step() -> None:
        y: Tensor = x
        for layer in layers:
            y = checkpoint(layer, y, dropout_p, use_reentrant=False) if checkpointing else layer(y, dropout_p)
        y.float().square().mean().backward()

    return step


TINY = Sizes(16, 128, 128, 2, 2, 1)
"""Sizes of a rehearsal, with which every linear uses the Triton kernels of cases.TINY_SIZES."""


def measure(rows: Rows, sizes: Sizes, way: str, backend: str, dropout_p: float, seconds: float = SECONDS) -> None:
    """Time the steps of one implementation for some seconds, but at least one of them."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with qk.use_backend(backend):
        step = step_of(sizes, way, dropout_p, checkpointing=True)
        started = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times: list[float] = []
        while not times or (time.perf_counter() - started < seconds and len(times) < 20):
            begin = time.perf_counter()
            step()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
    best = sorted(times)[len(times) // 2]
    rows.add(
        backend=backend,
        way=way,
        dropout=dropout_p,
        tokens=sizes.tokens,
        layers=sizes.layers,
        ms=best * 1e3,
        tokens_per_s=sizes.tokens / best,
        peak_bytes=torch.cuda.max_memory_allocated(),
    )


def main() -> int:
    """Run the step for every implementation, and return the exit code."""
    arguments = step_arguments(__doc__)
    rows = Rows(arguments.out, "training")
    sizes, seconds = (TINY, 0.0) if arguments.tiny else (Sizes(), SECONDS)
    for way in ("fused op", "by parts", "dense"):
        for dropout_p in DROPOUT:
            if way != "dense" or arguments.backend == "cuda":
                measure(rows, sizes, way, arguments.backend, dropout_p, seconds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
