"""Training of a tiny model with the LoRA update apart, and added to the weight while it is decoded.

    python -m bench.merge_convergence [--seeds 3] [--steps 200]

It prints the table of docs/notebook/merge-on-decode-2026-11.md.

A small Llama is trained on one random Markov chain of tokens, quantized to NF4, and then LoRA learns another chain over
it, in bf16 with fp32 factors. Both variants have equal data, initial values and learning rates; each seed has its own.
The CPU's kernels round as the GPU backends do: once, after the update was added in fp32.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch
from torch import Tensor, nn

import qlora_kernels as qk

VOCABULARY, BATCH, LENGTH, RANK = 64, 16, 48, 8


def chain(seed: int) -> Tensor:
    """Return the transition probabilities [vocabulary, vocabulary] of a Markov chain."""
    logits = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    return torch.softmax(3 * logits, dim=1)


def draw(transitions: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Return token sequences [rows, LENGTH] of the chain."""
    tokens = [torch.randint(VOCABULARY, (rows,), generator=generator)]
    for _ in range(LENGTH - 1):
        tokens.append(torch.multinomial(transitions[tokens[-1]], 1, generator=generator)[:, 0])
    return torch.stack(tokens, dim=1)


def train(model: nn.Module, transitions: Tensor, steps: int, lr: float, seed: int) -> list[float]:
    """Train the parameters that require a gradient, and return the loss of each step."""
    generator = torch.Generator().manual_seed(seed)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0), []
    for _ in range(steps):
        tokens = draw(transitions, BATCH, generator)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def held_out(model: nn.Module, transitions: Tensor, seed: int) -> float:
    """Return the loss on sequences that no step has seen."""
    tokens = draw(transitions, 256, torch.Generator().manual_seed(seed + 10_000))
    return float(model(input_ids=tokens, labels=tokens).loss)


def pretrained(seed: int, steps: int) -> nn.Module:
    """Return a small dense Llama in bf16 that has learned the first chain."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=LENGTH,
    )
    model = LlamaForCausalLM(config)
    train(model, chain(2 * seed), steps, 3e-3, seed)
    half: nn.Module = model.to(torch.bfloat16)
    return half


def finetuned(seed: int, base: dict[str, Tensor], model: nn.Module, steps: int, merged: bool) -> tuple[float, float]:
    """Return (mean loss of the last tenth of the steps, loss on unseen sequences) of LoRA on the second chain."""
    model.load_state_dict(base)
    qk.replace_linear(model)
    torch.manual_seed(seed)
    config = qk.peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    adapted = qk.peft.get_peft_model(model, config)
    if merged:
        qk.set_merge_on_decode(adapted)
    losses = train(adapted, chain(2 * seed + 1), steps, 3e-3, seed)
    return statistics.mean(losses[-max(1, steps // 10) :]), held_out(adapted, chain(2 * seed + 1), seed)


def report(seeds: int, steps: int) -> str:
    """Return the table of all seeds as Markdown."""
    import copy

    rows = ["| seed | NF4 before LoRA | apart: last steps, unseen | merged: last steps, unseen |", "|---|---|---|---|"]
    differences = []
    for seed in range(seeds):
        dense = pretrained(seed, steps)
        base = copy.deepcopy(dense.state_dict())
        quantized = copy.deepcopy(dense)
        qk.replace_linear(quantized)
        before = held_out(quantized, chain(2 * seed + 1), seed)
        apart, merged = (finetuned(seed, base, copy.deepcopy(dense), steps, on) for on in (False, True))
        differences.append(merged[1] - apart[1])
        cells = (f"{before:.3f}", *(f"{last:.4f}, {unseen:.4f}" for last, unseen in (apart, merged)))
        rows.append(f"| {seed} | " + " | ".join(cells) + " |")
    mean = statistics.mean(differences)
    return "\n".join(rows) + f"\n\nMean difference on unseen sequences, merged - apart: {mean:+.4f}\n"


def main() -> None:
    """Print the table of both variants."""
    parser = argparse.ArgumentParser(prog="bench.merge_convergence", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each variant")
    parser.add_argument("--steps", type=int, default=200, help="steps of each training")
    arguments = parser.parse_args()
    sys.stdout.write(report(arguments.seeds, arguments.steps))


if __name__ == "__main__":
    main()
