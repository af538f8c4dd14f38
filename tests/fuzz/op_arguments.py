"""Sound arguments for every op, by the names in its schema, in memory between guards."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qlora_kernels.optim.paging_plan import plan_chunks, plan_slots

from .block_arguments import BLOCKS, sound_block_argument

GUARD, PATTERN = 64, 0xA5
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Block:
    """The bytes of a tensor between two guards."""

    memory: Tensor
    before: Tensor
    written: bool

    def is_intact(self) -> bool:
        """Whether the guards, and for read-only arguments the bytes between them, are unchanged."""
        if self.written:
            return bool((self.memory[:GUARD] == PATTERN).all() and (self.memory[-GUARD:] == PATTERN).all())
        return torch.equal(self.memory, self.before)


@dataclass
class Problem:
    """The sizes of a call and the tensors it was given."""

    rng: random.Random
    blocks: list[Block] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = self.rng
        self.M, self.N, self.K = rng.choice((1, 2, 7, 40)), rng.choice((1, 8, 33, 64)), rng.choice((1, 31, 64, 96))
        self.r, self.E = rng.choice((1, 4, 9)), rng.choice((1, 3))
        self.members = rng.choice((1, 2))
        self.blocksize = rng.choice((32, 64, 256, 4096))
        self.dtype = rng.choice(FLOATS)
        self.double = rng.random() < 0.5
        self.B, self.KV, self.group, self.T = (
            rng.choice((1, 2)),
            rng.choice((1, 2)),
            rng.choice((1, 3)),
            rng.choice((1, 9, 100)),
        )
        self.D = rng.choice((1, 8, 40))
        self.n_blocks = -(-self.N * self.K // self.blocksize)
        self.numels = [rng.choice((0, 1, 255, 256, 4096, 5003)) for _ in range(rng.choice((1, 3)))]
        slots, self.arena_bytes = plan_slots(self.numels, rng.choice((8, 32)))
        chunks = plan_chunks(slots, [0] * len(slots), None)
        self.segments = [list(segment) for chunk in chunks for segment in chunk.segments]

    def tensor(
        self, shape: Sequence[int], dtype: torch.dtype, *, written: bool = False, fill: str = "normal"
    ) -> Tensor:
        """A contiguous tensor between guards."""
        count = torch.Size(shape).numel() * dtype.itemsize
        memory = torch.full((GUARD + count + GUARD,), PATTERN, dtype=torch.uint8)
        tensor = memory[GUARD : GUARD + count].view(dtype).view(tuple(shape))
        if fill == "normal" and dtype.is_floating_point:
            tensor.copy_(torch.randn(tuple(shape)))
        elif dtype == torch.uint8:
            tensor.random_(0, 256)
        else:
            tensor.fill_(1)
        self.blocks.append(Block(memory, memory.clone(), written))
        return tensor


MODEL_PARTS = ("rms_norm", "rms_norm_backward", "rope", "glu", "glu_backward")


def _sound_model_part(op: str, name: str, problem: Problem, written: bool) -> Any:
    """Return an argument of the ops between linear layers: M rows of K; heads [2, N, M, 8]."""
    p, rng = problem, problem.rng
    numbers = {"eps": 1e-6, "weight_offset": 1.0, "need_grad_weight": rng.random() < 0.5, "inverse": rng.random() < 0.5}
    if name in numbers:
        return numbers[name]
    if name == "activation":
        return rng.choice(("silu", "gelu_tanh"))
    if name in ("residual", "grad_s") and rng.random() < 0.5:
        return None
    if name == "scale":
        return p.tensor((p.M,), torch.float32)
    shapes: dict[str, tuple[int, ...]] = {"weight": (p.K,)}
    if op == "rope":
        shapes = dict.fromkeys(("cos", "sin"), (1, p.M, 8)) | dict.fromkeys(("k", "k_out"), (2, p.r, p.M, 8))
        shapes |= dict.fromkeys(("q", "q_out"), (2, p.N, p.M, 8))
    return p.tensor(shapes.get(name, (p.M, p.K)), p.dtype, written=written)


def sound(op: str, name: str, kind: str, problem: Problem, written: bool) -> Any:
    """Return a valid argument `name` of `op`, of the schema's type `kind`."""
    p, rng = problem, problem.rng
    grouped, multi = "group" in op, "multi" in op
    in_list = kind.startswith("List")

    def each(make: Any) -> Any:
        return [make() for _ in range(p.members)] if in_list else make()

    part = op.rpartition("::")[2].removeprefix("cpu_")
    if part in BLOCKS:
        return sound_block_argument(part, name, problem)
    is_constant = name in ("absmax", "absmax_q", "absmax_scale", "absmax_offset") and "quantize_absmax" not in op
    if is_constant and (name == "absmax") == p.double:
        return [None] * p.members if in_list else None
    if part in MODEL_PARTS:
        return _sound_model_part(part, name, problem, written)
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "x": ((p.M, p.K), p.dtype),
        "w": ((p.N, p.K), p.dtype),
        "y": ((p.M, p.N), p.dtype),
        "grad_y": ((p.M, p.N), p.dtype),
        "grad_ys": ((p.M, p.N), p.dtype),
        "s": ((p.M, p.r * (p.members if grouped else 1)), p.dtype),
        "bias": ((p.N,), rng.choice(FLOATS)),
        "biases": ((p.N,), rng.choice(FLOATS)),
        "packed": (((p.N * p.K + 1) // 2,), torch.uint8),
        "absmax": ((p.n_blocks,), torch.float32),
        "absmax_q": ((p.n_blocks,), torch.uint8),
        "absmax_scale": ((-(-p.n_blocks // 256),), torch.float32),
        "absmax_offset": ((), torch.float32),
        "lora_A": (((p.E,) if multi else ()) + (p.r * (p.members if grouped else 1), p.K), rng.choice(FLOATS)),
        "lora_B": (((p.E,) if multi else ()) + (p.N, p.r), rng.choice(FLOATS)),
        "seed": ((1,), torch.int64),
        "adapter": ((p.M,), torch.int64),
        "out": ((p.N, p.K), p.dtype),
        "hidden": ((p.M, p.K), p.dtype),
        "weight": ((p.N, p.K), rng.choice(FLOATS)),
        "labels": ((p.M,), torch.int64),
        "q": ((p.B, p.KV * p.group, p.T, p.D), p.dtype),
        "k": ((p.B, p.KV, p.T, p.D), p.dtype),
        "v": ((p.B, p.KV, p.T, p.D), p.dtype),
        "grad_out": ((p.B, p.T, p.KV * p.group, p.D), p.dtype),
        "log_sums": ((p.B, p.KV * p.group, p.T), torch.float32),
        "starts": ((p.B, p.T), torch.int64),
        "ends": ((p.B, p.T), torch.int64),
        "arena": ((p.arena_bytes,), torch.uint8),
        "steps": ((len(p.numels),), torch.float32),
        "lr": ((), torch.float32),
        "grad_multiplier": ((1,), torch.float32),
        "found_inf": ((1,), torch.float32),
    }
    if name in ("params", "grads"):
        return [p.tensor((n,), p.dtype, written=written) for n in p.numels]
    if name == "segments":
        table = p.tensor((len(p.segments), 8), torch.int64)
        table.copy_(torch.tensor(p.segments, dtype=torch.int64).view(-1, 8))
        p.blocks[-1].before = p.blocks[-1].memory.clone()
        return table
    if name == "scalings":
        return p.tensor((p.E,), torch.float32) if multi else [1.5] * p.members
    if name == "out" and "attention" in op:
        return p.tensor((p.B, p.T, p.KV * p.group, p.D), p.dtype)
    if "Tensor" in kind:
        shape, dtype = shapes.get(name, ((p.M,), torch.float32))
        fill = "ones" if name in ("steps", "lr", "found_inf") else "normal"
        return each(lambda: p.tensor(shape, dtype, written=written, fill=fill))
    numbers: dict[str, Any] = {
        "blocksize": p.blocksize,
        "blocksizes": p.blocksize,
        "out_features": p.N,
        "in_features": p.K,
        "scaling": 0.5,
        "dropout_p": rng.choice((0.0, 0.3)),
        **{f"need_grad_{name}": rng.random() < 0.5 for name in ("x", "A", "B")},
        "dtype": rng.choice(FLOATS),
        "force": "",
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-8,
        "lr": 0.1,
        "weight_decay": 0.01,
        "grad_multiplier": 1.0,
        "transposed": False,
        "ignore_index": rng.choice((-100, 1)),
        "logit_scale": rng.choice((1.0, 0.5)),
        "softcap": rng.choice((0.0, 5.0)),
        "scale": 0.5,
        "need_grad_hidden": rng.random() < 0.5,
    }
    return each(lambda: numbers.get(name, 3))
