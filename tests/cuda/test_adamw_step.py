"""csrc/cuda/adamw_step.cu and managed_memory.cu: bit-equal to the reference (class 1), under the emulator."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from qlora_kernels.backends.reference.adamw_step import adamw_step
from qlora_kernels.ops.adamw_step import SEGMENT_COLUMNS, Step
from qlora_kernels.optim.paging_plan import plan_chunks, plan_slots
from tests.support import cuda_host
from tests.support.cuda_host import out, pointers

from .launch_args import adamw_args
from .launching import (
    FLOAT_TYPES,
    all_modes,
    library,
    needs_emulator,
    needs_nvcc,
    over_schedules,
    ptx_under_sanitizers,
    same_bits,
    source_and_ptx,
)
from .planted import Fault, planted_tests

pytestmark = needs_emulator

HYPER = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.02}
NUMELS = (1, 300, 4096 + 77, 256 * 3)
OUT_OF_MEMORY = 2


@dataclass
class State:
    """Parameters with the states after a few steps of the reference, so that no state is zero."""

    params: list[Tensor]
    grads: list[Tensor | None]
    arena: Tensor
    steps: Tensor
    segments: Tensor

    @classmethod
    def make(cls, dtype: torch.dtype, bits: int, hyper: dict[str, float] = HYPER) -> State:
        generator = torch.Generator().manual_seed(bits)
        slots, nbytes = plan_slots(NUMELS, bits)
        chunks = plan_chunks(slots, [0] * len(slots), None)
        params = [torch.randn(n, generator=generator).to(dtype) for n in NUMELS]
        segments = torch.tensor([list(s) for s in chunks[0].segments], dtype=torch.int64)
        assert segments.shape[1] == len(SEGMENT_COLUMNS)
        steps = 3.0 * torch.arange(len(NUMELS))  # a count of each parameter, so that their factors differ
        state = cls(params, [], torch.zeros(nbytes, dtype=torch.uint8), steps, segments)
        for _ in range(2):
            state.grads = [(torch.randn(n, generator=generator) * 0.1).to(dtype) for n in NUMELS]
            state.steps += 1
            state.reference(hyper=hyper)
        state.grads[1] = None
        return state

    def copy(self) -> State:
        params = [p.clone() for p in self.params]
        return State(params, list(self.grads), self.arena.clone(), self.steps.clone(), self.segments)

    def reference(self, *, lr: float = 0.01, seed: Tensor | None = None, multiplier: Tensor | None = None,
                  found_inf: Tensor | None = None, hyper: dict[str, float] = HYPER) -> None:  # fmt: skip
        lr_tensor = torch.tensor([lr], dtype=torch.float32)
        tensors = (self.params, self.grads, self.arena, self.steps, self.segments, lr_tensor)
        adamw_step(Step(*tensors, seed, multiplier, found_inf, **hyper))

    def emulated(self, mode: str, *, lr: float = 0.01, seed: Tensor | None = None, multiplier: Tensor | None = None,
                 found_inf: Tensor | None = None, hyper: dict[str, float] = HYPER, order: str = "random",
                 schedule: int = 1, tested: cuda_host.Library | None = None) -> None:  # fmt: skip
        table: list[Tensor | out | int | None] = []
        for param, grad in zip(self.params, self.grads, strict=True):
            table += [out(param), grad, FLOAT_TYPES[param.dtype], param.numel()]
        scalars = [*[hyper[k] for k in ("beta1", "beta2", "eps", "weight_decay")], 0.0]
        optional = (seed, multiplier, found_inf)
        memory = (pointers(tuple(table)), self.segments, self.steps, self.arena, torch.tensor([lr]))
        arguments = adamw_args(*memory, optional, scalars, max(NUMELS))
        tested = tested or library("adamw_step", mode)
        tested.calls()
        assert tested.call("launch_adamw_step", arguments, None, seed=schedule, order=order) == 0
        assert [call.name for call in tested.calls()] == ["launch"], "one launch for all tensors"

    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.params, self.arena)


@all_modes
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
def test_step_equals_reference(mode: str, dtype: torch.dtype, bits: int) -> None:
    start = State.make(dtype, bits)
    expected = start.copy()
    expected.reference()

    def run(order: str, seed: int) -> tuple[Tensor, ...]:
        state = start.copy()
        state.emulated(mode, order=order, schedule=seed)
        return state.tensors()

    for mine, theirs in zip(over_schedules(mode, run), expected.tensors(), strict=True):
        assert same_bits(mine, theirs)


@source_and_ptx
@pytest.mark.parametrize("bits", [32, 8])
def test_clip_and_stochastic_rounding_are_fused(mode: str, bits: int) -> None:
    seed, multiplier = torch.tensor([0x0123456789ABCDEF]), torch.tensor([0.37])
    mine = State.make(torch.bfloat16, bits)
    expected = mine.copy()
    expected.reference(seed=seed, multiplier=multiplier)
    mine.emulated(mode, seed=seed, multiplier=multiplier)
    assert all(same_bits(a, b) for a, b in zip(mine.tensors(), expected.tensors(), strict=True))


@source_and_ptx
def test_other_branches_of_the_formula(mode: str) -> None:
    hyper = {"beta1": 0.3, "beta2": 0.95, "eps": 1e-5, "weight_decay": 0.0}
    mine = State.make(torch.float32, 32, hyper)
    expected = mine.copy()
    expected.reference(hyper=hyper)
    mine.emulated(mode, hyper=hyper)
    assert all(same_bits(a, b) for a, b in zip(mine.tensors(), expected.tensors(), strict=True))


@needs_nvcc
@ptx_under_sanitizers
def test_compiled_under_sanitizers(mode: str) -> None:
    test_step_equals_reference(mode, torch.bfloat16, 8)


def test_nothing_is_written_after_an_overflow() -> None:
    mine = State.make(torch.float32, 8)
    before = mine.copy()
    mine.emulated("plain", found_inf=torch.tensor([1.0]))
    assert all(same_bits(a, b) for a, b in zip(mine.tensors(), before.tensors(), strict=True))


def test_nonfinite_gradient_behaves_as_the_reference() -> None:
    mine = State.make(torch.float32, 8)
    assert mine.grads[2] is not None
    mine.grads[2][5], mine.grads[2][600] = torch.nan, torch.inf
    expected = mine.copy()
    expected.reference()
    mine.emulated("plain")
    assert torch.equal(mine.params[2].isnan(), expected.params[2].isnan())


def test_many_steps_through_the_device_counter() -> None:
    """Step counts and learning rate are read from device memory, so that one launch is valid for every step."""
    mine = State.make(torch.float32, 32)
    expected = mine.copy()
    for step in range(5):
        for state in (mine, expected):
            state.steps += 100
        expected.reference(lr=0.01 / (step + 1))
        mine.emulated("plain", lr=0.01 / (step + 1))
    assert all(same_bits(a, b) for a, b in zip(mine.tensors(), expected.tensors(), strict=True))


def managed(name: str, *arguments: object) -> int:
    return library("managed_memory", "plain").call(name, *arguments, error="return")


def test_managed_memory_is_allocated_and_freed() -> None:
    tested = library("managed_memory", "plain")
    tested.calls()
    place = torch.zeros(1, dtype=torch.int64)
    assert managed("managed_allocate", out(place), 1 << 20, None) == 0
    memory = int(place.item())
    assert managed("managed_prefer_device", memory, 1 << 20, 0) == 0
    assert managed("managed_prefetch", memory, 4096, 8192, 0, None) == 0
    assert managed("managed_prefetch", memory, 8192, 8192, 0, None) == 0, "an empty range asks nothing of the driver"
    assert managed("managed_free", memory) == 0
    calls = tested.calls()
    assert [c.name for c in calls] == [
        "cudaMallocManaged",
        "cudaMemsetAsync",
        "cudaMemAdvise",
        "cudaMemAdvise",
        "cudaMemPrefetchAsync",
        "cudaFree",
    ]
    assert calls[4].values[1:3] == (4096, 4096)
    assert tested.live_allocations() == 0


@pytest.mark.parametrize("call", ["cudaMallocManaged", "cudaMemsetAsync"])
def test_allocation_failure_leaks_nothing(call: str) -> None:
    tested, place = library("managed_memory", "plain"), torch.ones(1, dtype=torch.int64)
    tested.fail(call, OUT_OF_MEMORY)
    assert managed("managed_allocate", out(place), 1 << 20, None) == OUT_OF_MEMORY
    assert place.item() == 0
    assert tested.live_allocations() == 0


def test_prefetch_outside_the_arena_is_an_error() -> None:
    place = torch.zeros(1, dtype=torch.int64)
    assert managed("managed_allocate", out(place), 4096, None) == 0
    assert managed("managed_prefetch", int(place.item()), 0, 8192, 0, None) != 0
    assert managed("managed_free", int(place.item())) == 0


def test_concurrent_managed_access_is_queried() -> None:
    tested, answer = library("managed_memory", "plain"), torch.zeros(1, dtype=torch.int32)
    assert managed("managed_concurrent_access", 0, out(answer)) == 0
    assert answer.item() == 1
    tested.set_attribute(89, 0)
    assert managed("managed_concurrent_access", 0, out(answer)) == 0
    tested.set_attribute(89, 1)
    assert answer.item() == 0


@source_and_ptx
@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_nonfinite_gradient_affects_only_its_element_of_8bit_block(mode: str, value: float) -> None:
    mine = State.make(torch.float32, 8)
    grad = mine.grads[2]
    assert grad is not None
    mine.grads[2] = grad.clone()
    mine.grads[2][[5, -1]] = value
    expected = mine.copy()
    expected.reference()
    mine.emulated(mode)
    assert torch.equal(mine.arena, expected.arena)
    for param, reference in zip(mine.params, expected.params, strict=True):
        assert torch.equal(param.nan_to_num(), reference.nan_to_num())


@source_and_ptx
@pytest.mark.parametrize(
    ("column", "value"),
    [("param", 9), ("param", -1), ("start", 1 << 40), ("numel", 1 << 62), ("exp_avg", -64), ("exp_avg_sq", 1 << 50)],
)
def test_segments_outside_their_tensors_are_skipped(mode: str, column: str, value: int) -> None:
    mine = State.make(torch.float32, 32)
    before = mine.copy()
    mine.segments = mine.segments[:1].clone()
    mine.segments[0, SEGMENT_COLUMNS.index(column)] = value
    mine.emulated(mode)
    assert all(same_bits(a, b) for a, b in zip(mine.tensors(), before.tensors(), strict=True))


OTHER_HYPER = {"beta1": 0.3, "beta2": 0.95, "eps": 1e-5, "weight_decay": 0.02}
PLANTED_IN: list[tuple[torch.dtype, int, dict[str, object]]] = [
    (torch.float32, 32, {}),
    (torch.float32, 32, {"hyper": OTHER_HYPER}),
    (torch.bfloat16, 8, {}),
    (torch.bfloat16, 32, {"seed": torch.tensor([0x0123456789ABCDEF]), "multiplier": torch.tensor([0.37])}),
    (torch.float32, 8, {"found_inf": torch.tensor([1.0])}),
]
DECAY = "if (decays) p = __fmul_rn(p, f.decay);"
STEP = "p = __fadd_rn(p, __fdiv_rn(__fmul_rn(f.step_size, m), denominator));"
SECOND_MOMENT = "__fmaf_rn(__fmul_rn(f.one_minus_beta2, g), g, __fmul_rn(v, f.beta2))"
FAULTS = [
    Fault("weight decay as in Adam", DECAY, "if (decays) g = __fmaf_rn(1.0f - f.decay, p, g);", 0),
    Fault("weight decay after the step", STEP, f"{STEP} {DECAY}", 0),
    Fault(
        "the states are swapped",
        "load_elements<float>(m, exp_avg, offset, count);",
        "load_elements<float>(m, exp_avg_sq, offset, count);",
        0,
    ),
    Fault("the bias correction of exp_avg", "lr / (1 - power(s.beta1, t))", "lr", 0),
    Fault("the bias correction of exp_avg_sq", "__fdiv_rn(__fsqrt_rn(v), f.correction2)", "__fsqrt_rn(v)", 0),
    Fault("eps inside the root", "__fsqrt_rn(v)", "__fsqrt_rn(v + f.eps)", 0),
    Fault("the step count of the correction", "power(s.beta2, t)", "power(s.beta2, t - 1)", 0),
    Fault("beta1 of 0.5 and below", "s.beta1 > 0.5", "true", 1),
    Fault(
        "a fused product",
        SECOND_MOMENT,
        "__fadd_rn(__fmul_rn(__fmul_rn(f.one_minus_beta2, g), g), __fmul_rn(v, f.beta2))",
        0,
    ),
    Fault("the factor of gradients", "__fmul_rn(g[i], multiplier)", "g[i]", 3),
    Fault(
        "the codes of exp_avg_sq",
        "shared.exp_avg_sq_code.fill_unsigned(thread);",
        "shared.exp_avg_sq_code.fill_signed(thread);",
        2,
    ),
    Fault(
        "the absmax of a unit",
        "reinterpret_cast<float*>(problem.arena + segment.exp_avg_absmax) + unit",
        "reinterpret_cast<float*>(problem.arena + segment.exp_avg_absmax)",
        2,
    ),
    Fault("the largest of a warp", "max(bits, __shfl_xor_sync(kEveryLane, bits, distance))", "bits", 2),
    Fault("the last state of a segment", "code.value[q[i]]", "code.value[q[0]]", 2),
    Fault("the random bits of an element", "16 * (i & 1)", "16 * (i & 0)", 3),
    Fault("the counter of a segment", "segment.counter + offset", "offset", 3),
    Fault("an overflow", "problem.found_inf && *problem.found_inf != 0", "false", 4),
    Fault(
        "the units of a block",
        "int64_t(blockIdx.x) * kAdamWWarps + thread / 32",
        "int64_t(blockIdx.x) * kAdamWWarps + thread / 64",
        0,
    ),
    Fault("the barrier before the factors", "__syncthreads();  // the factors of the segment before", "", 0),
]
"""case: in PLANTED_IN."""

ONE_ROW = {"4 * kLargestSegmentRow, n_segments": "4, n_segments", "n_segments < 65535 ? n_segments : 65535": "1"}
"""Few blocks, so that each has several units and several segments."""


def check_planted(tested: cuda_host.Library, case: int) -> None:
    dtype, bits, options = PLANTED_IN[case]
    start = State.make(dtype, bits)
    expected = start.copy()
    expected.reference(**options)  # type: ignore[arg-type]
    for order in ("random", "warp-priority"):
        mine = start.copy()
        mine.emulated("plain", tested=tested, order=order, **options)  # type: ignore[arg-type]
        assert all(same_bits(a, b) for a, b in zip(mine.tensors(), expected.tensors(), strict=True))


planted, test_checks_pass_without_a_fault, test_planted_fault_is_detected = planted_tests(
    "adamw_step", FAULTS, check_planted, ONE_ROW
)
