"""adamw_step: every backend and instruction set gives the reference's bits, and bad arguments are refused."""

from __future__ import annotations

import pytest
import torch

import qlora_kernels as qk
from qlora_kernels.backends import cpu
from qlora_kernels.backends.reference.adamw_step import fma
from qlora_kernels.format.blockwise8 import STATE_BLOCKSIZE, dequantize_blockwise, quantize_blockwise
from qlora_kernels.format.double_quant import dynamic_boundaries, dynamic_map
from qlora_kernels.ops.adamw_step import SEGMENT_COLUMNS, Segment, Step, adamw_step
from tests.support.problems import DTYPES, dtype_name, usable_backends

NUMELS = (7, 255, 4096, 5003, 70_001)
HYPER = {
    "usual": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01},
    "small-beta1": {"beta1": 0.3, "beta2": 0.9, "eps": 1e-6, "weight_decay": 0.0},
}
hypers = pytest.mark.parametrize("hyper", HYPER.values(), ids=HYPER)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
bits_of_states = pytest.mark.parametrize("bits", [32, 8])
seeds = pytest.mark.parametrize("seed", [None, -1234567890123], ids=["nearest", "stochastic"])
GUARD = 64


def layout(numels=NUMELS, bits=32):
    """Return (segments, arena bytes): states one after another between guards; large parameters have two rows."""
    rows, offset, counter = [], GUARD, 0
    for param, numel in enumerate(numels):
        blocks = -(-numel // STATE_BLOCKSIZE)
        places = []
        for nbytes in (numel * bits // 8, numel * bits // 8, 4 * blocks, 4 * blocks)[: 4 if bits == 8 else 2]:
            places.append(offset)
            offset += -(-nbytes // GUARD) * GUARD + GUARD
        cut = numel if numel < 4096 else 3 * STATE_BLOCKSIZE
        for start, count in ((0, cut), (cut, numel - cut)):
            if count:
                states = [place + start * bits // 8 for place in places[:2]]
                absmax = [place + 4 * start // STATE_BLOCKSIZE for place in places[2:]] or [-1, -1]
                rows.append(Segment(param, start, count, *states, *absmax, counter + start))
        counter += blocks * STATE_BLOCKSIZE
    return torch.tensor(rows), offset


def trajectory(dtype, bits, hyper, seed=None, steps=4):
    """Return every tensor after each step; gradients cover seven decades, and one parameter has none at times."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(n, generator=generator).to(dtype) for n in NUMELS]
    segments, nbytes = layout(bits=bits)
    arena = torch.zeros(nbytes, dtype=torch.uint8)
    counts = torch.zeros(len(params))
    seed = None if seed is None else torch.tensor([seed])
    seen = []
    for step in range(steps):
        grads = []
        for index, n in enumerate(NUMELS):
            decade = torch.randint(-6, 1, (n,), generator=generator)
            grads.append((torch.randn(n, generator=generator) * 10.0**decade).to(dtype))
            if (step + index) % 4 == 3:
                grads[-1] = None
        counts += torch.tensor([float(grad is not None) for grad in grads])
        scalars = (torch.tensor(1e-2, dtype=torch.float64), seed, torch.tensor([0.5]), None)
        adamw_step(Step(params, grads, arena, counts, segments, *scalars, **hyper))
        seen += [p.clone() for p in params] + [arena.clone()]
    return seen


def assert_equal(actual, expected):
    for index, (a, b) in enumerate(zip(actual, expected, strict=True)):
        # Compared as bytes, so that a NaN equals itself.
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), f"{index}: {(a != b).sum()} of {a.numel()} differ"


def test_reference_multiplies_and_adds_with_one_rounding():
    """The exact result is just below the middle of two fp32 numbers; rounded to float64 first, it is the middle."""
    a, b, c = (torch.tensor(value) for value in (2.0**-24 * (1 + 2.0**-23), 1 - 2.0**-23, 1 + 2.0**-23))
    assert fma(a, b, c) == c
    assert (a.double() * b.double() + c.double()).float() != c


@hypers
@seeds
@bits_of_states
@dtypes
@pytest.mark.parametrize("backend", [b for b in usable_backends("adamw_step") if b != "reference"])
def test_backends_equal_reference_bits(backend, dtype, bits, seed, hyper):
    with qk.use_backend("reference"):
        expected = trajectory(dtype, bits, hyper, seed)
    with qk.use_backend(backend):
        assert_equal(trajectory(dtype, bits, hyper, seed), expected)


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@pytest.mark.parametrize("isa", ["avx512", "avx2", "neon", "portable"])
def test_instruction_sets_equal_reference_bits(isa):
    try:
        cpu.instruction_set(isa)
    except ValueError as reason:
        pytest.skip(str(reason))
    try:
        for dtype, bits, seed, hyper in [
            (torch.float32, 32, None, HYPER["usual"]),
            (torch.float32, 8, None, HYPER["small-beta1"]),
            (torch.bfloat16, 8, 7, HYPER["usual"]),
            (torch.float16, 32, None, HYPER["usual"]),
        ]:
            with qk.use_backend("reference"):
                expected = trajectory(dtype, bits, hyper, seed)
            with qk.use_backend("cpu"):
                assert_equal(trajectory(dtype, bits, hyper, seed), expected)
    finally:
        cpu.instruction_set("")


BAD = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf, "square overflows": 1e30}


def spoiled(value):
    """Return (parameter, arena) after a step with and without a bad element in the first and the short last block."""
    n = 2 * STATE_BLOCKSIZE + 77
    segments, nbytes = layout((n,), bits=8)
    param, arena = torch.zeros(n), torch.zeros(nbytes, dtype=torch.uint8)
    grad = torch.linspace(0.5, 1.0, n)
    grad[5] = grad[n - 1] = value
    for t, g in enumerate((grad, torch.linspace(0.5, 1.0, n))):
        scalars = (torch.tensor(0.1), None, None, None)
        adamw_step(Step([param], [g], arena, torch.full((1,), t + 1.0), segments, *scalars, **HYPER["usual"]))
    return param, arena


@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
@pytest.mark.parametrize("backend", usable_backends("adamw_step"))
def test_nonfinite_gradient_affects_only_its_element_of_8bit_block(backend, value):
    with qk.use_backend(backend):
        param, arena = spoiled(value)
    good = torch.ones(len(param), dtype=torch.bool)
    good[5] = good[-1] = False
    assert param[good].isfinite().all()
    assert (param[good] != 0).all()
    with qk.use_backend("reference"):
        expected, expected_arena = spoiled(value)
    assert torch.equal(arena, expected_arena)
    assert torch.equal(param.nan_to_num(), expected.nan_to_num())


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_nonfinite_gradient_affects_only_its_element_on_every_isa(isa):
    try:
        cpu.instruction_set(isa)
    except ValueError as reason:
        pytest.skip(str(reason))
    try:
        for value in BAD.values():
            test_nonfinite_gradient_affects_only_its_element_of_8bit_block("cpu", value)
    finally:
        cpu.instruction_set("")


def encoded_states(values):
    """Return the 8-bit states of a step that stores `values` (exp_avg) and their squares (exp_avg_sq).

    With beta1 = 0 and beta2 = 0, the states are the gradient and its square.
    """
    n = values.numel()
    blocks = -(-n // STATE_BLOCKSIZE)
    offsets = [0, 64 * blocks * 4, 2 * 64 * blocks * 4, 2 * 64 * blocks * 4 + 64 * blocks]
    segments = torch.tensor([Segment(0, 0, n, *offsets, 0)])
    arena = torch.zeros(offsets[-1] + 64 * blocks, dtype=torch.uint8)
    hyper = {"beta1": 0.0, "beta2": 0.0, "eps": 1e-8, "weight_decay": 0.0}
    lr = torch.tensor(0.0, dtype=torch.float64)
    adamw_step(Step([torch.zeros(n)], [values], arena, torch.ones(1), segments, lr, None, None, None, **hyper))
    return arena


@pytest.mark.parametrize("backend", usable_backends("adamw_step"))
def test_encoding_is_exact_at_every_boundary(backend):
    """Each decision boundary of the signed map at -1, 0 and +1 ulp, and each value, in blocks whose absmax is 1."""
    points = torch.cat([dynamic_boundaries(), dynamic_map()])
    up, down = points.nextafter(torch.tensor(9.0)), points.nextafter(torch.tensor(-9.0))
    rows = torch.cat([points, up, down]).clamp(-1, 1)
    rows = torch.cat([rows, torch.zeros(-rows.numel() % 255)]).view(-1, 255)
    values = torch.cat([torch.ones(len(rows), 1), rows], dim=1).reshape(-1)
    with qk.use_backend(backend):
        arena = encoded_states(values)
    q, absmax = quantize_blockwise(values, signed=True)
    assert (absmax == 1).all()
    assert torch.equal(arena[: values.numel()], q)
    squares = values.square()
    q, absmax = quantize_blockwise(squares, signed=False)
    start = 64 * len(rows) * 4
    assert torch.equal(arena[start : start + values.numel()], q)


@pytest.mark.parametrize("backend", usable_backends("adamw_step"))
def test_encoding_is_exact_at_isolated_boundaries(backend):
    """Each boundary among values that are far from all boundaries, so that it is not corrected because of a
    neighbour."""
    boundaries = dynamic_boundaries()
    up, down = boundaries.nextafter(torch.tensor(9.0)), boundaries.nextafter(torch.tensor(-9.0))
    points = torch.cat([boundaries, up, down])
    values = dynamic_map()[200].expand(len(points), STATE_BLOCKSIZE).clone()
    values[:, 0], values[:, 100] = 1.0, points
    values = values.reshape(-1)
    with qk.use_backend(backend):
        arena = encoded_states(values)
    q, _ = quantize_blockwise(values, signed=True)
    assert torch.equal(arena[: values.numel()], q)


@pytest.mark.parametrize("backend", usable_backends("adamw_step"))
def test_encoding_of_squares_is_exact_at_every_boundary(backend):
    """The unsigned map's boundaries, as close as squares of fp32 numbers come on either side."""
    roots = dynamic_boundaries(signed=False).double().sqrt().float()
    near = [roots, roots.nextafter(torch.tensor(9.0)), roots.nextafter(torch.tensor(-9.0))]
    rows = torch.stack(near).reshape(-1)
    rows = torch.cat([rows, torch.zeros(-rows.numel() % 255)]).view(-1, 255)
    values = torch.cat([torch.ones(len(rows), 1), rows], dim=1).reshape(-1)
    with qk.use_backend(backend):
        arena = encoded_states(values)
    q, _ = quantize_blockwise(values.square(), signed=False)
    start = 64 * len(rows) * 4
    assert torch.equal(arena[start : start + values.numel()], q)


@pytest.mark.parametrize("signed", [True, False])
def test_blockwise_round_trip(signed):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, generator=generator)
    x = x if signed else x.square()
    x[512:768] = 0.0
    x[256:512] *= 1e-40  # the block's reciprocal is not finite
    q, absmax = quantize_blockwise(x, signed=signed)
    assert (absmax[1:3] == 0).all()
    y = dequantize_blockwise(q, absmax, signed=signed)
    assert (y[256:768] == 0).all()
    # Half of the widest cell: 0.9 / 64 signed, half of that unsigned; the signed map has no -1, which adds half a cell.
    assert ((x - y).abs()[:256] <= absmax[0] * (0.9 / 64 if signed else 0.9 / 256)).all()
    again, same = quantize_blockwise(y, signed=signed, absmax=absmax)
    assert torch.equal(again, q)
    assert torch.equal(same, absmax)
    assert not dequantize_blockwise(torch.zeros(300).byte(), torch.zeros(2), signed=signed).any()


@pytest.mark.parametrize("backend", usable_backends("adamw_step"))
@bits_of_states
def test_found_inf_skips_all_writes(backend, bits):
    segments, nbytes = layout(bits=bits)
    params = [torch.ones(n) for n in NUMELS]
    arena = torch.zeros(nbytes, dtype=torch.uint8)
    grads = [torch.ones(n) for n in NUMELS]
    lr = torch.tensor(1.0)
    for found, changed in ((1.0, False), (0.0, True)):
        with qk.use_backend(backend):
            scalars = (lr, None, None, torch.tensor([found]))
            adamw_step(Step(params, grads, arena, torch.ones(len(params)), segments, *scalars, **HYPER["usual"]))
        assert bool(arena.any()) is changed
        assert all(bool((p != 1).all()) is changed for p in params)


@pytest.mark.parametrize("backend", usable_backends("adamw_step"))
@bits_of_states
def test_gaps_between_states_are_not_written(backend, bits):
    segments, nbytes = layout(bits=bits)
    arena = torch.full((nbytes,), 0xA5, dtype=torch.uint8)
    owned = torch.zeros(nbytes, dtype=torch.bool)
    for row in segments.tolist():
        segment = Segment(*row)
        absmax = 4 * -(-segment.numel // STATE_BLOCKSIZE)
        for place, size in zip(row[3:7], [segment.numel * bits // 8] * 2 + [absmax] * 2, strict=True):
            if place >= 0:
                owned[place : place + size] = True
                arena[place : place + size] = 0
    params = [torch.ones(n + 16) for n in NUMELS]
    grads = [torch.ones(n) for n in NUMELS]
    with qk.use_backend(backend):
        heads = [p[:n] for p, n in zip(params, NUMELS, strict=True)]
        scalars = (torch.tensor(1.0), None, None, None)
        adamw_step(Step(heads, grads, arena, torch.ones(len(params)), segments, *scalars, **HYPER["usual"]))
    assert (arena[~owned] == 0xA5).all()
    assert all((p[n:] == 1).all() and (p[:n] != 1).all() for p, n in zip(params, NUMELS, strict=True))


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("param", 5, "no parameter 5"),
        ("start", 128, "do not start a block"),
        ("numel", 8, "lie outside their parameter"),
        ("exp_avg", -4, "lie outside the arena"),
        ("exp_avg_sq", 1 << 40, "lie outside the arena"),
        ("exp_avg_sq", 66, "are not aligned"),
    ],
)
def test_invalid_segment_rows_are_refused(column, value, message):
    segments, nbytes = layout()
    segments[0, SEGMENT_COLUMNS.index(column)] = value
    params, grads = [torch.ones(n) for n in NUMELS], [torch.ones(n) for n in NUMELS]
    arena = torch.zeros(nbytes, dtype=torch.uint8)
    scalars = (torch.tensor(1.0), None, None, None)
    with qk.use_backend("cpu"), pytest.raises(RuntimeError, match=message):
        adamw_step(Step(params, grads, arena, torch.ones(len(params)), segments, *scalars, **HYPER["usual"]))


def test_the_registered_op_works_in_place_and_passes_opcheck():
    segments, nbytes = layout((300,))
    arguments = [[torch.ones(300)], [torch.ones(300)], torch.zeros(nbytes, dtype=torch.uint8), torch.ones(1), segments]
    arguments += [torch.tensor(0.5), None, None, None]
    op, step = torch.ops.qlora_kernels.adamw_step, Step(*arguments, **HYPER["usual"])
    torch.library.opcheck(op, step, test_utils=("test_schema", "test_faketensor"))
    op(*step)
    assert (arguments[0][0] != 1).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grads": []}, ValueError, "one for each param, got 1 params, 0 grads and 1 steps"),
        ({"steps": torch.ones(2)}, ValueError, "1 grads and 2 steps"),
        ({"grads": [torch.ones(4).half()]}, TypeError, "must have their param's"),
        ({"grads": [torch.ones(2, 2)]}, ValueError, "must be laid out as their param"),
        ({"params": [torch.ones(4).double()], "grads": [torch.ones(4).double()]}, TypeError, "float32, bfloat16"),
        ({"arena": torch.zeros(64)}, TypeError, "arena must be contiguous uint8"),
        ({"segments": torch.zeros(1, 7, dtype=torch.int64)}, ValueError, r"segments must be int64 \[n, 8\]"),
        ({"lr": torch.ones(2)}, ValueError, "lr must have one element"),
    ],
)
def test_refusals(change, error, message):
    arguments = {
        "params": [torch.ones(4)],
        "grads": [torch.ones(4)],
        "arena": torch.zeros(64, dtype=torch.uint8),
        "steps": torch.ones(1),
        "segments": torch.zeros(0, 8, dtype=torch.int64),
        "lr": torch.tensor(0.1),
        "seed": None,
        "grad_multiplier": None,
        "found_inf": None,
    }
    with pytest.raises(error, match=message):
        adamw_step(Step(**{**arguments, **change}, **HYPER["usual"]))


@pytest.mark.skipif(cpu.unavailable() is not None, reason=str(cpu.unavailable()))
def test_thread_count_does_not_change_step_bits():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = trajectory(torch.bfloat16, 8, HYPER["usual"], 3)
        torch.set_num_threads(3)
        assert_equal(trajectory(torch.bfloat16, 8, HYPER["usual"], 3), expected)
    finally:
        torch.set_num_threads(before)
