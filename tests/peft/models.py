"""Small random models of the architectures that the methods support, and a batch for each."""

from __future__ import annotations

import torch
from torch import nn

VOCAB = 48
HIDDEN = 32


def llama(layers=2):
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=False,
        )
    )


def qwen3(layers=2):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=None,
            tie_word_embeddings=False,
        )
    )


def bert(layers=2):
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=64,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_labels=2,
            initializer_range=0.2,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def gpt2(layers=2):
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_embd=HIDDEN,
            n_layer=layers,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
            tie_word_embeddings=False,
        )
    )


def t5(layers=2):
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            d_kv=8,
            d_ff=64,
            num_layers=layers,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=None,
        )
    )


class TorchTransformer(nn.Module):
    """A classifier of token sequences on torch's own encoder and decoder."""

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.transformer = nn.Transformer(
            HIDDEN,
            nhead=4,
            num_encoder_layers=layers,
            num_decoder_layers=layers,
            dim_feedforward=64,
            dropout=0.0,
            batch_first=True,
        )
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, input_ids, attention_mask=None):
        padding = None if attention_mask is None else attention_mask == 0
        x = self.embed(input_ids)
        causal = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        y = self.transformer(
            x, x, tgt_mask=causal, src_key_padding_mask=padding, memory_key_padding_mask=padding, tgt_is_causal=True
        )
        return self.head(y)


MODELS = {"llama": llama, "qwen3": qwen3, "bert": bert, "gpt2": gpt2, "t5": t5, "torch": TorchTransformer}

# The output head, kept dense; the rest may be quantized.
HEADS = {"bert": "classifier", "torch": "head"} | dict.fromkeys(("llama", "qwen3", "gpt2", "t5"), "lm_head")


def make(kind: str, *, nf4: bool = False, seed: int = 0, layers: int = 2) -> nn.Module:
    """Return a random model in eval mode; with nf4 all its linear layers but the head are LinearNF4."""
    import qlora_kernels as qk

    torch.manual_seed(seed)
    model = MODELS[kind](layers).eval()
    if nf4:
        qk.replace_linear(model, skip=(HEADS[kind],))
    return model


def batch(kind: str, rows: int = 3, length: int = 7, seed: int = 1) -> dict[str, torch.Tensor]:
    """Return inputs of the model's forward, without labels; no token is the padding token 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (rows, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "t5":
        inputs["decoder_input_ids"] = torch.randint(1, VOCAB, (rows, 5), generator=generator)
    return inputs


def logits(model: nn.Module, inputs: dict[str, torch.Tensor], **kwargs) -> torch.Tensor:
    output = model(**inputs, **kwargs)
    return output if isinstance(output, torch.Tensor) else output.logits


def heads(x: torch.Tensor, n: int = 4) -> torch.Tensor:
    """Return [..., T, d] as [..., n, T, d / n], the heads of an attention."""
    return x.unflatten(-1, (n, -1)).transpose(1, 2)


def randomize(model: nn.Module, std: float = 0.1, seed: int = 2) -> None:
    """Add noise to every trained parameter, so that no adapter is the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(std * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
