"""qlora-kernels plan: the memory of a fine-tuning run, computed in advance, and GPUs with enough memory."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from .arguments import Subparsers, add_command, add_quantization, bad_input, positive
from .choices import DTYPES
from .tables import table

if TYPE_CHECKING:
    from ..training.memory_plan import DecoderSizes, RunSettings

CARDS = (8, 16, 24, 48, 80)
"""Memory of common GPUs in GB."""
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*(GB|GiB|MB|MiB)?", re.IGNORECASE)
_UNITS = {"gb": 10**9, "gib": 2**30, "mb": 10**6, "mib": 2**20}
_LONGEST = 1 << 22
"""Maximum sequence length of the search, in tokens."""


def add_parser(subparsers: Subparsers) -> None:
    """Add this subcommand and its options to the command line."""
    parser = add_command(
        subparsers,
        "plan",
        run,
        "say how much memory a fine-tuning run takes, and which GPUs hold it",
        "Compute the memory of a LoRA run over an NF4 model from the model's shapes alone: no weight is read, and of a "
        "model on the hub only config.json.",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR|GGUF|ID|SIZE",
        help="model folder, .gguf file, id on the Hugging Face hub, or a usual size: 1B 3B 7B 8B 13B 14B 32B 70B",
    )
    parser.add_argument("--rank", "--r", dest="r", type=positive, default=16, help="rank of each LoRA update")
    parser.add_argument("--seq", "--seq-len", dest="seq_len", type=positive, default=1024, help="tokens of an example")
    parser.add_argument("--batch", type=positive, default=1, metavar="EXAMPLES", help="examples in memory at one time")
    parser.add_argument("--compute-dtype", choices=DTYPES, default="bf16", help="of matmuls and of dense weights")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations layer by layer")
    parser.add_argument(
        "--optimizer", choices=("adamw", "paged_adamw"), default="adamw", help="paged_adamw: states leave the GPU"
    )
    parser.add_argument(
        "--device", type=_memory, metavar="24GB", help="memory of the GPU (default: a table of 8 16 24 48 80 GB)"
    )
    add_quantization(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compute the plan and print it. Returns 1 if the memory of --device is too small for the run."""
    from ..integrations.planned_model import planned_model
    from ..training.memory_plan import DecoderSizes, RunSettings

    settings = RunSettings(
        r=arguments.r,
        seq_len=arguments.seq_len,
        micro_batch=arguments.batch,
        blocksize=arguments.blocksize,
        double_quant=arguments.double_quant,
        itemsize=4 if arguments.compute_dtype == "fp32" else 2,
        checkpointing=arguments.gradient_checkpointing,
        paged=arguments.optimizer == "paged_adamw",
    )
    with bad_input():
        sizes = DecoderSizes.of(*planned_model(arguments.model, arguments.skip))
    plan = sizes.plan(settings)
    memories = [arguments.device] if arguments.device else [card * 10**9 for card in CARDS]
    cards = [_on_card(sizes, settings, memory) for memory in memories]
    if arguments.json:
        print(json.dumps({**asdict(plan), "weights": plan.weights, "total": plan.total, "cards": cards}))
    else:
        print(_table(plan, settings, cards))
    return 0 if not arguments.device or plan.fits(arguments.device) else 1


def longest_sequence(sizes: DecoderSizes, settings: RunSettings, memory: int) -> int:
    """Return the maximum number of tokens of an example for a run in `memory` bytes; 0 if no length fits."""
    low, high = 0, _LONGEST
    while low < high:
        middle = (low + high + 1) // 2
        if sizes.plan(replace(settings, seq_len=middle)).fits(memory):
            low = middle
        else:
            high = middle - 1
    return low


def _on_card(sizes: DecoderSizes, settings: RunSettings, memory: int) -> dict[str, Any]:
    checkpointed = replace(settings, checkpointing=True)
    return {
        "memory": memory,
        "fits": sizes.plan(settings).fits(memory),
        "fits_checkpointed": sizes.plan(checkpointed).fits(memory),
        "longest_seq": longest_sequence(sizes, settings, memory),
        "longest_seq_checkpointed": longest_sequence(sizes, checkpointed, memory),
    }


def _table(plan: Any, settings: RunSettings, cards: list[dict[str, Any]]) -> str:
    from ..training.memory_plan import CONTEXT_BYTES

    rows = [
        ("weights, NF4 layers", plan.nf4),
        ("weights, dense rest", plan.dense),
        ("adapters (fp32)", plan.adapters),
        ("gradients", plan.gradients),
        (f"optimizer{' (pageable, not in the sum)' if settings.paged else ''}", plan.optimizer),
        (f"activations of {settings.tokens:,} tokens", plan.activations),
        ("workspace", plan.workspace),
        ("sum on the device", plan.total),
    ]
    context, batch = _readable(CONTEXT_BYTES), settings.micro_batch
    verdicts = []
    for card in cards:
        if card["fits"]:
            verdict = "fits"
        elif card["fits_checkpointed"]:
            verdict = "fits with --gradient-checkpointing"
        else:
            verdict = "does not fit"
        longest = (f"{card['longest_seq']:,}", f"{card['longest_seq_checkpointed']:,}")
        verdicts.append((f"{card['memory'] / 1e9:.1f} GB", verdict, *longest))
    header = ("memory", f"--batch {batch}", "longest --seq", "with checkpointing")
    return "\n".join(
        [
            table([(name, _readable(value)) for name, value in rows], right=(1,)),
            "",
            f"on a GPU, with {context} set aside for its context:",
            table(verdicts, header, right=(0, 2, 3)),
        ]
    )


def _readable(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 10**9 else f"{n / 1e6:.2f} MB"


def _memory(text: str) -> int:
    match = _MEMORY.fullmatch(text.strip())
    value = int(float(match[1]) * _UNITS[(match[2] or "GB").lower()]) if match else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a size such as 24GB or 24GiB, got {text[:60]!r}")
    return value
