"""Every GPU backend compared with the reference on the CPU: the codec bit for bit, the linears within the bounds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.backends.triton.planner import Plan, use_plan
from qlora_kernels.format import double_quant, reference
from qlora_kernels.ops.operands import LoRA, MultiLoRA, weight_of
from qlora_kernels.ops.philox import dropout_keep, keep_scale
from qlora_kernels.ops.registry import Problem, kernels_of, unavailable
from tests.support.linear_formulas import Dropout, arithmetic_of, assert_lora, assert_multi_lora
from tests.support.problems import DTYPES, SHAPES, Shape, dtype_name, gaussian
from tests.support.tolerances import assert_within, exactly, total

GPU_BACKENDS = ("triton", "cuda")
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
LARGE = (Shape(16, 4096, 4096, r=16), Shape(300, 1024, 4096, r=64), Shape(2048, 4096, 1024, r=8))


@pytest.fixture(autouse=True)
def _fp32_sums():
    """Make torch's matmul sum in fp32, without TF32 and 16-bit sums, as python/numerics/tolerances.py assumes."""
    settings = torch.backends.cuda.matmul  # computes its attributes, so monkeypatch would try to delete them
    names = [
        f"allow_{name}" for name in ("tf32", "bf16_reduced_precision_reduction", "fp16_reduced_precision_reduction")
    ]
    before = {name: getattr(settings, name) for name in names}
    for name in names:
        setattr(settings, name, False)
    yield
    for name, value in before.items():
        setattr(settings, name, value)


@pytest.fixture(params=GPU_BACKENDS)
def backend(request):
    name = request.param
    if unavailable(name) is not None:
        pytest.skip(f"{name}: {unavailable(name)}")
    with qk.use_backend(name):
        yield name


def needs(backend, op, **of_problem):
    """Skip if the backend has no kernel for op or does not support the Problem."""
    spec = kernels_of(backend).get(op)
    if spec is None:
        pytest.skip(f"{backend} has no kernel for {op}")
    if reasons := spec.unsupported(Problem(op, "cuda", of_problem.pop("dtype", torch.bfloat16), **of_problem)):
        pytest.skip(f"{backend}: {'; '.join(reasons)}")


@dtypes
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("numel", "blocksize"), [(1, 64), (9001, 64), (2**22, 64), (2**20 + 7, 128), (40000, 4096)])
def test_codec(backend, dtype, double, numel, blocksize):
    needs(backend, "quantize_nf4")
    w = gaussian(numel, dtype=dtype)
    packed, absmax = reference.quantize_nf4(w, blocksize)
    actual, state = qk.quantize_nf4(w.cuda(), blocksize, double)
    assert torch.equal(actual.cpu().reshape(-1), packed)
    if double:
        expected = double_quant.quantize_absmax(absmax, state.absmax_offset.cpu())
        assert abs(expected[2].double() - absmax.double().mean()) <= torch.finfo(torch.float32).eps * absmax.mean()
        assert torch.equal(state.absmax_q.cpu(), expected[0])
        assert torch.equal(state.absmax_scale.cpu(), expected[1])
        absmax = double_quant.dequantize_absmax(*expected)
    expected_w = reference.dequantize_nf4(packed, absmax, blocksize, w.shape, dtype)
    assert torch.equal(qk.dequantize_nf4(actual, state, dtype).cpu(), expected_w)


@dtypes
@pytest.mark.parametrize("shape", [s for s in SHAPES if s.M] + list(LARGE), ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_linear_lora(backend, dtype, shape, p):
    needs(backend, "linear_nf4_lora", dtype=dtype, dropout=p > 0)
    check_linear_lora(backend, dtype, shape, p)


PLANS = (
    Plan("decode"),
    Plan("fused", 16, 64, 64, split_k=4),
    Plan("fused", 64, 128, 64),
    Plan("fused", 128, 128, 64, num_warps=8),
)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_path(backend, plan):
    if backend != "triton":
        pytest.skip("plans are Triton's")
    with use_plan("linear_nf4", plan), use_plan("linear_nf4_grad_x", plan):
        check_linear_lora(backend, torch.bfloat16, Shape(100, 520, 1024, r=16), 0.1)


@dtypes
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows(backend, dtype, rows, split):
    """Two steps along K, the second of 64, and a row of W that is alone in its tile."""
    needs(backend, "linear_nf4_lora", dtype=dtype, dropout=True)
    with use_plan("linear_nf4", Plan("small_m", block_n=4, block_k=1024, split_k=split, num_warps=1)):
        check_linear_lora(backend, dtype, Shape(rows, 521, 1088, r=16), 0.1)


def check_linear_lora(backend, dtype, shape, p):
    packed, state = qk.quantize_nf4((gaussian(shape.N, shape.K) / shape.K**0.5).cuda(), shape.blocksize)
    w = qk.dequantize_nf4(packed, state, dtype)
    leaves = {
        "x": gaussian(shape.M, shape.K, seed=1, dtype=dtype),
        "lora_A": (gaussian(shape.r, shape.K, seed=2) / shape.K**0.5).to(dtype).float(),
        "lora_B": gaussian(shape.N, shape.r, seed=3).to(dtype).float(),
        "bias": gaussian(shape.N, seed=4, dtype=dtype),
    }
    leaves = {name: t.cuda().requires_grad_() for name, t in leaves.items()}
    grad_y, seed = gaussian(shape.M, shape.N, seed=5, dtype=dtype).cuda(), torch.tensor([7], device="cuda")
    x, lora_A, lora_B, bias = leaves.values()
    weight, lora = weight_of("test", packed, state), LoRA(lora_A, lora_B, seed, 2.0, p)
    y, s = torch.ops.qlora_kernels.linear_nf4_lora(x, *weight, bias, *lora)
    grad_x, grad_A, grad_B, grad_bias = torch.autograd.grad(y, list(leaves.values()), grad_y)
    dropout = Dropout(dropout_keep(seed, shape.M, shape.K, p), keep_scale(p)) if p else None
    # Large products of 16-bit operands are compared in float32, because a GPU may be slow in float64.
    wide = torch.float64 if dtype == torch.float32 or shape not in LARGE else torch.float32
    arithmetic = replace(arithmetic_of(backend, dtype), wide=wide)
    assert_lora((y, s, grad_x, grad_A, grad_B), (x, w, bias, lora_A, lora_B, grad_y), 2.0, dropout, arithmetic)
    assert_within(grad_bias, total(exactly(grad_y)).to(dtype), "grad of bias")


def test_captured_graph_replays_new_inputs(backend):
    """Forward and backward can be captured (no host sync, no allocation outside the pool) and replayed on other
    data."""
    needs(backend, "linear_nf4_lora_backward")
    packed, state = qk.quantize_nf4(gaussian(512, 1024).cuda())
    A, B = gaussian(16, 1024).cuda().requires_grad_(), gaussian(512, 16).cuda().requires_grad_()
    x = gaussian(64, 1024, dtype=torch.bfloat16).cuda().requires_grad_()

    def step():
        y = qk.linear_nf4_lora(x, packed, state, A, B, scaling=2.0)
        return y, *torch.autograd.grad(y.float().square().sum(), (x, A, B))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(gaussian(64, 1024, seed=9, dtype=torch.bfloat16))
    graph.replay()
    for a, e in zip(captured, step(), strict=True):
        assert torch.equal(a, e)


def test_compiles_without_graph_breaks(backend):
    needs(backend, "linear_nf4_lora")
    packed, state = qk.quantize_nf4(gaussian(256, 512).cuda())
    A, B = gaussian(8, 512).cuda(), gaussian(256, 8).cuda()
    x = gaussian(32, 512, dtype=torch.bfloat16).cuda()

    def layer(x):
        return torch.nn.functional.gelu(qk.linear_nf4_lora(x, packed, state, A, B, scaling=2.0))

    # gelu of Inductor and of ATen may differ by a unit in the last place.
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))


def test_opcheck(backend):
    needs(backend, "linear_nf4_lora", dropout=True)
    packed, state = qk.quantize_nf4(gaussian(64, 128).cuda())
    A, B = gaussian(8, 128).cuda().requires_grad_(), gaussian(64, 8).cuda().requires_grad_()
    x = gaussian(5, 128).cuda().requires_grad_()
    arguments = (x, *weight_of("opcheck", packed, state), None, A, B, torch.tensor([3], device="cuda"), 2.0, 0.1)
    torch.library.opcheck(torch.ops.qlora_kernels.linear_nf4_lora, arguments)


@dtypes
def test_multi_lora(backend, dtype):
    needs(backend, "linear_nf4_multi_lora")
    packed, state = qk.quantize_nf4((gaussian(320, 512) / 512**0.5).cuda())
    adapter = torch.randint(-1, 4, (97,), generator=torch.Generator().manual_seed(0)).cuda()
    scalings = torch.tensor([2.0, 1.0, 0.5, 3.0]).cuda()
    leaves = [
        gaussian(97, 512, dtype=dtype).cuda().requires_grad_(),
        (gaussian(4, 16, 512) / 512**0.5).cuda().requires_grad_(),
        gaussian(4, 320, 16).cuda().requires_grad_(),
    ]
    grad_y = gaussian(97, 320, dtype=dtype).cuda()
    x, lora_A, lora_B = leaves
    lora = MultiLoRA(lora_A, lora_B, scalings, adapter, None, 0.0)
    y, s = torch.ops.qlora_kernels.linear_nf4_multi_lora(x, *weight_of("test", packed, state), None, *lora)
    results = (y, s, *torch.autograd.grad(y, leaves, grad_y))
    inputs = (x, qk.dequantize_nf4(packed, state, dtype), None, lora_A, lora_B, grad_y)
    assert_multi_lora(results, inputs, scalings, adapter, None, arithmetic_of(backend, dtype))
