"""Sound arguments for the native ops of whole blocks, gated_mlp and lora_attention, and their backward ops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .op_arguments import Problem

BLOCKS = ("gated_mlp", "gated_mlp_backward", "lora_attention", "lora_attention_backward")
HEAD_DIM = 8


def sound_block_argument(op: str, name: str, problem: Problem) -> Any:
    """Return a valid argument of a block of M rows of K, or of B sequences of T rows, with a norm."""
    p, rng = problem, problem.rng
    is_mlp = op.startswith("gated_mlp")
    rows = p.M if is_mlp else p.B * p.T
    q, kv = p.KV * p.group * HEAD_DIM, p.KV * HEAD_DIM
    sizes = [(p.N, p.K), (p.N, p.K), (p.K, p.N)] if is_mlp else [(q, p.K), (kv, p.K), (kv, p.K), (p.K, q)]
    blocks = [-(-n * k // p.blocksize) for n, k in sizes]
    shapes: dict[str, list[tuple[tuple[int, ...], torch.dtype]]] = {
        "packed": [(((n * k + 1) // 2,), torch.uint8) for n, k in sizes],
        "absmax": [((count,), torch.float32) for count in blocks],
        "absmax_q": [((count,), torch.uint8) for count in blocks],
        "absmax_scale": [((-(-count // 256),), torch.float32) for count in blocks],
        "absmax_offset": [((), torch.float32) for _ in blocks],
        "biases": [((n,), p.dtype) for n, _ in sizes],
        "lora_A": [((p.r, k), torch.float32) for _, k in sizes],
        "lora_B": [((n, p.r), torch.float32) for n, _ in sizes],
    }
    if name.startswith("absmax") and (name == "absmax") == p.double:
        return [None] * len(sizes)
    if name in shapes:
        return [p.tensor(*each) for each in shapes[name]]
    lists: dict[str, list[Any]] = {
        "blocksizes": [p.blocksize] * len(sizes),
        "out_features": [n for n, _ in sizes],
        "in_features": [k for _, k in sizes],
        "scalings": [0.5] * len(sizes),
        "need_grads_A": [rng.choice((0, 1)) for _ in range(2)],
        "need_grads_B": [rng.choice((0, 1)) for _ in sizes],
    }
    flag = rng.random() < 0.5
    numbers: dict[str, Any] = {"eps": 1e-6, "weight_offset": 1.0, "softcap": 0.0, "length": p.T, "head_dim": HEAD_DIM}
    numbers |= {"activation": "silu", "need_grad_x": flag, "need_grad_weight": flag}
    if name == "scale" and not is_mlp:
        return 0.5
    if name in lists or name in numbers:
        return lists[name] if name in lists else numbers[name]
    if name in ("scale", "inverse_rms"):
        return p.tensor((rows,), torch.float32)
    if name == "log_sums":
        return p.tensor((p.B, p.KV * p.group, p.T), torch.float32)
    if name in ("starts", "ends"):
        return p.tensor((p.B, p.T), torch.int64)
    if name in ("cos", "sin"):
        return p.tensor((1, p.T, HEAD_DIM), p.dtype)
    if name == "norm_weight":
        return p.tensor((p.K,), p.dtype)
    of_input = p.r * (len(sizes) - 1)
    widths = {"gate": p.N, "up": p.N, "h": p.N, "q": q, "out": q, "k": kv, "v": kv, "s": of_input}
    widths |= {"s_h": p.r, "s_o": p.r}
    return p.tensor((rows, widths.get(name, p.K)), p.dtype)
