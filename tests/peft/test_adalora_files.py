"""AdaLoRA beside PEFT: training step by step, files both ways, and runs that continue from a file."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from qlora_kernels.peft import PeftModel, adalora_ranks, get_peft_model
from tests.peft.adalora_runs import FORMATS, adalora, config, train, trained
from tests.peft.models import batch, logits, make, randomize
from tests.support.tolerances import assert_same_function

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


@pytest.mark.parametrize(("orth_reg_weight", "steps"), [(0.0, 10), (0.3, 7)])
def test_training_equals_peft(hf_peft, tmp_path, orth_reg_weight, steps):
    """Step by step, with a regularizer before the final phase, in which PEFT's still includes pruned triplets."""
    ours = get_peft_model(make("llama"), config(task_type="CAUSAL_LM", orth_reg_weight=orth_reg_weight))
    randomize(ours, std=0.05)
    ours.save_pretrained(tmp_path)
    theirs = hf_peft.PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.3) for m in (ours, theirs)]
    for model in (ours, theirs):
        model.train()
    for t in range(steps):
        inputs = {**batch("llama", seed=t), "labels": batch("llama", seed=t)["input_ids"]}
        ours_loss = ours(**inputs).loss + ours.peft_loss()
        theirs_loss = theirs(**inputs).loss
        assert_same_function(ours_loss, theirs_loss)
        for loss, optimizer in zip((ours_loss, theirs_loss), optimizers, strict=True):
            loss.backward()
            optimizer.step()
        ours.step(t)
        theirs.base_model.update_and_allocate(t)
        for optimizer in optimizers:
            optimizer.zero_grad()
        pattern = theirs.peft_config["default"].rank_pattern
        for path, delta in adalora(ours).deltas.items():
            layer = theirs.get_submodule(f"base_model.model.{path}")
            if pattern:
                assert pattern.get(f"{path}.lora_E.default", pattern.get(f"{path}.lora_E")) == delta.kept.tolist()
            if t < 7:  # later the pruned rows of both libraries differ
                assert_same_function(delta.lora_E, layer.lora_E["default"], products=20 * (t + 1))
                assert_same_function(delta.lora_A, layer.lora_A["default"], products=20 * (t + 1))
    for model in (ours, theirs):
        model.eval()
    # Ten steps, forward and backward. A step's rate is small relative to the parameters, so that errors add up.
    assert_same_function(logits(ours, batch("llama")), logits(theirs, batch("llama")), products=20 * steps)


@pytest.mark.filterwarnings(
    "ignore:.*rank_pattern keys", "ignore:.*LoRA tensor.*invalid shape", "ignore:.*fan_in_fan_out"
)
@pytest.mark.parametrize("kind", ["llama", "bert", "gpt2", "t5"])
def test_files_cross_both_ways_with_equal_outputs(hf_peft, tmp_path, kind):
    inputs = batch(kind)
    ours = trained(kind, task_type=TASKS[kind], target_r=1)
    assert len(set(adalora_ranks(ours).values())) > 1
    expected = logits(ours, inputs)
    ours.save_pretrained(tmp_path / "ours")
    theirs = hf_peft.PeftModel.from_pretrained(make(kind), tmp_path / "ours").eval()
    assert_same_function(logits(theirs, inputs), expected)
    theirs.save_pretrained(tmp_path / "theirs")
    for who in ("ours", "theirs"):
        again = PeftModel.from_pretrained(make(kind), tmp_path / who)
        assert_same_function(logits(again, inputs), expected)
        assert adalora_ranks(again) == adalora_ranks(ours)
    ours, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


def test_unpruned_peft_file_loads(hf_peft, tmp_path):
    options = {"target_modules": ["q_proj"], "total_step": 10, "init_lora_weights": False}
    theirs = hf_peft.get_peft_model(make("llama"), hf_peft.AdaLoraConfig(**options)).eval()
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(make("llama"), tmp_path)
    assert_same_function(logits(ours, batch("llama")), logits(theirs, batch("llama")))


@FORMATS
def test_only_kept_triplets_are_saved(tmp_path, nf4):
    model = trained(nf4=nf4)
    model.save_pretrained(tmp_path)
    ranks = adalora_ranks(model)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert sum(ranks.values()) == 2 * len(ranks)
    for path, rank in ranks.items():
        assert tensors[f"base_model.model.{path}.lora_A"].shape[0] == rank
        assert tensors[f"base_model.model.{path}.lora_B"].shape[1] == rank
        assert tensors[f"base_model.model.{path}.lora_E"].shape == (rank, 1)
        assert (len(pattern[f"{path}.lora_E"]), sum(pattern[f"{path}.lora_E"])) == (4, rank)
    assert not (tmp_path / "qlora_kernels.safetensors").exists()
    again = PeftModel.from_pretrained(make("llama", nf4=nf4), tmp_path)
    assert_same_function(logits(again, batch("llama")), logits(model, batch("llama")))
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_config.json").read_text() == (tmp_path / "adapter_config.json").read_text()


@pytest.mark.parametrize("stop", [1, 5, 8])
def test_training_resumes(tmp_path, stop):
    through, broken = (get_peft_model(make("llama"), config()) for _ in range(2))
    for model in (through, broken):
        randomize(model, std=0.05)
    train(through, range(10))
    train(broken, range(stop))
    broken.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True)
    assert_same_function(logits(again, batch("llama")), logits(broken, batch("llama")))
    for path, delta in adalora(again).deltas.items():
        assert all(map(torch.equal, delta.triplets, adalora(broken).deltas[path].triplets)), path
    for_use = PeftModel.from_pretrained(make("llama"), tmp_path)
    assert sum(len(delta.kept) for delta in adalora(for_use).deltas.values()) == sum(adalora_ranks(broken).values())
    assert_same_function(logits(for_use, batch("llama")), logits(broken, batch("llama")))
    train(again, range(stop, 10))
    assert adalora_ranks(again) == adalora_ranks(through)
    assert_same_function(logits(again, batch("llama")), logits(through, batch("llama")), products=100)  # ten steps


def test_pruning_continues_from_pruned_file(tmp_path):
    trained(target_r=3).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**values, "target_r": 1}))
    model = PeftModel.from_pretrained(make("llama"), tmp_path, is_trainable=True)
    train(model, range(10))
    ranks = adalora_ranks(model)
    assert sum(ranks.values()) == len(ranks)
    model.save_pretrained(tmp_path / "again")
    pattern = json.loads((tmp_path / "again" / "adapter_config.json").read_text())["rank_pattern"]
    assert {key: sum(kept) for key, kept in pattern.items()} == {f"{p}.lora_E": r for p, r in ranks.items()}
    assert all(set(kept) <= {False, True} and len(kept) == 4 for kept in pattern.values())
    again = PeftModel.from_pretrained(make("llama"), tmp_path / "again")
    assert_same_function(logits(again, batch("llama")), logits(model, batch("llama")))


def test_save_without_step_raises(tmp_path):
    model = get_peft_model(make("llama"), config())
    train(model, range(3), forget=True)
    with pytest.raises(RuntimeError, match=r"must be called after every backward.* last call was none"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    train(model, range(3))
    train(model, [3], forget=True)
    with pytest.raises(RuntimeError, match=r"last call was step\(2\)"):
        model.save_pretrained(tmp_path)


def test_a_layer_of_rank_zero_out_of_a_file(tmp_path):
    model = trained(nf4=True, target_r=1)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make("llama", nf4=True), tmp_path, is_trainable=True)
    assert 0 in adalora_ranks(again).values()
    assert_same_function(logits(again, batch("llama")), logits(model, batch("llama")))
    train(again, range(10))
    again.merge_adapter()
