"""generate: prefill and decoding of a language model over ours, bitsandbytes and dense layers, and by llama.cpp.

Prefill is a forward pass over a prompt that fills the key-value cache; decoding is a forward pass over one token after
such a prompt. The architectures are those of the training step (bench/end_to_end.py), with random weights in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

import qlora_kernels as qk

from . import layers, llama_cpp_models
from .end_to_end import ARCHITECTURES, dense_twin, llama, random_tokens, with_linears
from .registry import COLD, Call, Case, Contender, Cost, Suite

PREFILL, BEHIND = 512, 64
"""Tokens of the prompt that is prefilled, and of the prompt before the decoded token."""

LOGITS_ERROR = 0.05
"""Relative error in the Euclidean norm: every layer rounds to bf16, and peers also round block constants."""

LLAMA_CPP_ERROR = 0.15
"""llama.cpp rounds the inputs of every matrix product to 8 bits, and keys and values to fp16."""


def cases(device: str) -> Iterator[Case]:
    """Yield a prompt and a token of both models, and both for two blocks in the quick run."""
    for tokens in (PREFILL, 1):
        yield Case("generate", tokens, device=device, label="SmolLM2-135M")
        yield Case("generate", tokens, device=device, label="llama-1b")
        yield Case("generate", tokens, device=device, label="2 blocks", quick=True)


def cost(case: Case) -> Cost:
    """Return the cost of reading the linear layers in NF4 and the head in bf16 once, and of one pass over them."""
    architecture = ARCHITECTURES[case.label]
    blocks = architecture.blocks * architecture.block_weights
    head = architecture.linear_weights - blocks
    return Cost(int(blocks * 4.127 / 8) + 2 * head, 2 * (case.M * blocks + head))


class Inputs:
    """The model before quantization, and a prompt."""

    def __init__(self, case: Case) -> None:
        architecture = ARCHITECTURES[case.label]
        self.source = llama(architecture, case.device).eval()
        self.tokens = random_tokens(architecture, 1, BEHIND + 1 if case.M == 1 else case.M, case.device)

    @cached_property
    def dequantized(self) -> nn.Module:
        """Return the source model with the dequantized weights."""
        return with_linears(self.source, lambda linear: dense_twin(qk.LinearNF4.from_linear(linear))).eval()

    @cache  # noqa: B019 (lives as long as the inputs of a case)
    def of_llama_cpp(self, kind: str) -> llama_cpp_models.QuantizedModel:
        """Return llama.cpp's model of one of its types."""
        return llama_cpp_models.QuantizedModel(self.source, kind, self.tokens.shape[1])

    @cached_property
    def logits(self) -> Tensor:
        """Return the last token's logits, by the dequantized model without a cache."""
        with torch.no_grad():
            logits: Tensor = self.dequantized(self.tokens).logits[:, -1].float()
        return logits


def model_calls(model: nn.Module, case: Case, inputs: Inputs) -> Sequence[Call]:
    """Return the call of one model."""
    return (
        [partial(decode, model, inputs.tokens, prompt_cache(model, inputs))]
        if case.M == 1
        else [partial(prefill, model, inputs.tokens)]
    )


@torch.no_grad()
def prefill(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the last token's logits [1, vocabulary]."""
    logits: Tensor = model(tokens, use_cache=True, logits_to_keep=1).logits[:, -1]
    return logits


@torch.no_grad()
def prompt_cache(model: nn.Module, inputs: Inputs) -> Any:
    """Return the key-value cache of all tokens but the last."""
    return model(inputs.tokens[:, :-1], use_cache=True, logits_to_keep=1).past_key_values


@torch.no_grad()
def decode(model: nn.Module, tokens: Tensor, cache: Any) -> Tensor:
    """Return the last token's logits [1, vocabulary]; the cache is not changed."""
    logits: Tensor = model(tokens[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    cache.crop(-1)
    return logits


def ours(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
    """Build calls of a model over LinearNF4 layers."""
    return model_calls(with_linears(inputs.source, qk.LinearNF4.from_linear).eval(), case, inputs)


def bitsandbytes(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
    """Build calls of a model over Linear4bit layers in eval mode."""
    return model_calls(
        with_linears(inputs.source, lambda linear: layers.linear4bit(linear.weight.detach())).eval(), case, inputs
    )


def dense(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
    """Build calls of a model over nn.Linear layers in bf16."""
    return model_calls(inputs.dequantized, case, inputs)


def llama_cpp(kind: str, case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
    """Build the call of llama.cpp's model of type `kind`."""
    model, tokens = inputs.of_llama_cpp(kind), inputs.tokens[0].tolist()
    if case.M > 1:
        return [partial(model.logits, tokens)]
    model.logits(tokens[:-1])
    return [partial(model.logits, tokens[-1:], len(tokens) - 1)]


def verify(case: Case, inputs: Inputs, contender: str, logits: Tensor) -> None:
    """Check the logits of the last token; llama.cpp's against the values that its file stores."""
    _, _, kind = contender.partition("llama.cpp ")
    expected = inputs.of_llama_cpp(kind).expected(inputs.tokens) if kind else inputs.logits
    error = ((logits.float() - expected).norm() / expected.norm()).item()
    assert error <= (LLAMA_CPP_ERROR if kind else LOGITS_ERROR), f"logits differ by {error:.3f} of their norm"


def _once(case: Case) -> int:
    return 1 << 40


SUITE = Suite(
    op="generate",
    cases=cases,
    cost=cost,
    inputs=Inputs,
    contenders=(
        Contender("ours", ours, _once),
        Contender("bnb", bitsandbytes, _once, packages=("bitsandbytes",)),
        Contender("dense", dense, _once),
        *(
            Contender(
                f"llama.cpp {kind}",
                partial(llama_cpp, kind),
                _once,
                applies=lambda case: case.device == "cpu",
                packages=("gguf", "llama_cpp"),
            )
            for kind in llama_cpp_models.FILE_TYPES
        ),
    ),
    verify=verify,
    modes=(COLD,),
    packages=("transformers",),
)
