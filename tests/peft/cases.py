"""One small configuration for each registered method (and some combinations), and how to build a model with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qlora_kernels import peft
from qlora_kernels.peft import PeftConfig, PeftModel, get_peft_model
from tests.peft.models import HEADS, batch, logits, make, randomize

ARCHITECTURES = ("llama", "bert", "gpt2", "t5", "torch")


@dataclass(frozen=True)
class Case:
    """identity: whether a new adapter computes the base function, exactly or to this tolerance; None if it does not.

    rows: whether the rows of a batch may use different adapters of the method.
    """

    config: PeftConfig | Sequence[PeftConfig]
    identity: float | None = None
    rows: bool = True
    quantized: bool = True
    kinds: Sequence[str] = ARCHITECTURES


CASES: dict[str, Case] = {
    "full_ft": Case(peft.FullFTConfig(), identity=0.0, rows=False, quantized=False),
    "bitfit": Case(peft.BitFitConfig(add_missing=True), identity=0.0, rows=False),
    "prompt_tuning": Case(peft.PromptTuningConfig(num_virtual_tokens=4)),
    "p_tuning": Case(peft.PTuningConfig(num_virtual_tokens=4)),
    "p_tuning_lstm": Case(peft.PTuningConfig(num_virtual_tokens=4, encoder_reparameterization_type="LSTM")),
    "prefix_tuning": Case(peft.PrefixTuningConfig(num_virtual_tokens=4, encoder_hidden_size=16)),
    "p_tuning_v2": Case(peft.PTuningV2Config(num_virtual_tokens=4)),
    "houlsby": Case(peft.AdapterConfig(bottleneck_size=8), identity=1e-2, rows=False),
    "pfeiffer": Case(peft.AdapterConfig(placement="pfeiffer", bottleneck_size=8), identity=1e-2),
    "parallel": Case(peft.AdapterConfig(placement="parallel", bottleneck_size=8), identity=0.0),
    "fusion": Case(peft.AdapterFusionConfig(adapters=("a", "b"))),
    "lora": Case(peft.LoraConfig(target_modules="all-linear", r=4), identity=1e-5),
    "dora": Case(peft.LoraConfig(target_modules="all-linear", r=4, use_dora=True), identity=1e-5),
    "adalora": Case(
        peft.AdaLoraConfig(target_modules="all-linear", init_r=4, target_r=2, total_step=12), identity=1e-5
    ),
    "ia3": Case(
        peft.IA3Config(
            target_modules="all-linear",
            feedforward_modules=r".*(down_proj|output\.dense|mlp\.c_proj|wo|linear2)",
        ),
        identity=0.0,
        kinds=("llama", "t5"),
    ),
    "vera": Case(peft.VeraConfig(target_modules="all-linear", r=8), identity=1e-5, kinds=("llama", "gpt2")),
    "loha": Case(peft.LoHaConfig(target_modules="all-linear", r=2), identity=1e-5, kinds=("llama", "bert")),
    "lokr": Case(
        peft.LoKrConfig(target_modules="all-linear", r=2, decompose_both=True), identity=1e-5, kinds=("llama", "torch")
    ),
    "oft": Case(peft.OFTConfig(target_modules="all-linear", oft_block_size=8), identity=1e-5, kinds=("llama", "gpt2")),
    "boft": Case(
        peft.BOFTConfig(target_modules="all-linear", boft_n_butterfly_factor=2), identity=1e-5, kinds=("llama", "bert")
    ),
    "trainable_tokens": Case(
        peft.TrainableTokensConfig(
            token_indices=list(range(1, 48)), target_modules=r".*(embed_tokens|word_embeddings|wte|shared)|embed"
        ),
        identity=1e-5,
        kinds=("llama", "t5"),
    ),
    "mam": Case(peft.MAMConfig(prefix_length=4, prefix_hidden_size=16, bottleneck_size=8)),
    "unipelt": Case(peft.UniPELTConfig(prefix_length=4, prefix_hidden_size=16, lora_r=4, reduction_factor=4)),
    "lora+bitfit": Case([peft.LoraConfig(r=4), peft.BitFitConfig(add_missing=True)], identity=1e-5, rows=False),
    "prompt+lora+pfeiffer": Case(
        [
            peft.PromptTuningConfig(num_virtual_tokens=3),
            peft.AdapterConfig(placement="pfeiffer", bottleneck_size=4),
            peft.LoraConfig(r=2),
        ]
    ),
}


def build(case: str, kind: str, *, nf4: bool = False, task: bool = False, seed: int = 0, layers: int = 2) -> PeftModel:
    """Build a model with the case's adapter, "default", active.   task: with a trained classification head, for
    BERT."""
    torch.manual_seed(seed)
    config = CASES[case].config
    if task and kind == "bert" and isinstance(config, PeftConfig):
        config = config.replace(task_type="SEQ_CLS")
    base = make(kind, nf4=nf4, seed=seed, layers=layers).requires_grad_(False)
    if case != "fusion":
        return get_peft_model(base, config).eval()
    model = PeftModel(base)
    for name in ("a", "b"):
        model.add_adapter(name, peft.AdapterConfig(placement="pfeiffer", bottleneck_size=8))
        model.set_adapter(name)
        randomize(model, seed=ord(name))
    model.add_adapter("default", config)
    model.set_adapter("default")
    return model.eval()


def task_loss(model: PeftModel, kind: str, rows: int = 8) -> torch.Tensor:
    """Return a learnable task: predict the first token (its parity, for the classifier) everywhere."""
    inputs = batch(kind, rows=rows)
    first = inputs["input_ids"][:, 0]
    y = logits(model, inputs)
    if kind == "bert":
        return F.cross_entropy(y, first % 2)
    return F.cross_entropy(y.flatten(0, 1), first.repeat_interleave(y.shape[1]))


__all__ = ["ARCHITECTURES", "CASES", "HEADS", "Case", "build", "task_loss"]
