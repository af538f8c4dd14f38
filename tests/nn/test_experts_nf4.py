"""ExpertsNF4: one expert at a time, fused under F.linear, inside a real mixture-of-experts model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qlora_kernels as qk
from qlora_kernels.nn import experts_nf4
from tests.support.linear_formulas import arithmetic_of, linear, linear_grad_x
from tests.support.problems import gaussian
from tests.support.tolerances import assert_same_function, assert_within, exactly, total


@pytest.mark.parametrize("double_quant", [False, True])
def test_each_expert_is_quantized_by_itself(double_quant):
    w = gaussian(3, 33, 96)
    experts = qk.ExpertsNF4.from_parameter(w, double_quant=double_quant)
    for e in range(3):
        packed, state = qk.quantize_nf4(w[e], double_quant=double_quant)
        assert torch.equal(experts.dequantize(e), qk.dequantize_nf4(packed, state))
    assert torch.equal(experts[torch.tensor([2, 0, 2])], experts.dequantize()[[2, 0, 2]])


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(4, 33, 96), (4, 5, 7), (4, 130, 256)], ids=str)
def test_experts_by_ids_are_decoded_at_once(monkeypatch, shape, double_quant):
    """Fewer ids than experts, more, repeated, negative and in two dimensions; blocks that line up and that do not."""
    experts = qk.ExpertsNF4.from_parameter(gaussian(*shape), double_quant=double_quant)
    expected = experts.dequantize()
    decoded = []
    stock = experts_nf4.dequantize_nf4
    monkeypatch.setattr(experts_nf4, "dequantize_nf4", lambda *args: (decoded.append(1), stock(*args))[1])
    for ids in ([2], [2, 0, 2], [-1, 1], [[0, 3], [3, 1]], [1] * 9, []):
        ids = torch.tensor(ids, dtype=torch.int64)
        decoded.clear()
        assert torch.equal(experts[ids], expected[ids])
        if shape[1] * shape[2] % 64 == 0:
            assert len(decoded) == min(1, ids.numel())


def test_linear_runs_fused_and_differentiates():
    experts = qk.ExpertsNF4.from_parameter(gaussian(3, 33, 96))
    x = gaussian(5, 96).requires_grad_()
    y = F.linear(x, experts[torch.tensor(1)])
    assert y.grad_fn is not None
    assert y.grad_fn.name() == "LinearNF4FunctionBackward"
    y.sum().backward()
    w = experts.dequantize(1)
    arithmetic = arithmetic_of("reference", torch.float32)
    assert_within(y, linear(x, w, None, arithmetic), "y")
    assert_within(x.grad, linear_grad_x(torch.ones(5, 33), w, arithmetic), "grad_x")
    assert_within(torch.sum(experts[1]), total(exactly(w.reshape(-1, 1)))[0], "sum")


def test_constants_stay_fp32_and_state_round_trips():
    experts = qk.ExpertsNF4.from_parameter(gaussian(2, 32, 64)).to(torch.bfloat16)
    assert experts.absmax_offset.dtype == torch.float32
    other = qk.ExpertsNF4.from_parameter(torch.zeros(2, 32, 64))
    other.load_state_dict(experts.state_dict(), strict=True)
    assert torch.equal(other.dequantize(dtype=torch.float32), experts.dequantize(dtype=torch.float32))


def test_inside_mixtral():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config).eval()
    dense = copy.deepcopy(model)
    assert any("replace_experts" in reason for reason in qk.replace_linear(copy.deepcopy(model)).skipped.values())
    report = qk.replace_experts(model)
    assert len(report.replaced) == 4
    with torch.no_grad():
        for name, experts in model.named_modules():
            if isinstance(experts, qk.ExpertsNF4):
                dense.get_parameter(name).copy_(experts.dequantize())
    ids = torch.randint(64, (2, 9))
    assert_same_function(model(ids).logits, dense(ids).logits)
    model(ids, labels=ids).loss.backward()


def test_refuses_bad_arguments():
    with pytest.raises(ValueError, match=r"ExpertsNF4: weight must have shape \[E >= 1, N, K\], got \(3, 4\)"):
        qk.ExpertsNF4.from_parameter(torch.zeros(3, 4))
    with pytest.raises(IndexError, match=r"ExpertsNF4: expert must lie in \[0, 2\), got 2"):
        qk.ExpertsNF4.from_parameter(torch.zeros(2, 4, 64))[2]
    with pytest.raises(ValueError, match=r"replace_experts: model must contain \[experts, out, in\] parameters"):
        qk.replace_experts(nn.Linear(4, 4))
