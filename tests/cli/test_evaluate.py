"""eval: perplexity over a file, with and without an adapter, and lm-eval's tasks."""

from __future__ import annotations

import importlib.util
import json
import sys
import types

import pytest
import torch

from qlora_kernels.cli import main
from qlora_kernels.integrations.model_folders import load_model, load_tokenizer
from qlora_kernels.peft import LoraConfig, get_peft_model
from qlora_kernels.training import ChunkedLoss, encode, perplexity, read_corpus
from tests.support.tiny_model import write_jsonl, write_tiny_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(9)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


def evaluate(capsys, *options) -> dict:
    capsys.readouterr()
    assert main(["eval", "--json", *map(str, options)]) == 0
    return json.loads(capsys.readouterr().out)


def test_perplexity_over_all_rows(capsys, model, data, tmp_path):
    loaded, tokenizer = load_model(model, torch.float32), load_tokenizer(model)
    examples = encode("rows", read_corpus(data, 0.0).train, tokenizer, 32)
    expected = perplexity(ChunkedLoss(loaded), examples, 4, tokenizer.pad_token_id)
    options = ["--model", model, "--data", data, "--seq-len", 32, "--dense", "--compute-dtype", "fp32"]
    result = evaluate(capsys, *options)
    assert (result["perplexity"], result["predictions"]) == (expected.value, expected.tokens)
    assert result["rows"] == "9 rows: 9 whole"
    adapted = get_peft_model(loaded, LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    of_adapter = evaluate(capsys, *options, "--adapter", tmp_path / "adapter")["perplexity"]
    adapted.eval()
    assert of_adapter == perplexity(ChunkedLoss(adapted), examples, 4, tokenizer.pad_token_id).value
    assert of_adapter != expected.value


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "--data or --tasks must be given, got neither"),
        (["--data", "no.jsonl"], "no.jsonl"),
        (["--tasks", "piqa"], "lm-eval must be installed; run `pip install 'lm-eval[hf]'`"),
    ],
)
def test_refused(capsys, monkeypatch, model, options, words):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["eval", "--model", str(model), *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_tasks_are_passed_to_lm_eval(capsys, monkeypatch, model, tmp_path):
    """The calls that lm-eval 0.4 takes; the next test runs the library itself where it is installed."""
    seen = {}

    def simple_evaluate(**options):
        seen.update(options)
        if options["tasks"] == ["none"]:
            raise KeyError("none")
        return {"results": {"piqa": {"acc,none": 0.5, "alias": "piqa"}}}

    modules = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.models.huggingface", "lm_eval.tasks")}
    modules["lm_eval"].simple_evaluate = simple_evaluate
    modules["lm_eval.models.huggingface"].HFLM = lambda **options: options
    modules["lm_eval.tasks"].TaskManager = lambda include_path: include_path
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "lm_eval" or find_spec(name))
    options = ["--model", model, "--batch", 3, "--limit", 7, "--few-shot", 2, "--task-folder", tmp_path]
    result = evaluate(capsys, *options, "--tasks", "piqa")
    assert result["tasks"] == {"piqa": {"acc,none": 0.5}}
    assert "perplexity" not in result
    assert (seen["tasks"], seen["num_fewshot"], seen["limit"]) == (["piqa"], 2, 7)
    assert seen["task_manager"] == str(tmp_path)
    assert seen["model"]["batch_size"] == 3
    assert main(["eval", "--model", str(model), "--tasks", "none"]) == 2
    assert "--tasks: must be names of lm-eval's tasks, got 'none'" in capsys.readouterr().err


def test_a_task_of_lm_eval_itself(capsys, model, tmp_path):
    """A local multiple-choice task: the accuracy is that of the summed log-probabilities of the answers."""
    pytest.importorskip("lm_eval")
    rows = [{"question": f"{i}+1=", "choices": ["a", "bcd"], "answer": i % 2} for i in range(4)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "tiny.yaml").write_text(
        "task: tiny_choice\ndataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: answer\n'
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )
    options = ["--model", model, "--tasks", "tiny_choice", "--task-folder", tmp_path, "--dense"]
    result = evaluate(capsys, *options, "--compute-dtype", "fp32")
    loaded, tokenizer = load_model(model, torch.float32), load_tokenizer(model)
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            asked = tokenizer(row["question"])["input_ids"]
            ids = torch.tensor([asked + tokenizer(" " + choice)["input_ids"]])
            with torch.no_grad():
                logs = loaded(ids).logits.log_softmax(-1)[0, len(asked) - 1 : -1]
            scores.append(logs.gather(1, ids[0, len(asked) :, None]).sum())
        right += int(scores[1] > scores[0]) == row["answer"]
    assert result["tasks"]["tiny_choice"]["acc,none"] == right / len(rows)
