"""LinearNF4 as a drop-in for nn.Linear: values, gradients, dtypes, state dicts, compile and export."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import qlora_kernels as qk
from qlora_kernels.format import bnb_layout
from tests.support.linear_formulas import arithmetic_of, linear, linear_grad_x
from tests.support.problems import gaussian
from tests.support.tolerances import assert_same_function, assert_within


def dense(N=33, K=96, bias=True, dtype=torch.float32, seed=0):
    linear = nn.Linear(K, N, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(gaussian(N, K, seed=seed) / K**0.5)
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equals_a_dense_layer_of_the_dequantized_weight(dtype):
    """With K=96, N=33 and blocks of 64, blocks straddle rows and N is odd."""
    linear_layer = dense(dtype=dtype)
    layer = qk.LinearNF4.from_linear(linear_layer)
    x = gaussian(7, 96, dtype=dtype).requires_grad_()
    grad_y = gaussian(7, 33, dtype=dtype, seed=1)
    y = layer(x)
    y.backward(grad_y)
    w, arithmetic = layer.dequantize(dtype), arithmetic_of("reference", dtype)
    assert_within(y, linear(x, w, linear_layer.bias, arithmetic), "y")
    assert_within(x.grad, linear_grad_x(grad_y, w, arithmetic), "grad_x")


def test_eval_then_train_keeps_gradients():
    layer = qk.LinearNF4.from_linear(dense())
    fresh = copy.deepcopy(layer)
    with torch.no_grad():
        layer.eval()(gaussian(4, 96))
    grads = []
    for module in (layer.train(), fresh.train()):
        x = gaussian(4, 96).requires_grad_()
        module(x).square().sum().backward()
        grads.append((x.grad, module.bias.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


def test_weight_bytes_never_change():
    layer = qk.LinearNF4.from_linear(dense(dtype=torch.bfloat16))
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with torch.no_grad():
        layer.eval()(gaussian(4, 96, dtype=torch.bfloat16))
        layer.train()(gaussian(4, 96))
    layer.eval()
    after = layer.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("double_quant", [False, True])
def test_strict_state_dict_round_trip(double_quant):
    layer = qk.LinearNF4.from_linear(dense(), blocksize=128, double_quant=double_quant)
    other = qk.LinearNF4(96, 33, double_quant=not double_quant)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer), strict=True)
    x = gaussian(3, 96)
    assert torch.equal(layer(x), other(x))
    assert other.blocksize == 128
    assert (other.absmax_q is not None) == double_quant
    expected = {"weight", "bias", "weight.absmax", "weight.quant_map", f"weight.{bnb_layout.META_KEY}"}
    expected |= {"weight.nested_absmax", "weight.nested_quant_map"} if double_quant else set()
    assert set(layer.state_dict()) == expected


def test_loads_a_dense_checkpoint_by_quantizing():
    linear = dense()
    layer = qk.LinearNF4(96, 33)
    layer.load_state_dict(linear.state_dict(), strict=True)
    assert torch.equal(layer.packed, qk.LinearNF4.from_linear(linear).packed)


def test_refuses_bad_checkpoints():
    layer = qk.LinearNF4.from_linear(dense())
    state = layer.state_dict()
    without = {k: v for k, v in state.items() if k != "weight.nested_absmax"}
    with pytest.raises(RuntimeError, match=r"weight: checkpoint must hold weight.nested_absmax"):
        qk.LinearNF4(96, 33).load_state_dict(without)
    with pytest.raises(RuntimeError, match=r"quantized weight must have shape \(32, 96\), got \(33, 96\)"):
        qk.LinearNF4(96, 32, bias=False).load_state_dict({k: v for k, v in state.items() if k != "bias"})
    with pytest.raises(RuntimeError, match=r"quant_map of the checkpoint must be this format's table"):
        qk.LinearNF4(96, 33).load_state_dict(state | {"weight.quant_map": torch.zeros(16)})
    with pytest.raises(RuntimeError, match=r"Missing key"):
        qk.LinearNF4(96, 33).load_state_dict({"bias": torch.zeros(33)})
    with pytest.raises(RuntimeError, match=r"Unexpected key"):
        qk.LinearNF4(96, 33).load_state_dict(state | {"weight.other": torch.zeros(1)})


def test_casts_move_activations_not_constants():
    layer = qk.LinearNF4.from_linear(dense())
    absmax = layer.quant_state.absmax
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert layer.absmax_scale.dtype == torch.float32
    assert torch.equal(layer.quant_state.absmax, absmax)
    assert layer(gaussian(2, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_forward_uses_replaced_buffer():
    layer, other, x = qk.LinearNF4.from_linear(dense()), qk.LinearNF4.from_linear(dense(seed=1)), gaussian(2, 96)
    other.bias = layer.bias
    before, expected = layer(x), other(x)
    names = ("packed", "absmax_q", "absmax_scale", "absmax_offset")
    swapped = torch.func.functional_call(layer, {name: getattr(other, name) for name in names}, (x,))
    assert torch.equal(swapped, expected)
    assert torch.equal(layer(x), before)
    for replace in (
        lambda layer, name, tensor: setattr(layer, name, tensor),
        lambda layer, name, tensor: layer.register_buffer(name, tensor, persistent=False),
        lambda layer, name, tensor: layer._buffers.update({name: tensor}),
        lambda layer, name, tensor: setattr(getattr(layer, name), "data", tensor),
        lambda layer, name, tensor: (delattr(layer, name), setattr(layer, name, tensor)),
    ):
        changed = pickle.loads(pickle.dumps(layer))
        assert torch.equal(changed(x), before)
        for name in names:
            replace(changed, name, getattr(other, name).clone())
        assert torch.equal(changed(x), expected)
        assert torch.equal(copy.deepcopy(changed)(x), expected)


def test_output_dtype_follows_x_compute_dtype_and_autocast():
    layer = qk.LinearNF4.from_linear(dense(), compute_dtype=torch.bfloat16)
    x = gaussian(2, 96)
    assert layer(x).dtype == torch.float32
    assert torch.equal(layer(x), layer(x.bfloat16()).float())
    plain = qk.LinearNF4.from_linear(dense())
    with torch.autocast("cpu", torch.bfloat16):
        y = plain(x)
        assert y.dtype == nn.functional.linear(x, plain.weight).dtype == torch.bfloat16


def test_compiles_and_exports():
    layer = qk.LinearNF4.from_linear(dense())
    x = gaussian(5, 96)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(torch.relu(x))

    net = Net()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    ya, yb = compiled(a), net(b)
    ya.sum().backward()
    yb.sum().backward()
    assert torch.equal(ya, yb)
    assert torch.equal(a.grad, b.grad)
    exported = torch.export.export(net, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=2)}})
    assert torch.equal(exported.module()(gaussian(9, 96)), net(gaussian(9, 96)))


def test_forward_lora_compiles():
    layer = qk.LinearNF4.from_linear(dense())
    lora_A, lora_B = gaussian(4, 96).requires_grad_(), gaussian(33, 4).requires_grad_()

    def run(x, lora_A, lora_B):
        return layer.forward_lora(x, lora_A, lora_B, 0.5, dropout_p=0.1)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    y = compiled(gaussian(5, 96), lora_A, lora_B)
    y.sum().backward()
    assert y.shape == (5, 33)
    assert lora_A.grad is not None


def test_under_gradient_checkpointing_dropout_repeats():
    layer = qk.LinearNF4.from_linear(dense())
    lora_A, lora_B = gaussian(4, 96).requires_grad_(), gaussian(33, 4).requires_grad_()

    def run(x):
        return layer.forward_lora(x, lora_A, lora_B, 1.0, dropout_p=0.5)

    grads = []
    for checkpointed in (False, True):
        torch.manual_seed(3)
        x = gaussian(6, 96).requires_grad_()
        y = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
        y.square().sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_from_linear_accepts_conv1d():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(33, 96)
    layer = qk.LinearNF4.from_linear(conv1d)
    assert (layer.in_features, layer.out_features) == (96, 33)
    w = layer.dequantize()
    assert (w - conv1d.weight.T).abs().max() < 0.2 * conv1d.weight.abs().max()
    x = gaussian(2, 96)
    assert_within(layer(x), linear(x, w, conv1d.bias, arithmetic_of("reference", torch.float32)), "y")


def test_shapes_on_the_meta_device():
    layer = qk.LinearNF4(8, 4).to("meta")
    assert layer(torch.randn(2, 8, device="meta")).shape == (2, 4)


def test_module_type_keeps_packed_bytes():
    layer = qk.LinearNF4.from_linear(dense())
    packed, x, w = layer.packed.clone(), gaussian(2, 96), layer.dequantize()
    layer.type(torch.bfloat16)
    assert torch.equal(layer.packed, packed)
    assert layer.absmax_q.dtype == torch.uint8
    assert layer.weight_dtype == layer.bias.dtype == torch.bfloat16
    layer.float()
    assert layer.weight_dtype == torch.float32
    assert torch.equal(layer.dequantize(), w)
    assert_within(layer(x), linear(x, w, layer.bias, arithmetic_of("reference", torch.float32)), "y")


def test_inside_multihead_attention():
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    reference = copy.deepcopy(attention)
    qk.replace_linear(attention)
    with torch.no_grad():
        reference.out_proj.weight.copy_(attention.out_proj.weight)
    x = gaussian(2, 5, 64)
    assert_same_function(attention(x, x, x)[0], reference(x, x, x)[0])


def test_refuses_bad_arguments():
    with pytest.raises(ValueError, match=r"LinearNF4: blocksize must be one of"):
        qk.LinearNF4(64, 8, blocksize=100)
    with pytest.raises(TypeError, match=r"LinearNF4: compute_dtype must be one of"):
        qk.LinearNF4(64, 8, compute_dtype=torch.float64)
    with pytest.raises(ValueError, match=r"LinearNF4: x.shape\[-1\] must equal in_features=64, got shape \(2, 65\)"):
        qk.LinearNF4(64, 8)(torch.zeros(2, 65))
    with pytest.raises(TypeError, match=r"from_linear: linear must be an nn.Linear or a transformers Conv1D, got ReLU"):
        qk.LinearNF4.from_linear(nn.ReLU())


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_to_linear_is_the_reverse_of_from_linear(kind):
    """The dense layer has the same class, the dequantized values, and the layer's own bias."""
    source = nn.Linear(96, 33)
    if kind == "conv1d":
        source = pytest.importorskip("transformers.pytorch_utils").Conv1D(33, 96)
    layer = qk.LinearNF4.from_linear(source).eval()
    dense = layer.to_linear()
    assert type(dense) is type(source)
    assert dense.weight.shape == source.weight.shape
    assert torch.equal(dense.weight if kind == "linear" else dense.weight.T, layer.dequantize())
    assert dense.bias is layer.bias
    assert not dense.weight.requires_grad
    assert not dense.training
    assert layer.to_linear(torch.bfloat16).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("x", [torch.ones(2, 96, dtype=torch.int64), torch.ones(2, 96, dtype=torch.complex64), [1.0]])
def test_refuses_inputs_that_are_no_floats(compute_dtype, x):
    """With a compute_dtype or under autocast, a cast would round y to integers or drop its imaginary part."""
    layer = qk.LinearNF4.from_linear(dense(), compute_dtype=compute_dtype)
    with pytest.raises(TypeError, match="x must be"):
        layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(TypeError, match="x must be"):
        layer(x)


def test_sizes_of_a_new_layer_are_checked():
    with pytest.raises(TypeError, match=r"LinearNF4: in_features must be an int, got '64'"):
        qk.LinearNF4("64", 32)
    with pytest.raises(TypeError, match=r"LinearNF4: out_features must be an int, got 32.0"):
        qk.LinearNF4(64, 32.0)
    with pytest.raises(ValueError, match=r"LinearNF4: out_features must be at least 0, got -1"):
        qk.LinearNF4(64, -1)
    with pytest.raises(TypeError, match=r"LinearNF4: blocksize must be an int, got 64.0"):
        qk.LinearNF4(64, 32, blocksize=64.0)
