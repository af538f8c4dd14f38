"""Exported adapter folders in vLLM, where it is installed (its CPU build is enough): same answers as transformers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.cli import main

transformers = pytest.importorskip("transformers")
if importlib.util.find_spec("vllm") is None:  # an import would configure logging and devices of this process
    pytest.skip("vllm is not installed", allow_module_level=True)

PROMPTS = [list(range(5, 17)), [7, 9, 100, 33], [60, 3, 3, 90, 50, 61, 12]]
TOKENS = 8
GENERATE = """
import json, sys
import vllm
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    base, adapter, prompts, tokens = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4])
    limits = {"max_lora_rank": 8, "max_model_len": 64}
    model = vllm.LLM(base, dtype="float32", enable_lora=True, enforce_eager=True, skip_tokenizer_init=True, **limits)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=tokens, detokenize=False)
    answers = []
    for lora in (None, LoRARequest("adapter", 1, adapter)):
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = model.generate(inputs, sampling, lora_request=lora)
        answers.append([list(output.outputs[0].token_ids) for output in outputs])
    print("ANSWERS", json.dumps(answers))
"""


def greedy(model):
    """Return the tokens after each prompt."""
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "target_modules": ["q_proj", "down_proj"]}])
def test_vllm_serves_an_exported_adapter(options, tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # logits that differ by much more than two libraries' roundings
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(base)
    options = {"target_modules": "all-linear", "init_lora_weights": False, **options}
    adapted = qk.peft.get_peft_model(model, qk.peft.LoraConfig(r=8, lora_alpha=24, task_type="CAUSAL_LM", **options))
    adapted.eval().save_pretrained(tmp_path / "trained")
    assert main(["export", "--model", str(base), "--adapter", str(tmp_path / "trained"), "--vllm", str(adapter)]) == 0
    with adapted.disable_adapter():
        expected = [greedy(adapted)]
    expected.append(greedy(adapted))
    assert expected[0] != expected[1]
    script = tmp_path / "generate.py"
    script.write_text(GENERATE)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    arguments = [str(base), str(adapter), json.dumps(PROMPTS), str(TOKENS)]
    run = subprocess.run([sys.executable, str(script), *arguments], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    (line,) = (line for line in run.stdout.splitlines() if line.startswith("ANSWERS "))
    assert json.loads(line.removeprefix("ANSWERS ")) == expected
