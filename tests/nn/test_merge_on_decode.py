"""set_merge_on_decode: the same function of the model within one rounding of the weight, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qlora_kernels as qk
from qlora_kernels.ops.operands import LoRA
from tests.support.decoder_families import tiny_decoder, tokens
from tests.support.linear_formulas import Arithmetic, assert_lora_merged
from tests.support.problems import gaussian


class Block(nn.Module):
    """Two linears on one x, added."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(64, 32), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) + self.k_proj(x)


def adapted(dropout: float = 0.0) -> qk.peft.PeftModel:
    torch.manual_seed(0)
    model = Block()
    qk.replace_linear(model, skip=())
    config = qk.peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=dropout)
    model = qk.peft.get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def test_layer_within_its_bound() -> None:
    layer = qk.LinearNF4.from_linear(nn.Linear(64, 32))
    x = gaussian(9, 64, dtype=torch.bfloat16).requires_grad_()
    A, B = ((gaussian(*size, seed=3) * 0.2).bfloat16().float().requires_grad_() for size in ((4, 64), (32, 4)))
    grad_y = gaussian(9, 32, seed=4, dtype=torch.bfloat16)
    layer.merge_on_decode = True
    y = layer.forward_lora(x, A, B, 2.0)
    gradients = torch.autograd.grad(y, (x, A, B), grad_y)
    inputs = (x, layer.dequantize(torch.float32), layer.bias, A, B, grad_y)
    assert_lora_merged((y, *gradients), inputs, 2.0, Arithmetic(torch.bfloat16))


@pytest.mark.parametrize("fused", [False, True], ids=["", "shared input"])
def test_model_computes_the_same_function_and_back(fused: bool) -> None:
    model, x = adapted(), gaussian(5, 64)
    if fused:
        qk.fuse_shared_input(model)
    apart = model(x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert qk.set_merge_on_decode(model) == 2
    calls = []
    op = torch.ops.qlora_kernels.linear_nf4_lora_merged
    with torch.profiler.profile() as profile:
        merged = model(x)
    calls = [event for event in profile.events() if event.name == op.default._schema.name]
    assert len(calls) == 2
    torch.testing.assert_close(merged, apart, rtol=1e-4, atol=1e-5)
    merged.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora" in n)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()), "no byte of the weight changes"
    assert qk.set_merge_on_decode(model, False) == 2
    assert torch.equal(model(x), apart)


def test_fused_modules_call_the_layers() -> None:
    """A node that computes attention or an MLP by the ops with the update apart is not used."""
    model = tiny_decoder("Llama", use_cache=False)
    qk.replace_linear(model)
    config = qk.peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = qk.peft.get_peft_model(model, config)
    qk.fuse_model(model)
    layers = qk.set_merge_on_decode(model)
    ids = tokens()
    with torch.profiler.profile() as profile:
        model(input_ids=ids, labels=ids).loss.backward()
    names = [event.name for event in profile.events()]
    assert names.count("qlora_kernels::linear_nf4_lora_merged") == layers
    assert names.count("qlora_kernels::linear_nf4_lora_merged_backward") == layers


def test_dropout_is_refused_in_training_alone() -> None:
    model, x = adapted(dropout=0.1), gaussian(5, 64)
    qk.set_merge_on_decode(model)
    model.eval()
    assert model(x).isfinite().all()
    model.train()
    with pytest.raises(
        ValueError, match=r"LinearNF4: dropout_p must be 0 with merge_on_decode, got 0\.1.*lora_dropout=0"
    ):
        model(x)


def test_an_adapter_for_each_row_is_refused() -> None:
    model, x = adapted(), gaussian(2, 3, 64)
    qk.set_merge_on_decode(model)
    model.eval()
    with pytest.raises(NotImplementedError, match=r"merge_on_decode must be off .*adapter_names"):
        model(x, adapter_names=["default", "__base__"])


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="must have at least one LinearNF4, got none"):
        qk.set_merge_on_decode(nn.Linear(4, 4))


def test_the_op_takes_no_dropout() -> None:
    layer, x = qk.LinearNF4.from_linear(nn.Linear(64, 32)), gaussian(3, 64)
    lora = LoRA(gaussian(4, 64), gaussian(32, 4), torch.tensor([1]), 1.0, 0.1)
    with pytest.raises(ValueError, match=r"linear_nf4_lora_merged: dropout_p must be 0, got 0\.1"):
        torch.ops.qlora_kernels.linear_nf4_lora_merged(x, *layer._operand, layer.bias, *lora)
