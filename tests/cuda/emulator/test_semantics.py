"""The emulator's semantics of warps, barriers, copies, atomics and the runtime, from source and from PTX."""

from pathlib import Path

import pytest
import torch

from tests.support import cuda_host
from tests.support.cuda_host import out
from tests.support.cuda_host.build import emit_ptx
from tests.support.tolerances import assert_within, exactly, product

pytestmark = pytest.mark.skipif(cuda_host.missing_tools() is not None, reason=str(cuda_host.missing_tools()))

SOURCE = Path(__file__).with_name("semantics.cu")
needs_nvcc = pytest.mark.skipif(cuda_host.nvcc_missing() is not None, reason=str(cuda_host.nvcc_missing()))
both_paths = pytest.mark.parametrize("mode", ["plain", pytest.param("ptx", marks=needs_nvcc)])
OUT_OF_MEMORY = 2


def library(mode: str = "plain") -> cuda_host.Library:
    return cuda_host.build([SOURCE], mode)


@both_paths
def test_warp_collectives(mode: str) -> None:
    x, y = torch.randint(0, 50, (64,), dtype=torch.int32), torch.zeros(64, 8, dtype=torch.int32)
    library(mode).call("launch_warp", x, out(y))
    lane = torch.arange(32)
    for warp in (0, 1):
        values, result = x[warp * 32 : warp * 32 + 32], y[warp * 32 : warp * 32 + 32]
        bits = int(sum((int(v) & 1) << i for i, v in enumerate(values)))
        assert (result[:, 0] == values[5]).all()
        assert torch.equal(result[:, 1], values[lane ^ 3])
        assert torch.equal(result[:, 2], values[torch.where(lane + 4 < 32, lane + 4, lane)])
        assert torch.equal(result[:, 3], values[(lane - 1).clamp(min=0)])
        assert (result[:, 4].to(torch.int64) & 0xFFFFFFFF == bits).all()
        assert torch.equal(result[:, 5], values[torch.where(lane < 16, lane ^ 8, lane ^ 4)])
        assert (result[:, 6] == int((values == 7).any())).all()
        assert torch.equal(result[:, 7], values[lane ^ 2])


@both_paths
def test_barriers_reduce_predicates(mode: str) -> None:
    x, y = torch.tensor([0, 1, 2] * 32, dtype=torch.int32), torch.zeros(96, 3, dtype=torch.int32)
    library(mode).call("launch_barrier", x, out(y))
    assert (y == torch.tensor([0, 1, 32], dtype=torch.int32)).all()


@both_paths
def test_unwritten_shared_memory_is_nan(mode: str) -> None:
    y = torch.zeros(128)
    library(mode).call("launch_poison", out(y))
    assert y.isnan().all()


@both_paths
def test_async_copy_completes_at_wait_and_fills_with_zeros(mode: str) -> None:
    x, y = torch.randn(64), torch.zeros(64)
    library(mode).call("launch_copy", x, out(y), 5, 0)
    assert torch.equal(y, torch.cat([x[:59], torch.zeros(5)]))
    library(mode).call("launch_copy", x, out(y), 0, 1)
    assert y.isnan().all(), "the copy must not be there before the wait"


@both_paths
def test_tensor_core_product(mode: str) -> None:
    a, b, d = torch.randn(16, 16).half(), torch.randn(8, 16).half(), torch.zeros(16, 8)
    library(mode).call("launch_mma", a, b, out(d))
    assert_within(d, product(exactly(a), exactly(b).T))


@both_paths
def test_atomics_over_all_blocks(mode: str) -> None:
    total, largest = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    library(mode).call("launch_atomic", out(total), out(largest))
    assert total.item() == 6 * 4 * sum(range(16))
    assert largest.item() == max(i * 7 % 61 for i in range(16))


@needs_nvcc
@pytest.mark.parametrize(
    ("stride", "wide_stride", "wavefronts"),
    [(1, 1, {1, 4}), (0, 0, {1, 4}), (2, 2, {2, 8}), (32, 8, {32}), (33, 1, {1, 4})],
)
def test_wavefronts_of_shared_memory_are_counted(stride: int, wide_stride: int, wavefronts: set[int]) -> None:
    """By the stride between lanes, in words and in 16 bytes; without conflicts the accesses need 1 and 4."""
    tested = library("ptx")
    tested.count_banks()
    tested.call("launch_bank", out(torch.zeros(32)), stride, wide_stride)
    counts = tested.bank_counts()
    tested.count_banks(enabled=False)
    tested.call("launch_bank", out(torch.zeros(32)), 32, 1)
    assert {count.wavefronts for count in counts} == wavefronts
    assert {count.needed for count in counts} == {1, 4}
    assert [count.instructions for count in counts] == [1, 1]
    assert tested.bank_counts() == []


@pytest.mark.parametrize(
    ("which", "report"),
    [(0, "not in its own mask"), (1, "deadlock"), (2, "which is not in mask")],
)
def test_warp_misuse_is_reported(which: int, report: str) -> None:
    with pytest.raises(cuda_host.KernelFault, match=report):
        library().call("launch_misuse", out(torch.zeros(32, dtype=torch.int32)), which)


@pytest.mark.parametrize(("which", "report"), [(0, "1 to 1024"), (1, "1 to 1024"), (2, "no GPU has that")])
def test_invalid_launch_is_refused(which: int, report: str) -> None:
    with pytest.raises(cuda_host.KernelFault, match=report):
        library().call("launch_refused", which)


def test_runtime_calls_are_recorded_in_order() -> None:
    tested = library()
    tested.calls()
    assert tested.call("use_managed_memory", 4096) == 0
    names = [call.name for call in tested.calls()]
    assert names == [
        "cudaMallocManaged",
        "cudaStreamCreateWithFlags",
        "cudaMemAdvise",
        "cudaMemPrefetchAsync",
        "cudaStreamDestroy",
        "cudaFree",
    ]


@pytest.mark.parametrize("call", ["cudaMallocManaged", "cudaMemAdvise", "cudaMemPrefetchAsync"])
def test_runtime_call_failure_can_be_injected(call: str) -> None:
    tested = library()
    tested.fail(call, OUT_OF_MEMORY)
    assert tested.call("use_managed_memory", 4096) == OUT_OF_MEMORY
    assert tested.live_allocations() == 0
    assert tested.call("use_managed_memory", 4096) == 0


def test_write_to_input_is_reported() -> None:
    with pytest.raises(cuda_host.KernelFault, match="an input of shape"):
        library().call("launch_poison", torch.zeros(128))


@needs_nvcc
def test_ptx_kernels_launch_by_name() -> None:
    module = cuda_host.load_ptx(emit_ptx(SOURCE))
    assert not module.unsupported
    kernel = next(name for name in module.parameters if "mma_kernel" in name)
    a, b, d = torch.randn(16, 16).half(), torch.randn(8, 16).half(), torch.zeros(16, 8)
    module.launch(kernel, (1,), (32,), 0, (a, b, out(d)))
    assert_within(d, product(exactly(a), exactly(b).T))
