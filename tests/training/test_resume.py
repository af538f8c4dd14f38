"""Every PEFT method resumes from every checkpoint with the bits of an uninterrupted run."""

from __future__ import annotations

import pytest
import torch

from qlora_kernels import peft
from qlora_kernels.training import ChunkedLoss, TrainConfig, train
from qlora_kernels.training.run_state import ResumeError
from qlora_kernels.training.windows import Example
from tests.peft.models import make

STEPS = 5
CONFIG = TrainConfig(steps=STEPS, batch_size=2, lr=3e-2, checkpoint_every=1)
TARGETS = {"target_modules": ["q_proj", "down_proj"]}
METHODS = {
    "lora": peft.LoraConfig(r=2, lora_dropout=0.2, **TARGETS),
    "dora": peft.LoraConfig(r=2, use_dora=True, **TARGETS),
    "pissa": peft.LoraConfig(r=2, init_lora_weights="pissa", **TARGETS),
    "adalora": peft.AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=1, total_step=STEPS, **TARGETS),
    "bitfit": peft.BitFitConfig(add_missing=True),
    "full": peft.FullFTConfig(),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, encoder_hidden_size=8, prefix_dropout=0.1),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p-tuning": peft.PTuningConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
    "p-tuning-v2": peft.PTuningV2Config(num_virtual_tokens=3),
    "adapter": peft.AdapterConfig(dropout=0.1),
    "mam": peft.MAMConfig(),
    "unipelt": peft.UniPELTConfig(),
    "combined": [peft.LoraConfig(r=2, **TARGETS), peft.PrefixTuningConfig(num_virtual_tokens=2)],
    "heads": peft.LoraConfig(r=2, modules_to_save=["lm_head"], **TARGETS),
}


class Stopped(Exception):
    pass


def examples() -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    return [Example(ids, ids) for ids in torch.randint(0, 30, (6, 8), generator=generator)]


def run(config, folder, *, stop_after=STEPS, resume=False, data=None, seed=7):
    torch.manual_seed(seed)
    model = peft.get_peft_model(make("llama"), config)
    torch.manual_seed(seed + 1)

    def stop(record):
        if record.step == stop_after + 1:
            raise Stopped

    records = []
    try:
        records = train(
            ChunkedLoss(model),
            data or examples(),
            lambda trained: torch.optim.AdamW(trained, lr=1e-2),
            CONFIG,
            checkpoints=folder,
            resume=resume,
            on_step=stop,
        )
    except Stopped:
        assert stop_after < STEPS
    losses = [(record.step, record.loss, record.grad_norm) for record in records]
    return losses, {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}, model


@pytest.mark.parametrize("method", METHODS)
def test_resume_from_every_checkpoint(tmp_path, method):
    losses, parameters, model = run(METHODS[method], tmp_path / "whole")
    assert len({loss for _, loss, _ in losses}) == STEPS
    model.save_pretrained(tmp_path / "adapter")
    for stop_after in (1, 3, STEPS):
        folder = tmp_path / str(stop_after)
        run(METHODS[method], folder, stop_after=stop_after)
        again, resumed, continued = run(METHODS[method], folder, resume=True, seed=99 if method != "pissa" else 7)
        assert again == losses
        assert resumed.keys() == parameters.keys()
        for name, parameter in parameters.items():
            assert torch.equal(resumed[name], parameter), name
        continued.save_pretrained(tmp_path / "again")
        for path in (tmp_path / "adapter").rglob("*.safetensors"):
            assert (tmp_path / "again" / path.relative_to(tmp_path / "adapter")).read_bytes() == path.read_bytes()


def test_other_examples_are_refused(tmp_path):
    config = METHODS["lora"]
    run(config, tmp_path, stop_after=2)
    changed = examples()
    changed[4] = Example(changed[4].input_ids, changed[4].labels.flip(0))
    with pytest.raises(ResumeError, match=r"another examples \("):
        run(config, tmp_path, resume=True, data=changed)
    with pytest.raises(ResumeError, match=r"must hold the parameters that are trained"):
        run(METHODS["bitfit"], tmp_path, resume=True)
