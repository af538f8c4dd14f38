"""Impossible requests are refused with one line before any work; optional parts never cost the result."""

from __future__ import annotations

import json
import shutil
import signal
import sys

import pytest
import torch

from qlora_kernels.cli import finetune_report, main, patterns
from qlora_kernels.cli.arguments import UsageError
from qlora_kernels.peft import LoraConfig, get_peft_model
from qlora_kernels.training import Example, perplexity
from tests.support.tiny_model import write_jsonl, write_tiny_llama
from tests.support.tiny_tokenizers import tiny_tokenizer

SLOW = r"([\w.]+_?)+!"
"""A regular expression that takes exponential time in the length of a name without a "!"."""


@pytest.fixture
def watchdog():
    """Ends a test that hangs; it bounds no duration."""

    def expire(number, frame):
        raise RuntimeError("the test hangs")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(300)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [{"prompt": "count ", "completion": f"to {i}"} for i in range(12)]
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


def finetune_arguments(model, data, out, *more) -> list[str]:
    fast = ["--steps", "1", "--batch", "2", "--seq-len", "32", "--eval-windows", "1", "--max-new-tokens", "2"]
    return ["finetune", "--model", str(model), "--data", str(data), "--out", str(out), *fast, *map(str, more)]


def refused(capsys, argv, code: int = 2) -> str:
    """Return the line on stderr of a run that exits with `code`."""
    capsys.readouterr()
    try:
        got = main([str(argument) for argument in argv])
    except SystemExit as exit:
        got = exit.code
    captured = capsys.readouterr()
    assert got == code
    lines = [line for line in captured.err.splitlines() if not line.startswith("[")]
    assert len(lines) == 1, captured.err
    assert len(lines[0]) < 500
    return lines[0]


def with_config(model, folder, **values):
    """Return a copy of the model folder with other values in config.json."""
    shutil.copytree(model, folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def with_token(model, folder, **special):
    """Return a copy of the model folder whose tokenizer has one token more than the embedding has rows."""
    from transformers import AutoTokenizer

    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder)
    return folder


def test_tokens_without_an_embedding_are_refused(capsys, model, tmp_path):
    folder = with_token(model, tmp_path / "model")
    rows = [{"prompt": "a", "completion": "b<new>" if i == 3 else "b"} for i in range(12)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    line = refused(capsys, finetune_arguments(folder, data, tmp_path / "out"))
    assert "must only give ids below 257, the rows of the model's embedding, got 257 for '<new>'" in line
    assert not (tmp_path / "out" / "cache").exists(), "nothing was computed"
    line = refused(capsys, ["generate", "--model", folder, "--dense", "--prompt", "a<new>"])
    assert "got 257 for '<new>'" in line
    assert main(["generate", "--model", str(folder), "--dense", "--prompt", "a", "--max-new-tokens", "1"]) == 0


def test_tokenizer_of_another_model_is_refused(capsys, data, model, tmp_path):
    """This is refused even if the data uses only ids that the model has."""
    folder = shutil.copytree(model, tmp_path / "model")
    tiny_tokenizer("gpt2").save_pretrained(folder)
    line = refused(capsys, finetune_arguments(folder, data, tmp_path / "out"))
    assert "vocabulary must fit the 257 rows of the model's embedding, got 3" in line


def test_padding_token_needs_no_embedding(capsys, model, data, tmp_path):
    """A tokenizer with a token added only for padding gives the training of one that pads with the end of text."""
    folder = with_token(model, tmp_path / "model", pad_token="<pad>")
    losses = []
    for number, source in enumerate((model, folder)):
        out = tmp_path / str(number)
        assert main([*finetune_arguments(source, data, out), "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["steps"][0]["loss"])
    assert losses[0] == losses[1]


def test_texts_beyond_the_models_positions_are_refused(capsys, model, tmp_path):
    folder = with_config(model, tmp_path / "model", max_position_embeddings=16)
    text = tmp_path / "text.txt"
    text.write_text("many words " * 40)
    line = refused(capsys, finetune_arguments(folder, text, tmp_path / "out"))
    assert "--seq-len: must leave at most 16 tokens, the model's positions, got 32" in line
    short = [*finetune_arguments(folder, text, tmp_path / "out"), "--seq-len", "12"]
    soft_prompt = ["--method", "prompt_tuning", "--set", "num_virtual_tokens=8"]
    assert "must leave at most 16 tokens, the model's positions, got 20" in refused(capsys, [*short, *soft_prompt])
    assert "--prompt and --max-new-tokens: must" in refused(capsys, [*short, "--prompt", "x" * 15])
    assert main([*short, "--max-new-tokens", "99", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sample"]["text"] is not None
    line = refused(capsys, ["generate", "--model", folder, "--dense", "--prompt", "x" * 15, "--max-new-tokens", "2"])
    assert "must leave at most 16 tokens, the model's positions, got 17" in line
    assert "at least one token" in refused(capsys, ["generate", "--model", folder, "--dense", "--prompt", ""])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch", 10**12, "--micro-batch", 1], "--batch: must fit this machine's memory of"),
        (["--batch", 10**12], "--batch: must fit this machine's memory of"),
        (["--batch", 10**11, "--micro-batch", 10**11], "must fit this machine's memory of"),
        (["--batch", 1, "--micro-batch", 10**12], "--micro-batch (or --batch, without it): must fit"),
        (["--r", 10**10], "--r: must fit this machine's memory of"),
        (["--set", "r=10000000000"], "--r: must fit this machine's memory of"),
        (["--method", "adalora", "--set", "init_r=10000000000"], "--r: must fit this machine's memory of"),
        (["--seq-len", 1], "--seq-len must be >= 2 to predict a token"),
    ],
)
def test_runs_beyond_the_memory_are_refused(capsys, model, data, tmp_path, options, words):
    assert words in refused(capsys, [*finetune_arguments(model, data, tmp_path), *options])


def test_seq_len_beyond_all_examples_is_accepted(capsys, model, data, tmp_path):
    assert main([*finetune_arguments(model, data, tmp_path), "--seq-len", str(10**12)]) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--seed", 2**64], "--seed: must be in [0, 8796093022208)"),
        (["--seed", -1], "--seed: must be in [0, 8796093022208)"),
        (["--lr", "inf"], "--lr: must be finite and > 0"),
        (["--lr", "nan"], "--lr: must be finite and > 0"),
        (["--clip", "1e999"], "--clip: must be finite and >= 0"),
        (["--dropout", "0.9999999999999999"], "--dropout: must be below 1 - 2**-17"),
        (["--unseen", "nan"], "--unseen: must be in [0, 1)"),
        (["--steps", "9" * 5000], "--steps"),
        (["--set", "lora_alpha=NaN"], "lora_alpha must have a value in JSON, got 'NaN' (numbers must be finite"),
        (["--set", "lora_alpha=1e999"], "(numbers must be finite, got one beyond the range of float64)"),
        (["--set", "loftq_config=" + "[" * 100_000], "(nested too deeply)"),
        (["--set", '{"r": 4}'], "must be FIELD=VALUE, got"),
    ],
)
def test_numbers_out_of_range_and_bad_values_are_refused(capsys, model, data, tmp_path, options, words):
    line = refused(capsys, [*finetune_arguments(model, data, tmp_path), *options])
    assert words in line


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", "caf\udce9"], "--prompt: must be text in UTF-8"),
        (["--prompt", "caf\udce9", "--chat"], "--prompt: must be text in UTF-8"),
        (["--prompt", "x", "--temperature", "1e-320"], "--temperature: must be 0, or finite and >= 1e-6"),
        (["--prompt", "x", "--temperature", "inf"], "--temperature: must be 0, or finite and >= 1e-6"),
    ],
)
def test_bad_options_of_generate_are_refused(capsys, model, options, words):
    assert words in refused(capsys, ["generate", "--model", model, "--dense", *options])


@pytest.mark.parametrize("name", ["a" * 300, "a\x00b"])
def test_impossible_names_of_folders_are_refused(capsys, model, tmp_path, name):
    refused(capsys, ["quantize", model, tmp_path / name])
    refused(capsys, ["merge", "--model", model, "--adapter", model, "--out", tmp_path / name])


def test_full_disk_is_one_line(capsys, model, data, tmp_path, monkeypatch):
    def fail(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qlora_kernels.cli.finetune_report.FinetuneReport.to_json", fail)
    line = refused(capsys, finetune_arguments(model, data, tmp_path), code=1)
    assert line == "qlora-kernels finetune: [Errno 28] No space left on device"


def test_largest_seed_works(model, data, tmp_path):
    assert main([*finetune_arguments(model, data, tmp_path), "--seed", str(2**43 - 1)]) == 0


@pytest.mark.usefixtures("watchdog")
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("target_modules", SLOW, "target_modules: must match the model's"),
        ("exclude_modules", SLOW, "exclude_modules: must match the model's"),
        ("rank_pattern", {SLOW: 4}, "rank_pattern: must match the model's"),
        ("alpha_pattern", {SLOW: 4}, "alpha_pattern: must match the model's"),
        ("target_modules", "[", "target_modules: must be a regular expression, got '['"),
        ("target_modules", "a{1,99999999999999}", "must be a regular expression"),
        ("target_modules", "(" * 9000, "must be a regular expression"),
        ("rank_pattern", {"*": 4}, "rank_pattern: must be a regular expression"),
    ],
    ids=[
        *("slow targets", "slow exclusion", "slow rank pattern", "slow alpha pattern"),
        *("open bracket", "huge repetition", "deep nesting", "nothing to repeat"),
    ],
)
def test_slow_and_malformed_regular_expressions_are_refused(
    capsys, model, data, tmp_path, monkeypatch, field, value, words
):
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    option = f"{field}={json.dumps(value)}"
    assert words in refused(capsys, [*finetune_arguments(model, data, tmp_path), "--set", option])


@pytest.mark.usefixtures("watchdog")
def test_slow_expression_for_layers(monkeypatch):
    outline = torch.nn.ModuleDict({"decoder_layers_of_attention_a": torch.nn.Linear(2, 2)})
    config = LoraConfig(layers_to_transform=[1], layers_pattern=["layers", SLOW])
    monkeypatch.setattr(patterns, "SECONDS", 0.1)
    with pytest.raises(UsageError, match=r"layers_pattern: must match the model's 2 names within 0\.1 s"):
        patterns.check_patterns(config, outline)
    patterns.check_patterns(LoraConfig(target_modules=r".*\.(q|v)_proj", rank_pattern={"q_proj": 4}), outline)


@pytest.mark.usefixtures("watchdog")
@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["merge", "--out", "merged"]])
def test_slow_expression_in_an_adapter_file(capsys, model, tmp_path, monkeypatch, command):
    from qlora_kernels.integrations.transformers import load_model

    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    adapter = tmp_path / "adapter"
    get_peft_model(load_model(model), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": SLOW}))
    name, *options = command
    options = [str(tmp_path / option) if option == "merged" else option for option in options]
    line = refused(capsys, [name, "--model", model, "--adapter", adapter, "--dense", *options])
    assert "target_modules: must match the model's" in line


def test_run_without_matplotlib(capsys, model, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    finetune_report.can_plot.cache_clear()
    try:
        assert main(finetune_arguments(model, data, tmp_path)) == 0
    finally:
        finetune_report.can_plot.cache_clear()
    captured = capsys.readouterr()
    assert "loss.png is not drawn: matplotlib is missing" in captured.err.splitlines()[0]
    assert "adapter/, report.json" in captured.out
    notes = json.loads((tmp_path / "report.json").read_text())["notes"]
    assert any("pip install 'qlora_kernels[plot]'" in note for note in notes)
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("name", ["transformers", "accelerate", "tqdm", "psutil"])
def test_needs_are_checked_first(capsys, model, data, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    line = refused(capsys, finetune_arguments(model, data, tmp_path / "out"))
    assert f"{name} must be installed; run `pip install 'qlora_kernels[hf]'`" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.\nError code 12"),
    ],
)
def test_out_of_memory_is_one_line(capsys, model, data, tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("qlora_kernels.cli.finetune_training.train", fail)
    line = refused(capsys, finetune_arguments(model, data, tmp_path), code=1)
    assert line.startswith("qlora-kernels finetune: out of memory: ")


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 1e5])
def test_perplexity_beyond_float64_is_refused(loss):
    class Loss:
        model = torch.nn.Identity()

        def __call__(self, batch):
            return torch.tensor(loss * batch.learned_tokens)

    example = Example(torch.tensor([1, 2]), torch.tensor([1, 2]))
    with pytest.raises(FloatingPointError, match="perplexity: the loss must be below 710 nats a token"):
        perplexity(Loss(), [example], 1)
