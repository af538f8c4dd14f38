"""NF4 weights in frozen integer parameters compared with the same weights in buffers, in one process."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qlora_kernels as qk

FLAT = {"packed_flat", "absmax_q_flat", "absmax_scale_flat", "absmax_offset_flat"}


def linear(double_quant=True, seed=0):
    torch.manual_seed(seed)
    return qk.LinearNF4.from_linear(nn.Linear(80, 203), double_quant=double_quant)


def experts(double_quant=True, seed=0):
    torch.manual_seed(seed)
    return qk.ExpertsNF4.from_parameter(torch.randn(3, 33, 80), double_quant=double_quant)


def shardable(module):
    return qk.make_shardable(nn.Sequential(module))[0]


MAKERS = [linear, experts]


def output(module):
    x = torch.randn(5, 80, generator=torch.Generator().manual_seed(1))
    return module(x) if isinstance(module, qk.LinearNF4) else F.linear(x, module[1])


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("make", MAKERS)
def test_same_values_and_memory(make, double_quant):
    buffers, layer = make(double_quant), make(double_quant)
    address = layer.packed.data_ptr()
    layer = shardable(layer)
    assert layer.packed.data_ptr() == address
    assert not list(layer.buffers())
    flat = layer.flat_parameters()
    assert set(flat) == (FLAT if double_quant else {"packed_flat", "absmax_flat"})
    assert all(not p.requires_grad and not p.is_floating_point() and p.dim() for p in flat.values())
    for name in ("packed", "absmax", "absmax_q", "absmax_scale", "absmax_offset"):
        wanted, got = getattr(buffers, name), getattr(layer, name)
        assert (wanted is None) == (got is None)
        if wanted is not None:
            assert wanted.shape == got.shape
            assert torch.equal(wanted, got)
    assert torch.equal(output(layer), output(buffers))
    assert layer.double_quant == double_quant


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("make", MAKERS)
def test_state_dicts_load_in_both_forms(make, double_quant):
    source = make(double_quant, seed=1)
    named = {"format": source.state_dict(), "flat": shardable(make(double_quant, seed=1)).state_dict()}
    assert set(named["flat"]) - {"bias"} == (FLAT if double_quant else {"packed_flat", "absmax_flat"})
    for state in named.values():
        for target in (make(double_quant), shardable(make(double_quant))):
            assert not torch.equal(output(target), output(source))
            target.load_state_dict(state)
            assert torch.equal(output(target), output(source))
            broken = {name: tensor for name, tensor in state.items() if "packed" not in name and name != "weight"}
            with pytest.raises(RuntimeError):
                target.load_state_dict(broken)


@pytest.mark.parametrize("make", MAKERS)
def test_casts_keep_the_bits(make):
    wanted, layer = make().state_dict(), shardable(make())
    for cast in (nn.Module.half, nn.Module.double, lambda m: m.to(torch.bfloat16), lambda m: m.type(torch.float32)):
        cast(layer)
        for name in ("packed", "absmax_q", "absmax_scale", "absmax_offset"):
            assert torch.equal(getattr(layer, name), getattr(make(), name))
    assert layer.weight_dtype == torch.float32
    assert wanted


@pytest.mark.parametrize("make", MAKERS)
def test_copies_and_pickles_keep_parameters_and_output(make):
    layer = shardable(make())
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(saved, weights_only=False),
    ):
        assert other.in_parameters
        assert torch.equal(output(other), output(layer))


def test_layers_of_one_weight_share_one_parameter():
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model[1].weight = model[0].weight
    qk.replace_linear(model)
    qk.make_shardable(model)
    assert model[0].packed_flat is model[1].packed_flat
    assert len(list(model.parameters())) == 4


@pytest.mark.parametrize("version", ["2.10.0", "2.12.1+cpu"])
def test_older_torch_is_refused(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    layer = linear()
    with pytest.raises(NotImplementedError, match=r"make_shardable: torch must be 2\.13 or newer, whose fully_shard"):
        qk.make_shardable(layer)
    assert not layer.in_parameters
