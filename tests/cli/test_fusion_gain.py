"""The comparison of a step with and without fuse_model, which the demo prints: what it leaves behind, and its line."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.cli.finetune_report import FinetuneReport
from qlora_kernels.cli.fusion_gain import ROUNDS, step_seconds
from qlora_kernels.training import Example, StepRecord
from tests.support.decoder_families import tiny_decoder, tokens


def examples():
    return [Example(ids, ids.clone()) for ids in tokens(rows=2)]


@pytest.mark.parametrize("fused", [False, True])
def test_model_is_unchanged(fused, monkeypatch):
    model = qk.peft.get_peft_model(tiny_decoder("Llama"), qk.peft.LoraConfig(r=2, lora_dropout=0.5)).eval()
    if fused:
        qk.fuse_model(model)
    kinds = [type(module) for module in model.modules()]
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.grad = torch.ones_like(parameter)
    seen = []
    forward = qk.nn.fused_mlp.FusedMLP.forward
    monkeypatch.setattr(
        qk.nn.fused_mlp.FusedMLP, "forward", lambda self, x: (seen.append(x.shape), forward(self, x))[1]
    )
    state = torch.get_rng_state()
    seconds = step_seconds(model, examples(), 0)
    assert sorted(seconds) == ["fused", "plain"]
    assert min(seconds.values()) > 0
    # Two layers; only the fused turns run the fused forward.
    assert sum(shape[0] == 2 for shape in seen) == 2 * ROUNDS
    assert [type(module) for module in model.modules()] == kinds
    assert not model.training
    assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_is_compared_where_nothing_is_fused():
    assert step_seconds(_NoParts(), examples(), 0) == {}


class _NoParts(torch.nn.Module):
    """A language model of which fuse_model knows no part."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(48, 48)

    def get_output_embeddings(self):
        return None

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        return type("Output", (), {"logits": self.embedding(input_ids)})


def test_the_line_of_the_report():
    report = FinetuneReport("builtin", "builtin", "out")
    report.steps = [StepRecord(1, 1.0, 1.0, 1e-3, 8, 1.0)]
    assert "--fuse" not in report.table()
    report.step_seconds = {"plain": 3.0, "fused": 2.0}
    assert "step with --fuse" in report.table()
    assert "2.00 s, without it 3.00 s (1.50x)" in report.table()
