"""train_step: one optimizer step of a language model with LoRA on every linear layer of its blocks.

SmolLM2-135M's architecture with random weights (speed does not depend on their values) in bf16, 4 sequences of 256
tokens, rank 16, gradient norm clipped, AdamW. Ours keeps fp32 masters of the factors; PEFT runs as it is fastest, with
bf16 factors, and once with the fp32 factors that get_peft_model makes by default, under autocast as trainers run them.
Dense holds our dequantized weights, so all contenders start from one loss.

`python -m bench.end_to_end [contender]` prints where the time of a step goes (bench/step_profile.py).
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import qlora_kernels as qk
from qlora_kernels.training.batches import Batch
from qlora_kernels.training.chunked_loss import ChunkedLoss

from . import layers, step_profile
from .registry import COLD, Call, Case, Contender, Cost, Suite

HIDDEN, FFN, BLOCKS, HEADS, KV_HEADS, VOCABULARY = 576, 1536, 30, 9, 3, 49152
SEQUENCES, TOKENS, RANK = 4, 256, 16

LEARNING_RATE = 1e-4
MAX_GRAD_NORM = 1.0

Loss = Callable[[nn.Module, Tensor], Tensor]

LOSS_ERROR = 5e-3
"""Of the first loss: the logits are rounded to bf16, and blocks add up in another order."""


def cases(device: str) -> Iterator[Case]:
    """The whole model; two of its blocks on few tokens for the quick run."""
    case = Case("train_step", SEQUENCES * TOKENS, r=RANK, device=device, label="SmolLM2-135M")
    yield case
    yield Case("train_step", SEQUENCES * 16, r=RANK, device=device, label="2 blocks", quick=True)


def blocks(case: Case) -> int:
    """Transformer blocks of the case's model."""
    return 2 if case.quick else BLOCKS


def cost(case: Case) -> Cost:
    """Two passes over the linear layers and the head; attention's products and all else are left out."""
    per_block = HIDDEN * HIDDEN * (2 + 2 * KV_HEADS / HEADS) + 3 * HIDDEN * FFN
    return Cost(0, int(4 * case.M * (blocks(case) * per_block + HIDDEN * VOCABULARY)))


class Inputs:
    """A model before quantization and one batch."""

    def __init__(self, case: Case) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=HIDDEN,
            intermediate_size=FFN,
            num_hidden_layers=blocks(case),
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            vocab_size=VOCABULARY,
            tie_word_embeddings=True,
            use_cache=False,
        )
        torch.manual_seed(1)
        self.source = LlamaForCausalLM(config).to(case.device, torch.bfloat16)
        generator = torch.Generator().manual_seed(2)
        self.tokens = torch.randint(VOCABULARY, (SEQUENCES, case.M // SEQUENCES), generator=generator).to(case.device)

    @cached_property
    def dequantized(self) -> nn.Module:
        """The source with each quantized weight read back."""
        return self._replaced(lambda linear: dense_twin(qk.LinearNF4.from_linear(linear)))

    @cached_property
    def first_loss(self) -> float:
        """Of the dequantized model: adapters start as the identity."""
        with torch.no_grad():
            return self.dequantized(self.tokens, labels=self.tokens).loss.item()

    def bitsandbytes(self) -> nn.Module:
        """The source over Linear4bit layers that train."""
        return self._replaced(lambda linear: layers.trainable(layers.linear4bit(linear.weight.detach())))

    def _replaced(self, make: Callable[[nn.Linear], nn.Module]) -> nn.Module:
        model = copy.deepcopy(self.source)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, make(module))
        return model


def dense_twin(layer: qk.LinearNF4) -> nn.Linear:
    """nn.Linear of a quantized layer's weight."""
    linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(layer.dequantize())
    return linear


def ours(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
    """LinearNF4, qk.peft, PagedAdamW, and the training loop's loss."""
    model, optimizer = through_qk(case, inputs)
    chunked = ChunkedLoss(model)

    def loss(model: nn.Module, tokens: Tensor) -> Tensor:
        return chunked(Batch(tokens, tokens, None)) / tokens[:, 1:].numel()

    return [partial(step, model, optimizer, inputs.tokens, loss=loss)]


def ours_full_logits(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
    """With transformers' own loss, as the peers."""
    return [partial(step, *through_qk(case, inputs), inputs.tokens)]


def through_qk(case: Case, inputs: Inputs) -> tuple[nn.Module, Optimizer]:
    """Model and optimizer."""
    model = copy.deepcopy(inputs.source)
    qk.replace_linear(model)
    config = qk.peft.LoraConfig(r=case.r, lora_alpha=layers.LORA_ALPHA, target_modules="all-linear")
    model = qk.peft.get_peft_model(model, config).train()
    return model, qk.PagedAdamW(trained(model), lr=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM)


def transformers_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """As the model computes it when it is given labels."""
    return model(input_ids=tokens, labels=tokens).loss


def through_peft(model: nn.Module, case: Case, inputs: Inputs, *, masters: bool) -> Sequence[Call]:
    """Hugging Face PEFT and torch's fused AdamW. masters: fp32 factors under autocast."""
    import peft

    config = peft.LoraConfig(r=case.r, lora_alpha=layers.LORA_ALPHA, target_modules="all-linear")
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=masters).train()
    optimizer = torch.optim.AdamW(trained(model), lr=LEARNING_RATE, fused=True)
    clip = partial(torch.nn.utils.clip_grad_norm_, optimizer.param_groups[0]["params"], MAX_GRAD_NORM)
    return [partial(step, model, optimizer, inputs.tokens, autocast=masters, clip=clip)]


def trained(model: nn.Module) -> list[nn.Parameter]:
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
    """Forward, backward, update; the loss."""
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
    return through_peft(inputs.bitsandbytes(), case, inputs, masters=False)


def bnb_peft_fp32(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
    return through_peft(inputs.bitsandbytes(), case, inputs, masters=True)


def dense_peft(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
    return through_peft(copy.deepcopy(inputs.dequantized), case, inputs, masters=False)


def verify(case: Case, inputs: Inputs, contender: str, loss: Tensor) -> None:
    """The first loss."""
    expected = inputs.first_loss
    assert abs(loss.item() - expected) <= LOSS_ERROR * expected, f"first loss {loss.item():.4f}, not {expected:.4f}"


def has_peft(case: Case) -> bool:
    return layers.has_peft(case) and importlib.util.find_spec("transformers") is not None


def has_bitsandbytes(case: Case) -> bool:
    return has_peft(case) and importlib.util.find_spec("bitsandbytes") is not None


def _once(case: Case) -> int:
    """No copies: a step touches far more than the last-level cache holds."""
    return 1 << 40


SUITE = Suite(
    op="train_step",
    cases=cases,
    cost=cost,
    inputs=Inputs,
    contenders=(
        Contender("ours", ours, _once),
        Contender("ours, full logits", ours_full_logits, _once),
        Contender("bnb + PEFT", bnb_peft, _once, applies=has_bitsandbytes),
        Contender("bnb + PEFT fp32", bnb_peft_fp32, _once, applies=has_bitsandbytes),
        Contender("dense + PEFT", dense_peft, _once, applies=has_peft),
    ),
    verify=verify,
    modes=(COLD,),
)


def main() -> int:
    """Print one contender's profile."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.end_to_end", description="Where a training step's time goes."
    )
    names = [contender.name for contender in SUITE.contenders]
    parser.add_argument("contender", nargs="?", default="ours", choices=names)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    options = parser.parse_args()
    case = next(iter(cases(options.device)))
    (call,) = next(c for c in SUITE.contenders if c.name == options.contender).build(case, Inputs(case), 1)
    model = call.args[0]
    parts = step_profile.profile_step(model, call)
    print(step_profile.table(parts))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
