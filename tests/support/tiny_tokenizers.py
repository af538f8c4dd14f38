"""Tokenizers of every family, trained on a few sentences in milliseconds."""

from __future__ import annotations

from functools import cache
from typing import Any

TEXT = [
    "the quick brown fox jumps over the lazy dog. it is 42.",
    "What is the answer? The answer is yes, the answer is no.",
    "user: hello there\nassistant: hello to you too",
]
SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
BOS = "<s> $A"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _fast(tokenizer: Any, adds: str | None = None, **special: str) -> Any:
    """adds: TemplateProcessing's pattern for one text."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    if adds:
        known = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
        template = processors.TemplateProcessing(single=adds, special_tokens=known)
        before = tokenizer.post_processor
        tokenizer.post_processor = processors.Sequence([before, template]) if before else template
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def _byte_level(adds: str | None, *, trim_offsets: bool = False, **special: str) -> Any:
    """Return a byte-level BPE tokenizer, as of GPT-2, Llama 3 and Qwen."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return _fast(tokenizer, adds, **special)


def _sentencepiece(kind: str, adds: str | None, *, prepend: str) -> Any:
    """Return a tokenizer like those of Llama 2, Mistral, Gemma (BPE) and T5 (unigram), in which words begin with a
    mark.

    prepend: the mark before a text: "first", "always" or "never", by Metaspace; "normalizer": as in older Llama files.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    common = {"special_tokens": SPECIAL, "show_progress": False}
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        common["special_tokens"] = SPECIAL + BYTES
        trainer: Any = trainers.BpeTrainer(vocab_size=400, **common)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", **common)
    if prepend == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=kind != "bpe")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.train_from_iterator(TEXT, trainer)
    return _fast(tokenizer, adds)


def _python(adds_bos: bool) -> Any:
    """Return a tokenizer in Python without offsets, which takes the longest known piece; words begin with a mark."""
    from transformers import PreTrainedTokenizer

    letters = sorted({letter for text in TEXT for letter in text})
    pieces = ["▁the", "▁answer", "▁is", "▁yes", "▁", "he", "ll", "an", "sw", ": ", *letters]

    class LongestPiece(PreTrainedTokenizer):
        def __init__(self, **kwargs: Any) -> None:
            self.pieces = {piece: i for i, piece in enumerate([*SPECIAL, *pieces])}
            super().__init__(**kwargs)

        @property
        def vocab_size(self) -> int:
            return len(self.pieces)

        def get_vocab(self) -> dict[str, int]:
            return {**self.pieces, **self.added_tokens_encoder}

        def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
            text, tokens = "▁" + text.replace(" ", "▁"), []
            while text:
                piece = max((p for p in pieces if text.startswith(p)), key=len, default=text[0])
                tokens.append(piece)
                text = text[len(piece) :]
            return tokens

        def _convert_token_to_id(self, token: str) -> int:
            return self.pieces.get(token, self.pieces["<unk>"])

        def _convert_id_to_token(self, index: int) -> str:
            return next(piece for piece, i in self.pieces.items() if i == index)

        def convert_tokens_to_string(self, tokens: list[str]) -> str:
            return "".join(tokens).replace("▁", " ")

        def build_inputs_with_special_tokens(self, ids: list[int], other: list[int] | None = None) -> list[int]:
            return [self.bos_token_id, *ids] if adds_bos else ids

        def get_special_tokens_mask(self, ids: list[int], *_: Any, **__: Any) -> list[int]:
            return [int(i < len(SPECIAL)) for i in ids]

    extra = ["<|im_start|>", "<|im_end|>"]
    return LongestPiece(bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=extra)


_BUILDERS = {
    "gpt2": lambda: _byte_level(None, bos_token="</s>"),
    "qwen": lambda: _byte_level(None, bos_token=None),
    "llama3": lambda: _byte_level(BOS),
    "byte-level-trimmed": lambda: _byte_level(BOS, trim_offsets=True),
    "opt": lambda: _byte_level("</s> $A", bos_token="</s>"),
    "bos-and-eos": lambda: _byte_level("<s> $A </s>"),
    "llama2": lambda: _sentencepiece("bpe", BOS, prepend="first"),
    "llama2-legacy": lambda: _sentencepiece("bpe", BOS, prepend="normalizer"),
    "mistral": lambda: _sentencepiece("bpe", BOS, prepend="always"),
    "gemma": lambda: _sentencepiece("bpe", BOS, prepend="never"),
    "unigram": lambda: _sentencepiece("unigram", None, prepend="always"),
    "python": lambda: _python(adds_bos=False),
    "python-bos": lambda: _python(adds_bos=True),
}
FAMILIES = tuple(_BUILDERS)


@cache
def tiny_tokenizer(family: str) -> Any:
    """Return one of FAMILIES, shared by all callers; set attributes only on a copy.copy(...) of it."""
    return _BUILDERS[family]()
