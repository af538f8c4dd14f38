"""train_step: one optimizer step of a language model with LoRA on every linear layer of its blocks.

The architectures are those of SmolLM2-135M and of a Llama with 1.04 billion parameters, with random weights (speed does
not depend on their values) in bf16, 4 sequences of 256 tokens, rank 16, clipped gradient norm, AdamW. Ours keeps fp32
masters of the factors. PEFT runs in its fastest setting, with bf16 factors, and once with the fp32 factors that
get_peft_model makes by default, under autocast as trainers run them. Dense has our dequantized weights, so that all
implementations start from one loss.

Peak memory is that of a process that has only the implementation's model and takes two steps.

`python -m bench.end_to_end [contender]` prints a profile of one step (bench/step_profile.py).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import qlora_kernels as qk
from qlora_kernels.training.batches import Batch
from qlora_kernels.training.chunked_loss import ChunkedLoss

from . import layers, step_profile
from .machine import ROOT
from .registry import COLD, Call, Case, Contender, Cost, Suite


@dataclass(frozen=True)
class Architecture:
    """Sizes of a Llama with tied head and embedding."""

    hidden: int
    ffn: int
    blocks: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def block_weights(self) -> int:
        """Return the number of weights in the linear layers of one block."""
        return int(self.hidden * self.hidden * (2 + 2 * self.kv_heads / self.heads)) + 3 * self.hidden * self.ffn

    @property
    def linear_weights(self) -> int:
        """Return the number of weights in the linear layers of all blocks and in the head."""
        return self.blocks * self.block_weights + self.hidden * self.vocabulary


ARCHITECTURES = {
    "SmolLM2-135M": Architecture(576, 1536, 30, 9, 3, 49152),
    "llama-1b": Architecture(2048, 8192, 16, 32, 8, 32000),
    "2 blocks": Architecture(576, 1536, 2, 9, 3, 49152),
}
"""The architectures by the label of a case."""

SEQUENCES, TOKENS, RANK = 4, 256, 16

LEARNING_RATE = 1e-4
MAX_GRAD_NORM = 1.0

Loss = Callable[[nn.Module, Tensor], Tensor]

LOSS_ERROR = 5e-3
"""Relative difference of the first losses: logits are rounded to bf16, and blocks add in another order."""


def cases(device: str) -> Iterator[Case]:
    """Yield the whole models, and two blocks of the smaller one on few tokens for the quick run."""
    for label in ("SmolLM2-135M", "llama-1b"):
        yield Case("train_step", SEQUENCES * TOKENS, r=RANK, device=device, label=label)
    yield Case("train_step", SEQUENCES * 16, r=RANK, device=device, label="2 blocks", quick=True)


def cost(case: Case) -> Cost:
    """Return the cost of two passes over the linear layers and the head, without attention and the rest."""
    return Cost(0, 4 * case.M * ARCHITECTURES[case.label].linear_weights)


def llama(architecture: Architecture, device: str) -> nn.Module:
    """Return the model in bf16, with weights from a fixed seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=architecture.hidden,
        intermediate_size=architecture.ffn,
        num_hidden_layers=architecture.blocks,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.kv_heads,
        vocab_size=architecture.vocabulary,
        tie_word_embeddings=True,
        use_cache=False,
    )
    torch.manual_seed(1)
    model: nn.Module = LlamaForCausalLM(config).to(device, torch.bfloat16)
    return model


def random_tokens(architecture: Architecture, sequences: int, length: int, device: str) -> Tensor:
    """Return token ids [sequences, length] from a fixed seed."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(architecture.vocabulary, (sequences, length), generator=generator).to(device)


def with_linears(source: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """Return a copy of a model in which `make` has replaced every linear layer but the head."""
    model = copy.deepcopy(source)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(module))
    return model


class Inputs:
    """The model before quantization, and one batch."""

    def __init__(self, case: Case) -> None:
        architecture = ARCHITECTURES[case.label]
        self.source = llama(architecture, case.device)
        self.tokens = random_tokens(architecture, SEQUENCES, case.M // SEQUENCES, case.device)

    @cached_property
    def dequantized(self) -> nn.Module:
        """Return the source model with the dequantized weights."""
        return with_linears(self.source, lambda linear: dense_twin(qk.LinearNF4.from_linear(linear)))

    @cached_property
    def first_loss(self) -> float:
        """Return the first loss of the dequantized model; adapters start as the identity."""
        with torch.no_grad():
            loss: float = self.dequantized(self.tokens, labels=self.tokens).loss.item()
        return loss

    def bitsandbytes(self) -> nn.Module:
        """Return the source model over Linear4bit layers in training mode."""
        return with_linears(self.source, lambda linear: layers.trainable(layers.linear4bit(linear.weight.detach())))


def dense_twin(layer: qk.LinearNF4) -> nn.Linear:
    """Return an nn.Linear with a quantized layer's dequantized weight."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(layer.dequantize())
    return linear


def ours(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
    """Build training steps of LinearNF4, qk.peft, PagedAdamW and the training loop's loss."""
    model, optimizer = through_qk(case, inputs)
    chunked = ChunkedLoss(model)

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        return chunked(Batch(tokens, tokens, None)) / tokens[:, 1:].numel()

    return [partial(step, model, optimizer, inputs.tokens, loss=loss)]


def ours_full_logits(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
    """Build training steps with transformers' loss, as the peers use."""
    return [partial(step, *through_qk(case, inputs), inputs.tokens)]


def ours_fused(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
    """LinearNF4, qk.peft and PagedAdamW, with fuse_model; the model computes its own loss."""
    model, optimizer = through_qk(case, inputs)
    qk.fuse_model(model)
    return [partial(step, model, optimizer, inputs.tokens)]


def through_qk(case: Case, inputs: Inputs) -> tuple[nn.Module, Optimizer]:
    """Return our model with LoRA, and its optimizer."""
    model = copy.deepcopy(inputs.source)
    qk.replace_linear(model)
    config = qk.peft.LoraConfig(r=case.r, lora_alpha=layers.LORA_ALPHA, target_modules="all-linear")
    model = qk.peft.get_peft_model(model, config).train()
    return model, qk.PagedAdamW(trained(model), lr=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM)


def transformers_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the loss that the model computes from labels."""
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def through_peft(model: nn.Module, case: Case, inputs: Inputs, *, masters: bool) -> Sequence[Call]:
    """Build training steps of Hugging Face PEFT and torch's fused AdamW. masters: fp32 factors under autocast."""
    import peft

    config = peft.LoraConfig(r=case.r, lora_alpha=layers.LORA_ALPHA, target_modules="all-linear")
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=masters).train()
    optimizer = torch.optim.AdamW(trained(model), lr=LEARNING_RATE, fused=True)
    clip = partial(torch.nn.utils.clip_grad_norm_, optimizer.param_groups[0]["params"], MAX_GRAD_NORM)
    return [partial(step, model, optimizer, inputs.tokens, autocast=masters, clip=clip)]


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that require a gradient."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def step(
    model: nn.Module,
    optimizer: Optimizer,
    tokens: Tensor,
    *,
    loss: Loss = transformers_loss,
    autocast: bool = False,
    clip: Callable[[], Any] = lambda: None,
) -> Tensor:
    """Run forward, backward and update; return the loss."""
    context = torch.autocast(tokens.device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        value = loss(model, tokens)
    value.backward()
    with step_profile.optimizer_region():
        clip()
        optimizer.step()
        optimizer.zero_grad()
    return value.detach()


def bnb_peft(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
    """Build training steps of PEFT over bitsandbytes with bf16 factors."""
    return through_peft(inputs.bitsandbytes(), case, inputs, masters=False)


def bnb_peft_fp32(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
    """Build training steps of PEFT over bitsandbytes with fp32 factors under autocast."""
    return through_peft(inputs.bitsandbytes(), case, inputs, masters=True)


def dense_peft(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
    """Build training steps of PEFT over dense layers."""
    return through_peft(copy.deepcopy(inputs.dequantized), case, inputs, masters=False)


def verify(case: Case, inputs: Inputs, contender: str, loss: Tensor) -> None:
    """Check the first loss against the dequantized model's."""
    expected = inputs.first_loss
    assert abs(loss.item() - expected) <= LOSS_ERROR * expected, f"first loss {loss.item():.4f}, not {expected:.4f}"


def is_small(case: Case) -> bool:
    """Whether the case is not the large model, for which all implementations together need too much memory."""
    return case.label != "llama-1b"


def peak_memory(contender: str) -> Callable[[Case, Call], dict[str, Any]]:
    """Return a function that measures peak memory in a separate process; it measures nothing in the quick run."""

    def measure(case: Case, call: Call) -> dict[str, Any]:
        if case.quick or case.device != "cpu" or not CLEAR_REFS.exists():
            return {}
        command = [sys.executable, "-W", "ignore", "-m", "bench.end_to_end", contender, "--model", case.label]
        done = subprocess.run([*command, "--peak-memory"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        return dict(json.loads(done.stdout.splitlines()[-1]))

    return measure


CLEAR_REFS = Path("/proc/self/clear_refs")
"""On Linux, writing 5 resets the process's peak of resident memory to its present size."""


def peak_bytes_of(build: Callable[[Case, Inputs, int], Sequence[Call]], case: Case) -> int:
    """Return the peak resident memory during two steps, with only one implementation's model and optimizer in
    memory.
    """
    inputs = Inputs(case)
    (call,) = build(case, inputs, 1)
    del inputs
    gc.collect()
    CLEAR_REFS.write_text("5", encoding="utf-8")
    for _ in range(2):
        call()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:"))


def whole_model(case: Case) -> int:
    """Return 1 << 40: no copies are needed, because a step exceeds the last-level cache by far."""
    return 1 << 40


SUITE = Suite(
    op="train_step",
    cases=cases,
    cost=cost,
    inputs=Inputs,
    contenders=(
        Contender("ours", ours, whole_model, measures=peak_memory("ours")),
        Contender("ours, fused", ours_fused, whole_model, measures=peak_memory("ours, fused")),
        Contender("ours, full logits", ours_full_logits, whole_model, applies=is_small),
        Contender(
            "bnb + PEFT",
            bnb_peft,
            whole_model,
            packages=("bitsandbytes", "peft"),
            measures=peak_memory("bnb + PEFT"),
        ),
        Contender("bnb + PEFT fp32", bnb_peft_fp32, whole_model, applies=is_small, packages=("bitsandbytes", "peft")),
        Contender("dense + PEFT", dense_peft, whole_model, packages=("peft",), measures=peak_memory("dense + PEFT")),
    ),
    verify=verify,
    modes=(COLD,),
    packages=("transformers",),
)


def main() -> int:
    """Print one implementation's profile or its peak memory."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.end_to_end", description="Where a training step's time goes."
    )
    names = [contender.name for contender in SUITE.contenders]
    parser.add_argument("contender", nargs="?", default="ours", choices=names)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--model", default="SmolLM2-135M", choices=ARCHITECTURES)
    parser.add_argument("--peak-memory", action="store_true", help="print peak_bytes as JSON instead of the profile")
    options = parser.parse_args()
    case = next(case for case in cases(options.device) if case.label == options.model)
    build = next(c for c in SUITE.contenders if c.name == options.contender).build
    if options.peak_memory:
        print(json.dumps({"peak_bytes": peak_bytes_of(build, case)}))
        return 0
    (call,) = build(case, Inputs(case), 1)
    assert isinstance(call, partial)
    model = call.args[0]
    parts = step_profile.profile_step(model, call)
    print(step_profile.table(parts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
