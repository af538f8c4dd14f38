"""llama.cpp's models of the generation benchmark: the source model as a GGUF file, quantized by llama.cpp."""

from __future__ import annotations

import ctypes
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_kernels.integrations.gguf_export import write_model_gguf

FILE_TYPES = {"IQ4_NL": "LLAMA_FTYPE_MOSTLY_IQ4_NL", "Q4_K": "LLAMA_FTYPE_MOSTLY_Q4_K_M"}
"""llama.cpp's types of 4 bits -> their constants in llama_cpp. Rows that are no multiple of 256 are not stored in Q4_K,
so that SmolLM2's are mostly Q5_0 there; the head has 6 bits in both.
"""


class QuantizedModel:
    """A model quantized and run by llama.cpp.

    source: a Llama of transformers.   kind: of FILE_TYPES.   positions: tokens of the key-value cache.
    Raises RuntimeError if llama.cpp does not store the model in this type.
    """

    def __init__(self, source: nn.Module, kind: str, positions: int) -> None:
        import llama_cpp

        self.llama_cpp = llama_cpp
        self.folder = tempfile.TemporaryDirectory()
        dense, self.path = Path(self.folder.name, "dense.gguf"), Path(self.folder.name, "model.gguf")
        write_model_gguf(dense, source, byte_tokenizer(), "bf16")
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = getattr(llama_cpp, FILE_TYPES[kind])
        options.nthread = torch.get_num_threads()
        if llama_cpp.llama_model_quantize(bytes(dense), bytes(self.path), ctypes.byref(options)):
            raise RuntimeError(f"llama.cpp: {kind} must be a type in which it stores the model, got an error")
        dense.unlink()
        threads = torch.get_num_threads()
        self.model = llama_cpp.Llama(
            str(self.path), n_ctx=positions, n_batch=positions, n_ubatch=positions, n_threads=threads,
            n_threads_batch=threads, n_gpu_layers=0, verbose=False,
        )  # fmt: skip
        self.vocabulary = self.model.n_vocab()

    def logits(self, tokens: list[int], behind: int = 0) -> Tensor:
        """Return the logits [1, vocabulary] of the last of `tokens`, which follow the first `behind` cached tokens."""
        self.model.n_tokens = behind  # eval drops what the cache holds beyond it
        self.model.eval(tokens)
        pointer = self.llama_cpp.llama_get_logits_ith(self.model.ctx, -1)
        return torch.frombuffer(bytearray(ctypes.string_at(pointer, 4 * self.vocabulary)), dtype=torch.float32)[None]

    @lru_cache(maxsize=1)  # noqa: B019 (lives as long as the model)
    def expected(self, tokens: Tensor) -> Tensor:
        """Return the logits by transformers over the values that the file stores."""
        from transformers import AutoModelForCausalLM, GgufConfig

        reference = AutoModelForCausalLM.from_pretrained(
            self.folder.name,
            gguf_file=self.path.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
        with torch.no_grad():
            logits: Tensor = reference(tokens, logits_to_keep=1).logits[:, -1]
        return logits


def byte_tokenizer() -> Any:
    """Return a tokenizer with a token per byte; the model's other tokens have no text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate([*symbols, "<eos>"])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
