"""LinearNF4.weight is computed on each access: code may read it as a tensor, and writing to it raises."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlora_kernels as qk
from tests.support.tolerances import assert_same_function


@pytest.fixture
def layer():
    return qk.LinearNF4.from_linear(nn.Linear(64, 32))


def add_to_data(layer):
    layer.weight.data += 1


WRITES = {
    "iadd_data": add_to_data,
    "set_data": lambda layer: setattr(layer.weight, "data", torch.zeros(32, 64)),
    "div_": lambda layer: layer.weight.div_(2),
    "setitem": lambda layer: layer.weight.__setitem__(0, 1.0),
    "copy_": lambda layer: layer.weight.copy_(torch.zeros(32, 64)),
    "init": lambda layer: nn.init.zeros_(layer.weight),
    "init by keyword": lambda layer: nn.init.normal_(layer.weight),
    "split": lambda layer: layer.weight.split(16)[1].zero_(),
    "unbind": lambda layer: layer.weight.unbind()[0].zero_(),
    "op": lambda layer: torch.ops.aten.mul_.Tensor(layer.weight, torch.tensor(2.0)),
    "view": lambda layer: layer.weight.T.mul_(2),
    "detached row": lambda layer: layer.weight.detach()[0].zero_(),
    "out": lambda layer: torch.add(layer.weight, 1, out=layer.weight),
    "foreach": lambda layer: torch._foreach_mul_([layer.weight], 2),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writing_raises(layer, write):
    with torch.no_grad(), pytest.raises(RuntimeError, match="weight of a LinearNF4 must not be written to"):
        write(layer)


def test_reading_gives_ordinary_tensors(layer):
    weight, plain = layer.weight, layer.dequantize()
    assert (weight.dtype, weight.device, tuple(weight.shape)) == (plain.dtype, plain.device, (32, 64))
    assert torch.equal(weight, plain)
    for made in (weight * 2, weight.clone(), weight.to(torch.bfloat16), copy.deepcopy(weight), weight @ weight.T):
        assert type(made) is Tensor
    assert type(pickle.loads(pickle.dumps(weight))) is Tensor
    assert not weight.numpy().flags.writeable
    x = torch.randn(2, 64, requires_grad=True)
    F.linear(x, weight).sum().backward()
    assert_same_function(x.grad, plain.sum(0).expand(2, -1), products=1)
    weight.clone().mul_(2)


def test_merge_of_plain_hugging_face_peft_raises(layer, monkeypatch):
    """PEFT's layer class without integrations.peft.register()."""
    peft = pytest.importorskip("peft")
    monkeypatch.setitem(peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING, peft.PeftType.LORA, peft.LoraModel)
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    config._register_custom_module({qk.LinearNF4: peft.tuners.lora.Linear})
    model = peft.get_peft_model(nn.Sequential(layer), config)
    for safe in (False, True):
        with pytest.raises(RuntimeError, match="must not be written to"):
            model.merge_and_unload(safe_merge=safe)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cast_changes_weight_dtype(layer, dtype):
    """The dtype changes although the constants stay fp32 and the packed bytes do not change."""
    experts = qk.ExpertsNF4.from_parameter(torch.randn(2, 32, 64))
    packed = layer.packed.clone()
    nn.ModuleList([layer, experts]).to(dtype)
    assert layer.weight.dtype == layer.weight_dtype == experts.dtype == dtype
    assert torch.equal(layer.packed, packed)
    again = qk.LinearNF4(64, 32)
    again.load_state_dict(layer.state_dict())
    assert again.weight_dtype == dtype
    assert layer.double().weight_dtype == dtype  # float64 is not a dtype of weights


def test_an_expert_is_read_only_too():
    experts = qk.ExpertsNF4.from_parameter(torch.randn(2, 32, 64))
    with pytest.raises(RuntimeError, match="must not be written to"):
        nn.init.normal_(experts[1])
    assert type(torch.mul(experts[1], 2)) is Tensor


def test_parameter_made_from_weight_is_writable(layer):
    dense = nn.Linear(64, 32, bias=False)
    dense.weight = nn.Parameter(layer.weight)
    twin = copy.deepcopy(dense)
    for module in (dense, twin):
        assert isinstance(module.weight, nn.Parameter)
        module(torch.ones(1, 64)).sum().backward()
        torch.optim.SGD(module.parameters(), lr=1.0).step()
        assert torch.equal(module.weight, layer.dequantize() - 1)  # all gradients are 1
