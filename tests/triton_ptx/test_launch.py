"""Launches by kept kernels pass what Triton's own launch passes; a recording driver stands for the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend
from triton.backends.nvidia import driver as nvidia
from triton.runtime.jit import JITFunction

from qlora_kernels.backends.triton import launch, lora_down, lora_grads, partials
from qlora_kernels.backends.triton.launch import Launchable
from tests.support.problems import gaussian

from .recording import RecordingDriver, addresses, by_triton, calls, recorded_kernel


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launchable]:
    """A kernel without kept launches, on the recording driver."""
    yield recorded_kernel(monkeypatch)
    calls.clear()


def test_kept_launch_passes_what_triton_passes(kernel: Launchable, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = by_triton(monkeypatch)
    parts, out = gaussian(3, 40, 16), torch.empty(40, 16, dtype=torch.bfloat16)
    for _ in range(2):
        kernel[(1,)](parts, out, 640, 3, 0.5, BLOCK=1024, num_warps=4)
    assert len(seen) == 1
    first, second = calls
    assert addresses(first[9:]) == list(second[9:])
    assert first[:6] == second[:6]  # grid, stream, function, metadata
    assert second[6:9] == (None, None, None)  # nothing for profilers, of which there is none


@pytest.mark.skipif(launch._version() not in launch.DIRECT_VERSIONS, reason="this Triton's launcher is called whole")
def test_direct_call_of_the_c_launcher_passes_what_cuda_launcher_passes(
    kernel: Launchable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's own CudaLauncher makes the first call."""
    whole: list[int] = []

    class Stock(nvidia.CudaLauncher):  # type: ignore[misc]
        def __call__(self, *arguments: Any) -> None:
            whole.append(1)
            super().__call__(*arguments)

    class Utils(RecordingDriver.utils):
        @staticmethod
        def launch(*arguments: Any) -> None:
            calls.append(arguments)

    Stock.__name__ = "CudaLauncher"
    monkeypatch.setattr(RecordingDriver, "launcher_cls", Stock)
    monkeypatch.setattr(RecordingDriver, "utils", Utils)
    for name in ("annotate_arguments", "make_kernel_signature"):  # they need the compiled module of Triton's driver
        monkeypatch.setattr(nvidia, name, list)
    parts, out = gaussian(3, 40, 16), torch.empty(40, 16, dtype=torch.bfloat16)
    for _ in range(2):
        kernel[(1,)](parts, out, 640, 3, 0.5, BLOCK=1024, num_warps=4)
    assert len(whole) == 1
    first, second = calls
    assert first[:8] == second[:8]  # grid, stream, function, options, metadata
    assert second[8:11] == (None, None, None)  # nothing for profilers, of which there is none
    assert first[11:15] == second[11:15]  # scratch memory, annotations, signature
    assert addresses(first[15]) == list(second[15])


@pytest.mark.parametrize(
    "other",
    [
        {"parts": gaussian(3 * 640 + 1)[1:].view(3, 640)},  # no multiple of 16 bytes
        {"out": torch.empty(640)},  # another dtype
        {"numel": 639},  # no multiple of 16
        {"numel": 2**31},  # 64 bits
        {"n": 1},  # a constant for Triton
        {"BLOCK": 512},
        {"num_warps": 2},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_kind_is_compiled(kernel: Launchable, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]) -> None:
    seen = by_triton(monkeypatch)
    usual = {
        "parts": gaussian(3, 640),
        "out": torch.empty(640, dtype=torch.bfloat16),
        "numel": 640,
        "n": 3,
        "BLOCK": 1024,
        "num_warps": 4,
    }
    for values in (usual, usual | other, usual, usual | other):
        parts, out, numel, n, *flags = values.values()
        kernel[(1,)](parts, out, numel, n, 0.5, **dict(zip(("BLOCK", "num_warps"), flags, strict=True)))
    assert len(seen) == 2
    assert calls[0][5] == calls[2][5]
    assert calls[1][5] == calls[3][5]


NUMBERS = (0, 1, 2, 15, 16, 17, 48, -1, -16, 2**31 - 1, 2**31, 2**31 + 16, -(2**31), -(2**31) - 16, 2**63 - 1, 2**63)


def test_numbers_of_one_kind_are_specialized_alike() -> None:
    """Whatever Triton distinguishes, the kinds distinguish."""
    kinds: dict[Any, set[Any]] = {}
    for number in (*NUMBERS, 0.0, 1.0, 0.5, True, False):
        specialized = native_specialize_impl(BaseBackend, number, False, True, True)
        kinds.setdefault(launch._kind_of_number(number), set()).add(specialized)
    assert all(len(specialized) == 1 for specialized in kinds.values()), kinds


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_profilers_see_every_launch(kernel: Launchable, monkeypatch: pytest.MonkeyPatch, hook: str) -> None:
    seen = by_triton(monkeypatch)
    chain = getattr(triton.knobs.runtime, hook)
    observer = lambda *_: None  # noqa: E731 - removed again by identity
    for observed in (False, False, True, False):
        if observed:
            chain.add(observer)
        partials.sum_partials(gaussian(3, 40, 16), 0.5, torch.bfloat16)
        chain.remove(observer)
    assert len(seen) == 2  # the first one, and the observed one


def test_untested_version_of_triton_launches_by_itself(kernel: Launchable, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = by_triton(monkeypatch)
    monkeypatch.setattr(triton, "__version__", "4.0.0")
    untested = Launchable(kernel.kernel)
    for _ in range(2):
        untested[(1,)](gaussian(3, 640), torch.empty(640), 640, 3, 0.5, BLOCK=1024, num_warps=4)
    assert len(seen) == 2


def test_fusion_of_products_and_sums_does_not_depend_on_the_environment(
    kernel: Launchable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton 3.10 changes the default, which TRITON_DEFAULT_FP_FUSION sets as well."""
    for default in ("0", "1"):
        monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", default)
        kernel[(1,)](gaussian(3, 640), torch.empty(640), 640, 3, 0.5, BLOCK=1024, num_warps=int(default) + 1)
    options = [kept.kernel.metadata.enable_fp_fusion for kept in kernel.kept.values()]
    assert options == [True, True]
    kernel[(1,)](gaussian(3, 640), torch.empty(640), 640, 3, 0.5, BLOCK=1024, enable_fp_fusion=False)
    assert not list(kernel.kept.values())[-1].kernel.metadata.enable_fp_fusion


def forget_keys(function: JITFunction) -> None:
    """Forget the cache keys of a function and of all that it calls, as in a new process."""
    function.hash, function.used_global_vals = None, {}
    for called in launch.called_functions(function):
        forget_keys(called)


def test_cache_keys_do_not_depend_on_the_order_of_launches() -> None:
    """Both kernels call keep_tile, whose number of Philox rounds is a global constant."""
    kernels = [lora_down.lora_down_kernel, lora_grads.lora_grad_A_kernel]
    keys = []
    for ordered in (kernels, kernels[::-1]):
        for kernel in kernels:
            forget_keys(kernel.kernel)
        for kernel in ordered:
            Launchable(kernel.kernel).settle_cache_key()
        keys.append([kernel.kernel.hash for kernel in kernels])
    assert keys[0] == keys[1]
    assert all(keys[0])
