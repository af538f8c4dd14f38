"""The emulator's semantics of sm_90a: TMA copies with every swizzle, mbarriers and products of warpgroups."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import cuda_host
from tests.support.cuda_host import out
from tests.support.tolerances import assert_within, exactly, product

pytestmark = pytest.mark.skipif(cuda_host.missing_tools() is not None, reason=str(cuda_host.missing_tools()))

SOURCE = Path(__file__).with_name("hopper.cu")
needs_nvcc = pytest.mark.skipif(cuda_host.nvcc_missing() is not None, reason=str(cuda_host.nvcc_missing()))
both_paths = pytest.mark.parametrize("mode", ["plain", pytest.param("ptx", marks=needs_nvcc)])
SANITIZED = ("asan", "tsan", *[pytest.param(mode, marks=needs_nvcc) for mode in ("ptx-asan", "ptx-tsan")])
TYPES = {torch.uint8: 0, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
"""CUtensorMapDataType by dtype."""
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
"""CUtensorMapSwizzle by the bytes of its span."""


def library(mode: str = "plain") -> cuda_host.Library:
    return cuda_host.build([SOURCE], mode)


def copy(
    mode: str, x: Tensor, box: tuple[int, int], swizzle: int, origin: tuple[int, int], early: int = 0, seed: int = 1
) -> Tensor:
    """Return the bytes that shared memory holds after the copy of the box at `origin`, (row, column)."""
    rows, columns = box
    y = torch.zeros(rows * columns * x.itemsize, dtype=torch.uint8)
    arguments = (x, TYPES[x.dtype], x.itemsize, *x.shape, rows, columns, SWIZZLES[swizzle], *origin, early, out(y))
    assert library(mode).call("launch_copy", *arguments, seed=seed) == 0
    return y


def in_shared_memory(x: Tensor, box: tuple[int, int], swizzle: int, origin: tuple[int, int]) -> Tensor:
    """Return the bytes of a box by definition: zeros outside the tensor, pieces of 16 bytes exchanged.

    Piece p of a row of `swizzle` bytes, in line r of 128 bytes, is stored at piece p XOR (r mod the number of pieces in
    the row).
    """
    (rows, columns), (row, column) = box, origin
    padded = torch.zeros(rows, columns, dtype=x.dtype)
    for i in range(rows):
        for j in range(columns):
            if 0 <= row + i < x.shape[0] and 0 <= column + j < x.shape[1]:
                padded[i, j] = x[row + i, column + j]
    straight = padded.view(torch.uint8).reshape(-1, 16)
    if not swizzle:
        return straight.reshape(-1)
    stored, pieces = torch.zeros_like(straight), swizzle // 16
    for i, piece in enumerate(straight):
        in_row, line = i % pieces, i * 16 // 128
        stored[i - in_row + (in_row ^ line % pieces)] = piece
    return stored.reshape(-1)


@both_paths
@pytest.mark.parametrize(
    ("dtype", "shape", "box", "swizzle"),
    [
        (torch.uint8, (70, 96), (64, 32), 32),
        (torch.uint8, (70, 96), (32, 64), 0),
        (torch.float32, (40, 16), (32, 16), 64),
        (torch.float16, (300, 64), (256, 64), 128),
        (torch.bfloat16, (20, 200), (16, 64), 128),
        (torch.bfloat16, (20, 32), (64, 64), 128),
    ],
)
@pytest.mark.parametrize("origin", [(0, 0), (8, 16), (-3, -8), (60, 24), (1000, 0), (0, -1000)])
def test_box_is_copied_with_its_swizzle_and_zeros_outside(
    mode: str, dtype: torch.dtype, shape: tuple[int, int], box: tuple[int, int], swizzle: int, origin: tuple[int, int]
) -> None:
    x = torch.randint(1, 256, (shape[0], shape[1] * dtype.itemsize), dtype=torch.uint8).view(dtype)
    assert torch.equal(copy(mode, x, box, swizzle, origin), in_shared_memory(x, box, swizzle, origin))


@both_paths
def test_box_is_absent_before_the_wait(mode: str) -> None:
    x = torch.zeros(32, 64, dtype=torch.uint8)
    for seed in range(4):
        assert (copy(mode, x, (32, 64), 0, (0, 0), early=1, seed=seed) == 0xFF).all()


def multiply(mode: str, a: Tensor, b: Tensor, seed: int = 1) -> Tensor:
    """Return launch_product's a b^T, a [128, K] and b [N, K]."""
    y = torch.full((len(a), len(b)), torch.nan)
    library(mode).call("launch_product", int(a.dtype == torch.float16), len(b), a, b, out(y), a.shape[1], seed=seed)
    return y


@both_paths
@pytest.mark.parametrize(
    ("dtype", "N"), [(torch.float16, 64), (torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256)]
)
def test_product_of_warpgroups(mode: str, dtype: torch.dtype, N: int) -> None:
    a, b = torch.randn(128, 640).to(dtype), torch.randn(N, 640).to(dtype)
    results = [multiply(mode, a, b, seed) for seed in (1, 2, 3)]
    assert_within(results[0], product(exactly(a), exactly(b).T))
    assert all(torch.equal(results[0], other) for other in [*results, multiply("plain", a, b)])


@pytest.mark.parametrize("mode", SANITIZED)
def test_product_passes_under_sanitizers(mode: str) -> None:
    a, b = torch.randn(128, 384).bfloat16(), torch.randn(64, 384).bfloat16()
    assert torch.equal(multiply(mode, a, b), multiply("plain", a, b))


@both_paths
def test_stored_operand_is_seen_after_a_proxy_fence(mode: str) -> None:
    a, b, y = torch.randn(64, 16).bfloat16(), torch.randn(64, 16).bfloat16(), torch.full((64, 64), torch.nan)
    library(mode).call("launch_stored", a, b, out(y), 0)
    assert_within(y, product(exactly(a), exactly(b).T))
    with pytest.raises(cuda_host.KernelFault, match=r"no fence\.proxy\.async followed"):
        library(mode).call("launch_stored", a, b, out(y), 1)


@pytest.mark.parametrize(
    ("arguments", "report"),
    [
        ({"box": (257, 32)}, "each size of the box must be 1 to 256"),
        ({"box": (64, 24)}, "the inner size of the box must be a multiple of 16 bytes"),
        ({"box": (64, 64), "swizzle": 32}, "must not exceed the swizzle"),
        ({"columns": 40}, "each stride must be a multiple of 16 bytes"),
        ({"type": 40}, "this data type is not modelled"),
        ({"swizzle": 9}, "this swizzle is not modelled"),
    ],
)
def test_tensor_map_is_refused_as_by_the_driver(arguments: dict[str, Any], report: str) -> None:
    box, columns = arguments.get("box", (64, 32)), arguments.get("columns", 64)
    swizzle = SWIZZLES.get(arguments.get("swizzle", 0), 9)
    x, y = torch.zeros(64, columns, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(cuda_host.KernelFault, match=f"cuTensorMapEncodeTiled: .*{report}"):
        library().call("launch_copy", x, arguments.get("type", 0), 1, 64, columns, *box, swizzle, 0, 0, 0, out(y))


def test_function_that_encodes_maps_can_be_absent() -> None:
    tested = library()
    tested.fail("cudaGetDriverEntryPointByVersion", 500)
    x, y = torch.zeros(32, 32, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)
    assert tested.call("launch_copy", x, 0, 1, 32, 32, 32, 32, 0, 0, 0, 0, out(y)) == 500
