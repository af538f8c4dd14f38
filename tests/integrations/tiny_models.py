"""Random causal language models of the layouts that loading must know, and a batch for them."""

from __future__ import annotations

import torch
import transformers
from torch import nn

from tests.support.tolerances import assert_same_function

IDS = torch.arange(24).reshape(2, 12)
_SIZES = {
    "vocab_size": 48,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def build(kind: str, *, seed: int = 0) -> nn.Module:
    """kind: llama, tied (its head is the embedding), gpt2 (Conv1D), mixtral (experts that the files hold one by one),
    gpt_oss (experts stored as [in, out], with biases), hrm (files hold q, k, v and gate as one tensor).
    """
    torch.manual_seed(seed)
    if kind in ("llama", "tied"):
        config = transformers.LlamaConfig(**_SIZES, num_key_value_heads=2, tie_word_embeddings=kind == "tied")
        return transformers.LlamaForCausalLM(config).eval()
    if kind == "gpt2":
        gpt2 = transformers.GPT2Config(
            vocab_size=48, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        )
        return transformers.GPT2LMHeadModel(gpt2).eval()
    if kind == "mixtral":
        mixtral = transformers.MixtralConfig(**_SIZES, num_key_value_heads=2, num_local_experts=3)
        return transformers.MixtralForCausalLM(mixtral).eval()
    if kind == "gpt_oss":
        gpt_oss = transformers.GptOssConfig(
            **_SIZES, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, head_dim=16
        )
        return transformers.GptOssForCausalLM(gpt_oss).eval()
    assert kind == "hrm", kind
    hrm = transformers.HrmTextConfig(**_SIZES, num_key_value_heads=4, H_cycles=1, L_cycles=1)
    return transformers.HrmTextForCausalLM(hrm).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def assert_same_model(actual: nn.Module, expected: nn.Module) -> None:
    """Assert that two models hold the same bytes and that their logits agree within rounding.

    The head and attention run through torch's products, whose last bits may depend on where in memory a tensor lies.
    """
    given = actual.state_dict()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(given.pop(name), tensor), name
    assert not given
    assert_same_function(logits(actual), logits(expected))


def of_type(model: nn.Module, *kinds: type[nn.Module]) -> list[str]:
    """Names of the model's modules of exactly these classes."""
    return [name for name, module in model.named_modules() if type(module) in kinds]
