"""methods: one training step of every PEFT method over NF4, ours beside Hugging Face PEFT.

Four blocks of SmolLM2-135M with a small vocabulary, random weights in bf16 and 4 sequences of 128 tokens; clipped
gradient norm and AdamW. PEFT runs over bitsandbytes where it has the method for 4-bit layers, and over dense layers
where it has the method at all, with adapters in bf16. `trained` in a row is the number of trained parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import qlora_kernels as qk

from . import layers
from .end_to_end import (
    LEARNING_RATE,
    MAX_GRAD_NORM,
    Architecture,
    dense_twin,
    llama,
    random_tokens,
    step,
    trained,
    transformers_loss,
    whole_model,
    with_linears,
)
from .registry import COLD, Call, Case, Contender, Cost, Suite

ARCHITECTURE = Architecture(hidden=576, ffn=1536, blocks=4, heads=9, kv_heads=3, vocabulary=4096)
SEQUENCES, TOKENS = 4, 128

IDENTITY_ERROR, LOSS_ERROR = 5e-3, 0.05
"""Relative difference of the first loss to that of the base: of methods that start as the identity, and of others."""

REGULARIZER = 1.5
"""Largest first loss, over that of the base, of a method that adds a term."""


@dataclass(frozen=True)
class Method:
    """One PEFT method.

    config: our configuration class.   options: its arguments, which PEFT's class shares.   peer: PEFT's class; None
    where PEFT lacks the method.   bitsandbytes: whether PEFT has it over 4-bit layers.   identity: whether a new
    adapter leaves the base function as it is.   regularized: whether the method adds a positive term to the loss.
    """

    config: type[qk.peft.PeftConfig]
    options: dict[str, Any] = field(default_factory=dict)
    peer: str | None = None
    bitsandbytes: bool = False
    identity: bool = True
    regularized: bool = False


ALL_LINEAR = {"target_modules": "all-linear"}
IA3 = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
PROMPT = {"num_virtual_tokens": 20}

METHODS = {
    "LoRA": Method(qk.peft.LoraConfig, {"r": 16, "lora_alpha": 32, **ALL_LINEAR}, "LoraConfig", bitsandbytes=True),
    "DoRA": Method(
        qk.peft.LoraConfig,
        {"r": 16, "lora_alpha": 32, "use_dora": True, **ALL_LINEAR},
        "LoraConfig",
        bitsandbytes=True,
    ),
    "AdaLoRA": Method(
        qk.peft.AdaLoraConfig,
        {"init_r": 24, "target_r": 16, "lora_alpha": 32, "total_step": 1000, **ALL_LINEAR},
        "AdaLoraConfig",
        bitsandbytes=True,
        regularized=True,
    ),
    "VeRA": Method(qk.peft.VeraConfig, {"r": 256, **ALL_LINEAR}, "VeraConfig", bitsandbytes=True),
    "IA3": Method(qk.peft.IA3Config, IA3, "IA3Config", bitsandbytes=True),
    "LoHa": Method(qk.peft.LoHaConfig, {"r": 8, **ALL_LINEAR}, "LoHaConfig"),
    "LoKr": Method(qk.peft.LoKrConfig, {"r": 8, **ALL_LINEAR}, "LoKrConfig"),
    "OFT": Method(qk.peft.OFTConfig, {"oft_block_size": 32, **ALL_LINEAR}, "OFTConfig", bitsandbytes=True),
    "BOFT": Method(qk.peft.BOFTConfig, {"boft_block_size": 4, **ALL_LINEAR}, "BOFTConfig"),
    "BitFit": Method(qk.peft.BitFitConfig, {"add_missing": True}),
    "Houlsby adapters": Method(qk.peft.AdapterConfig, {"placement": "houlsby"}),
    "Pfeiffer adapters": Method(qk.peft.AdapterConfig, {"placement": "pfeiffer"}),
    "parallel adapters": Method(qk.peft.AdapterConfig, {"placement": "parallel"}),
    "prompt tuning": Method(qk.peft.PromptTuningConfig, PROMPT, "PromptTuningConfig", True, identity=False),
    "P-Tuning": Method(qk.peft.PTuningConfig, PROMPT, "PromptEncoderConfig", True, identity=False),
    "prefix tuning": Method(
        qk.peft.PrefixTuningConfig,
        {**PROMPT, "prefix_projection": True, "encoder_hidden_size": 512},
        "PrefixTuningConfig",
        bitsandbytes=True,
        identity=False,
    ),
    "P-Tuning v2": Method(qk.peft.PTuningV2Config, PROMPT, "PrefixTuningConfig", True, identity=False),
    "trainable tokens": Method(
        qk.peft.TrainableTokensConfig, {"token_indices": list(range(256))}, "TrainableTokensConfig", bitsandbytes=True
    ),
    "MAM": Method(qk.peft.MAMConfig, identity=False),
    "UniPELT": Method(qk.peft.UniPELTConfig, identity=False),
    "AdapterFusion": Method(qk.peft.AdapterFusionConfig, {"adapters": ("first", "second")}, identity=False),
}
"""Name of a case -> the method. Full fine-tuning trains the base weights and therefore does not run over NF4."""


def cases(device: str) -> Iterator[Case]:
    """Yield a case for each method."""
    for name in METHODS:
        yield Case("methods", SEQUENCES * TOKENS, device=device, label=name, quick=name == "LoRA")


def cost(case: Case) -> Cost:
    """Return the cost of two passes over the linear layers and the head, which every method has in common."""
    return Cost(0, 4 * case.M * ARCHITECTURE.linear_weights)


class Inputs:
    """The model before quantization, one batch, and the loss of the dequantized model."""

    def __init__(self, case: Case) -> None:
        self.source = llama(ARCHITECTURE, case.device).requires_grad_(False)
        self.tokens = random_tokens(ARCHITECTURE, SEQUENCES, TOKENS, case.device)
        self.dequantized = with_linears(self.source, lambda linear: dense_twin(qk.LinearNF4.from_linear(linear)))
        with torch.no_grad():
            self.first_loss: float = self.dequantized(self.tokens, labels=self.tokens).loss.item()

    def bitsandbytes(self) -> nn.Module:
        """Return the source model over Linear4bit layers in training mode."""
        return with_linears(self.source, lambda linear: layers.trainable(layers.linear4bit(linear.weight.detach())))


def ours(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
    """Build training steps of our method over LinearNF4 layers."""
    method = METHODS[case.label]
    base = copy.deepcopy(inputs.source)
    qk.replace_linear(base)
    model = qk.peft.PeftModel(base)
    config = method.config(**method.options)
    if isinstance(config, qk.peft.AdapterFusionConfig):
        for name in config.adapters:
            model.add_adapter(name, qk.peft.AdapterConfig(placement="pfeiffer"))
    model.add_adapter("default", config)
    model.set_adapter("default")
    model.train()
    optimizer = qk.PagedAdamW(trained(model), lr=LEARNING_RATE, max_grad_norm=MAX_GRAD_NORM)
    return [partial(step, model, optimizer, inputs.tokens, loss=loss_with_regularizer)]


def loss_with_regularizer(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the loss with the method's own term, AdaLoRA's, which PEFT's models add in their forward."""
    assert isinstance(model, qk.peft.PeftModel)
    return transformers_loss(model, tokens) + model.peft_loss()


def through_peft(base: Callable[[Inputs], nn.Module]) -> Callable[[Case, Inputs, int], Sequence[Call]]:
    """Return a function that builds training steps of PEFT's method over a base model."""

    def build(case: Case, inputs: Inputs, copies: int) -> Sequence[Call]:
        import peft

        method = METHODS[case.label]
        assert method.peer is not None
        # PEFT would compile a CUDA extension for BOFT, and leave other compilers in the environment where it fails.
        vars(peft.tuners.boft.layer)["get_fbd_cuda"] = lambda: None
        config = getattr(peft, method.peer)(**method.options, task_type="CAUSAL_LM")
        model = peft.get_peft_model(base(inputs), config, autocast_adapter_dtype=False).train()
        optimizer = torch.optim.AdamW(trained(model), lr=LEARNING_RATE, fused=True)
        clip = partial(torch.nn.utils.clip_grad_norm_, optimizer.param_groups[0]["params"], MAX_GRAD_NORM)
        return [partial(step, model, optimizer, inputs.tokens, clip=clip)]

    return build


def verify(case: Case, inputs: Inputs, contender: str, loss: Tensor) -> None:
    """Check the first loss against that of the dequantized model."""
    method, expected = METHODS[case.label], inputs.first_loss
    bound = expected * (IDENTITY_ERROR if method.identity else LOSS_ERROR)
    most = REGULARIZER * expected if method.regularized else expected + bound
    assert expected - bound <= loss.item() <= most, f"first loss {loss.item():.4f}, not {expected:.4f}"


def trained_parameters(case: Case, call: Any) -> dict[str, Any]:
    """Return the number of trained parameters."""
    return {"trained": sum(parameter.numel() for parameter in trained(call.args[0]))}


SUITE = Suite(
    op="methods",
    cases=cases,
    cost=cost,
    inputs=Inputs,
    contenders=(
        Contender("ours", ours, whole_model, measures=trained_parameters),
        Contender(
            "bnb + PEFT",
            through_peft(Inputs.bitsandbytes),
            whole_model,
            applies=lambda case: METHODS[case.label].bitsandbytes,
            packages=("bitsandbytes", "peft"),
            measures=trained_parameters,
        ),
        Contender(
            "dense + PEFT",
            through_peft(lambda inputs: copy.deepcopy(inputs.dequantized)),
            whole_model,
            applies=lambda case: METHODS[case.label].peer is not None,
            packages=("peft",),
            measures=trained_parameters,
        ),
    ),
    verify=verify,
    modes=(COLD,),
    packages=("transformers",),
)
