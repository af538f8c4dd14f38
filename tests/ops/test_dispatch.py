"""Calls of an op are visible to modes, transforms and subclasses; without these, the cost of a call is bounded."""

from __future__ import annotations

import copy
import gc
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import profile

import qlora_kernels as qk
from qlora_kernels.ops import dispatch_fast_path
from qlora_kernels.ops.registry import unavailable
from tests.support.op_recorder import OpRecorder
from tests.support.problems import gaussian
from tests.support.tolerances import assert_same_function

native = pytest.mark.skipif(unavailable("cpu") is not None, reason="the native CPU backend is not built")
with_and_without_grad = pytest.mark.parametrize("grad", [False, True], ids=["constant", "trained"])


@pytest.fixture
def plain():
    """Return x -> y by linear_nf4."""
    packed, state = qk.quantize_nf4(gaussian(8, 64))
    return lambda x: qk.linear_nf4(x, packed, state)


@pytest.fixture(params=["linear_nf4", "linear_nf4_lora"])
def op_and_call(request, plain):
    """Return an op's name, and x -> y by it."""
    packed, state = qk.quantize_nf4(gaussian(8, 64))
    lora_A, lora_B = gaussian(4, 64), gaussian(8, 4)
    lora = lambda x: qk.linear_nf4_lora(x, packed, state, lora_A, lora_B, scaling=2.0)  # noqa: E731
    return request.param, plain if request.param == "linear_nf4" else lora


class Wrapped(torch.Tensor):
    """A tensor subclass that records the ops it takes part in and computes with the tensor inside."""

    seen: ClassVar[list[str]] = []

    @staticmethod
    def __new__(cls, inner, requires_grad):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=requires_grad)

    def __init__(self, inner, requires_grad):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func.name())
        return func(*[arg.inner if isinstance(arg, Wrapped) else arg for arg in args], **(kwargs or {}))


@with_and_without_grad
def test_dispatch_mode_receives_forward_and_backward(op_and_call, grad):
    op, call = op_and_call
    x = gaussian(3, 64).requires_grad_(grad)
    with OpRecorder() as forward:
        y = call(x)
    assert f"qlora_kernels::{op}" in forward.seen
    if grad:
        with OpRecorder() as backward:
            y.sum().backward()
        of_backward = {"linear_nf4": "linear_nf4_grad_x", "linear_nf4_lora": "linear_nf4_lora_backward"}[op]
        assert f"qlora_kernels::{of_backward}" in backward.seen


@with_and_without_grad
def test_tensor_subclass_receives_call(plain, grad):
    Wrapped.seen.clear()
    y = plain(Wrapped(gaussian(3, 64), grad))
    assert Wrapped.seen == ["qlora_kernels::linear_nf4"]
    assert torch.equal(y.detach(), plain(gaussian(3, 64)))


@with_and_without_grad
def test_fake_tensors_stay_fake(grad):
    packed, state = qk.quantize_nf4(gaussian(8, 64))
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3, 64).requires_grad_(grad)
        y = qk.linear_nf4(x, packed, state)
    assert isinstance(y, FakeTensor)
    assert (y.shape, y.requires_grad) == ((3, 8), grad)


def test_make_fx_traces_op_as_one_node(op_and_call):
    op, call = op_and_call
    graph = make_fx(call)(gaussian(3, 64)).graph
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert [target for target in targets if "getitem" not in target] == [f"qlora_kernels.{op}.default"]


def test_vmap_over_op(plain):
    x = gaussian(3, 64)
    assert_same_function(torch.func.vmap(plain)(x), plain(x), products=1, terms=64)


@with_and_without_grad
def test_lazy_negation_of_x_is_resolved(plain, grad):
    x = gaussian(3, 64)
    assert torch.equal(plain(torch._neg_view(x.clone().requires_grad_(grad))).detach(), plain(-x))


def test_inference_mode_and_no_grad_give_the_same_bits(plain):
    x = gaussian(3, 64)
    with torch.inference_mode():
        inference = plain(x)
    with torch.no_grad():
        assert torch.equal(plain(x.clone().requires_grad_()), inference)
    assert inference.is_inference()


@with_and_without_grad
def test_fast_path_does_not_change_bits(op_and_call, grad, monkeypatch):
    _, call = op_and_call
    x = gaussian(3, 64).requires_grad_(grad)
    y = call(x)
    monkeypatch.setattr(dispatch_fast_path, "PLAIN_KEYSETS", ())
    redispatched, called = call(x), {name for _, name in functions_called(lambda: call(x))}
    assert torch.equal(redispatched, y)
    assert redispatched.requires_grad == grad
    assert "redispatch" in called


@native
@with_and_without_grad
def test_dispatcher_entered_only_for_op_and_kernel(grad):
    """For a matrix no other torch op runs: neither x nor the result is reshaped or copied."""
    layer, x = qk.LinearNF4.from_linear(nn.Linear(64, 8, bias=False)), gaussian(3, 64).requires_grad_(grad)
    with profile() as profiled:
        layer(x)
    entered = [event.name for event in profiled.events() if "::" in event.name]
    assert entered == ["qlora_kernels::linear_nf4", "qlora_kernels_C::cpu_linear_nf4"]


def functions_called(call):
    """Return (file, name) of each Python function that `call` runs."""
    called = []

    def note(frame, event, arg):
        # Comprehensions are functions in some versions of Python and not in others.
        if event == "call" and not frame.f_code.co_name.startswith("<"):
            called.append((frame.f_code.co_filename, frame.f_code.co_name))

    call()  # fills all caches
    before, collects = sys.getprofile(), gc.isenabled()
    gc.disable()  # it would run finalizers of other tests' objects
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
        if collects:
            gc.enable()
    return called


def count_of_ours(called):
    package = str(Path(qk.__file__).parent)
    return sum(file.startswith(package) for file, _ in called)


@native
def test_python_functions_per_call_are_bounded():
    """A function takes about a tenth of a microsecond; on small layers their sum is most of a call's time.

    Before a bound is raised, measure a 64x64 layer at M = 1 before and after (docs/notebook).
    """
    layer, x = qk.LinearNF4.from_linear(nn.Linear(64, 64, bias=False)), gaussian(1, 64)
    config = qk.peft.LoraConfig(r=8, target_modules=["0"])
    adapted = qk.peft.get_peft_model(nn.Sequential(copy.deepcopy(layer)), config).get_submodule("base_model.0")
    with torch.no_grad():
        constant = [functions_called(lambda: layer(x)), functions_called(lambda: adapted(x))]
    x.requires_grad_()
    trained = [functions_called(lambda: layer(x)), functions_called(lambda: adapted(x))]
    for called, bound in zip(constant + trained, (32, 50, 36, 54), strict=True):
        assert count_of_ours(called) <= bound
    assert "redispatch" not in {name for called in constant + trained for _, name in called}
