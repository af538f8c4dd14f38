"""quantize_folder: the same bytes as LinearNF4, in files that other libraries read, with one tensor in memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from qlora_kernels import LinearNF4, replace_linear
from qlora_kernels.integrations.transformers import ModelError, is_quantized, linear_layers, load_model, load_tokenizer
from qlora_kernels.io.atomic import file_appearing_by_rename, folder_appearing_by_rename
from qlora_kernels.io.model_cache import cached_folder
from qlora_kernels.io.safetensors_writer import SafetensorsWriter
from qlora_kernels.io.streaming import quantize_folder
from tests.support.tiny_model import LINEARS, write_tiny_llama
from tests.support.tolerances import assert_same_function

IDS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module", params=[64, 76], ids=["even", "odd-blocks"])
def dense(request, tmp_path_factory):
    """A hidden size of 76, with which rows end inside blocks."""
    return write_tiny_llama(tmp_path_factory.mktemp("dense") / "model", hidden=request.param)


def quantized(dense, folder, **keywords):
    folder.mkdir()
    report = quantize_folder(dense, folder, linear_layers(dense), **keywords)
    return folder, report


@pytest.mark.parametrize("double_quant", [True, False], ids=["dq", "fp32-absmax"])
@pytest.mark.parametrize("blocksize", [64, 128])
def test_same_bytes_as_replace_linear(dense, tmp_path, blocksize, double_quant):
    folder, report = quantized(dense, tmp_path / "nf4", blocksize=blocksize, double_quant=double_quant)
    expected = load_model(dense)
    replaced = replace_linear(expected, blocksize=blocksize, double_quant=double_quant, compute_dtype=torch.bfloat16)
    assert (report.bytes_before, report.bytes_after) == (replaced.bytes_before, replaced.bytes_after)
    assert len(report.quantized) == LINEARS
    state, stored = expected.state_dict(), load_file(folder / "model.safetensors")
    assert stored.keys() == state.keys() - {"lm_head.weight"}  # tied
    assert all(torch.equal(stored[name], state[name]) for name in stored)
    model = load_model(folder)
    assert sum(isinstance(m, LinearNF4) for m in model.modules()) == LINEARS
    with torch.no_grad():
        assert_same_function(model(IDS).logits, expected(IDS).logits)
    assert load_tokenizer(folder)("hi")["input_ids"] == load_tokenizer(dense)("hi")["input_ids"]
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_transformers_with_bitsandbytes_loads_it(dense, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    folder, _ = quantized(dense, tmp_path / "nf4")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ours = load_model(folder)
    kinds = {name: type(m).__name__ for name, m in theirs.named_modules() if "Linear" in type(m).__name__}
    assert kinds == {**dict.fromkeys(linear_layers(dense), "Linear4bit"), "lm_head": "Linear"}
    for name in linear_layers(dense):
        packed, layer = theirs.get_submodule(name).weight, ours.get_submodule(name)
        assert torch.equal(packed.reshape(-1), layer.packed.reshape(-1)), name
        assert torch.equal(packed.quant_state.absmax, layer.absmax_q), name
        assert packed.quant_state.offset == layer.absmax_offset, name


def test_shards_stay_shards(dense, tmp_path):
    sharded = tmp_path / "sharded"
    shutil.copytree(dense, sharded)
    tensors = load_file(sharded / "model.safetensors")
    (sharded / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, sharded / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    one, _ = quantized(dense, tmp_path / "one")
    two, _ = quantized(sharded, tmp_path / "two")
    weight_map = json.loads((two / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(weight_map.values()) == files.keys()
    expected = load_file(one / "model.safetensors")
    assert weight_map.keys() == expected.keys()
    for file in files:
        for name, tensor in load_file(two / file).items():
            assert weight_map[name] == file
            assert torch.equal(tensor, expected[name])
    with torch.no_grad():
        assert_same_function(load_model(two)(IDS).logits, load_model(one)(IDS).logits)
    (two / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00002\.safetensors is missing"):
        load_model(two)


def test_peak_memory_close_to_one_tensor(tmp_path):
    """The second half of 48 layers of 4 MB needs no more memory than the first, within two weights for the allocator.

    The packed weights of the second half are 24 MB, so that a writer that retains them is detected.
    """
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "config.json").write_text("{}")
    weights = {f"layers.{i}.weight": torch.randn(1024, 2048).bfloat16() for i in range(48)}
    save_file(weights, source / "model.safetensors")
    script = f"""
import torch
from pathlib import Path
from qlora_kernels.io.streaming import quantize_folder

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024

# Not the mapped source: its pages are the kernel's to drop.
before = status("RssAnon")
used = []
quantize_folder(
    Path({str(source)!r}), Path({str(target)!r}), [f"layers.{{i}}" for i in range(48)],
    on_tensor=lambda name: used.append(status("RssAnon") - before),
)
print(max(used[:24]), max(used))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    half, whole = map(int, done.stdout.split())
    assert whole <= half + 2 * 4 * 2**20
    assert whole < 70 * 2**20  # temporaries of the reference backend: fp32 and int64 copies of one weight


def test_refusals(dense, tmp_path):
    folder, _ = quantized(dense, tmp_path / "nf4")
    with pytest.raises(ValueError, match="must hold 16- or 32-bit weights, got quantization 'bitsandbytes'"):
        quantize_folder(folder, tmp_path, ["model.layers.0.mlp.up_proj"])
    with pytest.raises(ValueError, match="at least one of 1 layers"):
        quantize_folder(dense, tmp_path, ["nothing"])
    with pytest.raises(ModelError, match=r"skip: 'up_porj' matches no linear layer.*up_proj"):
        linear_layers(dense, ["up_porj"])
    (tmp_path / "empty").mkdir()
    shutil.copy(dense / "config.json", tmp_path / "empty")
    with pytest.raises(ValueError, match=r"pickled weights are not read"):
        quantize_folder(tmp_path / "empty", tmp_path, ["x"])
    poisoned = tmp_path / "poisoned"
    shutil.copytree(dense, poisoned)
    tensors = load_file(poisoned / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = float("nan")
    save_file(tensors, poisoned / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: .*inf or NaN"):
        quantize_folder(poisoned, tmp_path, linear_layers(dense))


def test_missing_or_unexpected_weight_is_refused(dense, tmp_path):
    folder, _ = quantized(dense, tmp_path / "nf4")
    tensors = load_file(folder / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.norm\.weight is missing"):
        load_model(folder)
    save_file({**tensors, "model.norm.weight": norm, "model.extra": norm.clone()}, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"got model\.extra too"):
        load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="got 'gptq'"):
        is_quantized(folder)


def test_writer_any_order_any_shape(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "scalar": torch.tensor(2.5),
        "odd": torch.arange(7, dtype=torch.uint8),
        "none": torch.empty(0, 4),
        "big": torch.arange(70_001, dtype=torch.uint8),
        "strided": torch.randn(6, 4).t(),
        "flags": torch.tensor([True, False, True]),
        "last": torch.randn(9, dtype=torch.float64),
    }
    path = tmp_path / "file.safetensors"
    with SafetensorsWriter(path, list(reversed(tensors)), {"format": "pt", "note": "x"}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        with pytest.raises(ValueError, match="must be one of the announced names and be written once, got 'a'"):
            writer.write("a", tensors["a"])
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert torch.equal(loaded[name], tensor), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "note": "x"}
    with pytest.raises(ValueError, match="every announced tensor must be written"), SafetensorsWriter(path, ["a"]):
        pass


def test_appearing_by_rename(tmp_path):
    folder = tmp_path / "folder"
    with folder_appearing_by_rename(folder) as partial:
        (partial / "one").write_text("1")
        assert not folder.exists()
    with pytest.raises(FileNotFoundError), folder_appearing_by_rename(folder) as partial:
        shutil.copy(tmp_path / "none", partial)
    assert [p.name for p in folder.iterdir()] == ["one"]
    with folder_appearing_by_rename(folder) as partial:
        (partial / "two").write_text("2")
        assert [p.name for p in folder.iterdir()] == ["one"]
    assert [p.name for p in folder.iterdir()] == ["two"]
    with pytest.raises(TypeError), file_appearing_by_rename(tmp_path / "file") as partial:
        partial.write_text(3)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_cache_key_is_of_contents_and_settings(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "weights").write_text("w")
    made = []

    def make(folder):
        made.append(folder)
        (folder / "done").touch()

    def get(**settings):
        return cached_folder(tmp_path / "cache", "kind", source, settings, make)

    first, cached = get(blocksize=64)
    assert not cached
    assert get(blocksize=64) == (first, True)
    assert get(blocksize=128)[0] != first
    (source / "weights").write_text("v")
    assert get(blocksize=64) != (first, True)
    assert len(made) == 3
