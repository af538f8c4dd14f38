"""Writes a fast tokenizer to the fields of a GGUF file, if llama.cpp reproduces it.

llama.cpp identifies the regular expressions that split a text by names. A name is written only if the tokenizer uses
exactly that expression, because another expression would give other tokens without an error.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

from .model_structure import ModelError

_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    (("bytes", True),): "gpt-2",
    (("digits", True), ("bytes", True)): "smollm",
    (("split", _LETTERS + r"\p{N}{1,3}" + _REST), ("bytes", False)): "llama-bpe",
    (("split", _LETTERS + r"\p{N}" + _REST), ("bytes", False)): "qwen2",
}
"""Steps of a pre-tokenizer -> the name of the pre-tokenizer in llama.cpp."""
_NO_MERGE = "\u0100\u0100 \u0100"
"""A merge that never applies, since no merge makes its left part. llama.cpp loads no vocabulary without merges."""


def add_tokenizer(writer: Any, tokenizer: Any, vocabulary: int) -> None:
    """Add tokens, merges, special tokens and the chat template to a writer of the gguf package.

    tokenizer: a fast tokenizer of transformers. vocabulary: number of rows of the model's embedding.
    Raises ModelError for a tokenizer that llama.cpp does not reproduce.
    """
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ModelError(f"export: the tokenizer must be a fast one (tokenizer.json), got {type(tokenizer).__name__}")
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    model = description["model"]
    if model["type"] != "BPE":
        raise ModelError(f"export: the tokenizer must be of type BPE, got {model['type']}")
    for option in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ModelError(f"export: the tokenizer must have no {option}, got {model[option]!r}")
    ids = {**model["vocab"], **{token["content"]: token["id"] for token in description["added_tokens"]}}
    if len(ids) > vocabulary:
        raise ModelError(f"export: the tokenizer must have at most {vocabulary} tokens, got {len(ids)}")
    of_id = {number: token for token, number in ids.items()}
    added = {token["content"]: token["special"] for token in description["added_tokens"]}
    sentencepiece = bool(model.get("byte_fallback"))
    tokens = [of_id.get(number, f"[PAD{number}]") for number in range(vocabulary)]
    kinds = [_kind(token, number in of_id, added, tokenizer, sentencepiece) for number, token in enumerate(tokens)]
    if sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-float(number) for number in range(vocabulary)])
        writer.add_add_space_prefix(_adds_space(description))
    else:
        name = _split_name(description)
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        _check_whole_words(name, model, merges, added)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(name)
        writer.add_token_merges(merges or [_NO_MERGE])
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    encoded = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(encoded[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(len(encoded) > 1 and encoded[-1] == tokenizer.eos_token_id)
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        template = [{"name": name, "template": text} for name, text in template.items()]
    if template:
        writer.add_chat_template(template)


def _kind(token: str, known: bool, added: dict[str, bool], tokenizer: Any, sentencepiece: bool) -> int:
    from gguf import TokenType

    if not known:
        return int(TokenType.UNUSED)
    if sentencepiece and token == tokenizer.unk_token:
        return int(TokenType.UNKNOWN)
    if sentencepiece and len(token) == 6 and token.startswith("<0x"):
        return int(TokenType.BYTE)
    if token in added:
        return int(TokenType.CONTROL if added[token] else TokenType.USER_DEFINED)
    return int(TokenType.NORMAL)


def _split_name(description: dict[str, Any]) -> str:
    steps = _steps(description["pre_tokenizer"])
    normalizer = (description.get("normalizer") or {"type": None})["type"]
    name = _SPLITS.get(tuple(steps))
    if name is None or normalizer not in (None, "NFC"):
        raise ModelError(
            "export: the tokenizer must split texts as GPT-2, Llama 3, Qwen 2 or SmolLM do, got another pre-tokenizer; "
            "use convert_hf_to_gguf.py of llama.cpp on a folder of `export --merged`"
        )
    return name


def _check_whole_words(name: str, model: dict[str, Any], merges: list[str], added: dict[str, bool]) -> None:
    """Raise ModelError where either llama.cpp or the tokenizer alone makes a word of the vocabulary one token unmerged.

    llama.cpp does so for Llama 3 alone. It makes no difference where merges lead to every token.
    """
    expected, got = name == "llama-bpe", bool(model.get("ignore_merges"))
    merged = {pair.replace(" ", "", 1) for pair in merges}  # a byte-level token holds no space
    if got != expected and any(
        len(token) > 1 and token not in merged and token not in added for token in model["vocab"]
    ):
        raise ModelError(
            f"export: ignore_merges must be {expected} in a tokenizer that splits as {name} does and has tokens "
            f"that are no result of merges, got {got}"
        )


def _steps(part: dict[str, Any] | None) -> list[tuple[str, Any]]:
    """Return the steps of a pre-tokenizer in a form that can be compared."""
    if part is None:
        return []
    kind = part["type"]
    if kind == "Sequence":
        return [step for one in part["pretokenizers"] for step in _steps(one)]
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return [("bytes", part["use_regex"])]
    if kind == "Digits":
        return [("digits", part["individual_digits"])]
    if kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return [("split", part["pattern"].get("Regex"))]
    return [(kind, json.dumps(part))]


def _adds_space(description: dict[str, Any]) -> bool:
    """Return whether the tokenizer adds a space before a text."""
    normalizer = json.dumps(description.get("normalizer"))
    scheme = (description.get("pre_tokenizer") or {}).get("prepend_scheme", "never")
    if scheme != "never":
        where = "at the beginning of a text" if scheme == "first" else "at the beginning and after special tokens"
        warnings.warn(
            "export: llama.cpp puts a space before a text and after every special token; this tokenizer puts one "
            f"{where}, and none where there is a space already. Texts in which that differs get other tokens in "
            "llama.cpp",
            stacklevel=5,
        )
    return '"Prepend"' in normalizer or scheme != "never"
