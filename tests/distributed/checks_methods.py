"""Every PEFT method under FSDP2, over NF4 where possible: gradients and files equal those of one process."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qlora_kernels import PagedAdamW
from qlora_kernels.distributed import shard_blocks
from qlora_kernels.peft import LoraConfig, get_peft_model
from qlora_kernels.training import ChunkedLoss, Example, Interrupted, TrainConfig, Workers, train
from tests.distributed.models import WIDTH, Net, assert_same, batch, gradients, loss_of, shard, trained
from tests.distributed.processes import Group
from tests.peft.cases import CASES
from tests.peft.cases import build as build_case
from tests.peft.models import batch as tokens
from tests.peft.models import logits, randomize
from tests.support.tolerances import assert_same_gradients

ROUNDED = {"adalora": 1e-4} | dict.fromkeys(("p_tuning", "p_tuning_lstm", "prefix_tuning", "mam", "unipelt"), 1e-5)
"""Methods with computed values in their files: importances from gradients, and the output of an encoder."""


def _build(case: str):
    model = build_case(case, "llama", nf4=CASES[case].quantized)
    randomize(model)
    return model.train()


def _check(case: str, group: Group) -> None:
    whole, model = _build(case), _build(case)
    shard_blocks(model, "cpu")
    inputs = tokens("llama", rows=4)
    logits(whole, inputs).square().mean().backward()
    part = {key: value.chunk(group.world)[group.rank] for key, value in inputs.items()}
    logits(model, part).square().mean().backward()
    expected = {n: p.grad for n, p in whole.named_parameters() if p.requires_grad}
    found = gradients(model)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    assert_same_gradients(found, expected)
    for m in (whole, model):
        m.step(0)
    model.save_pretrained(group.folder / f"{case} sharded")
    whole.save_pretrained(group.folder / f"{case} whole {group.rank}")
    files = [group.folder / f"{case} {name}" for name in ("sharded", f"whole {group.rank}")]
    names = [sorted(str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()) for f in files]
    assert names[0] == names[1], names
    for name in names[0]:
        if name.endswith(".safetensors"):
            assert_same(load_file(files[0] / name), load_file(files[1] / name), ROUNDED.get(case, 0.0))


class Experts(nn.Module):
    """A stack of expert weights that LoRA adapts by target_parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, WIDTH, WIDTH) / WIDTH**0.5)


def target_parameters(group: Group) -> None:
    """LoRA of a stack of experts in NF4, and of a dense parameter."""
    import qlora_kernels as qk

    def build():
        torch.manual_seed(0)
        model = Net(mixture=True)
        qk.replace_linear(model, skip=("head", "router"))
        qk.replace_experts(model)
        config = LoraConfig(r=3, target_modules=["up"], target_parameters=["experts.weight", "head.weight"])
        model = get_peft_model(model, config)
        randomize(model)
        return model

    reference, model = build(), shard(build())
    loss_of(reference, batch()).backward()
    loss_of(model, batch().chunk(group.world)[group.rank]).backward()
    assert any("experts" in name for name in trained(model)), list(trained(model))
    assert_same(gradients(model), gradients(reference))


def resumed_training(group: Group) -> None:
    """A sharded run that is stopped continues, sharded or in one process, as if it had not been stopped."""
    examples = [Example(ids, ids) for ids in tokens("llama", rows=6)["input_ids"]]
    config = TrainConfig(steps=4, batch_size=3, lr=1e-2, max_grad_norm=0.5)

    def losses(case, workers, folder, **options):
        model = _build(case)
        if workers.world > 1:
            shard_blocks(model, "cpu")
        make = partial(PagedAdamW if case == "vera" else torch.optim.AdamW, lr=1e-2)
        records = train(ChunkedLoss(model), examples, make, config, checkpoints=folder, workers=workers, **options)
        return [record.loss for record in records]

    for case in ("adalora", "prefix_tuning", "p_tuning_lstm", "vera"):
        both, folder = Workers.current(), group.folder / f"run of {case}"
        expected = losses(case, both, None)
        with pytest.raises(Interrupted, match="after step 1 of 4"):
            losses(case, both, folder, interrupted=lambda: True)
        assert losses(case, both, folder, resume=True) == expected
        if group.rank == 0:
            alone = losses(case, Workers(), folder, resume=True)
            rel = 1e-3 if case == "adalora" else 1e-4  # roundings decide which of AdaLoRA's triplets are kept
            assert alone == pytest.approx(expected, rel=rel), case
        both.wait()


def _checks():
    def of(case):
        return lambda group: _check(case, group)

    return {case: of(case) for case in CASES if "llama" in CASES[case].kinds}


CHECKS = {**_checks(), "target_parameters": target_parameters, "resumed_training": resumed_training}
