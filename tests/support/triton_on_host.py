"""Runs kernels compiled by Triton: launches are compiled to PTX, translated to C++ and executed on the CPU.

    with executing_ptx():
        y = linear_nf4(x, ...)          # backends.triton launchers, on CPU tensors

This tests the compiler's output, inline PTX included, while the interpreter tests only its input. sm_100 and later use
instructions that the translator does not support (tcgen05) and are covered only by the compile report.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import Tensor

from python.kernels_report.mock_gpu import Compiled, compiling_for
from qlora_kernels.backends.triton.planner import assume_capability
from tests.support import cuda_host

CAPABILITIES = (80, 90)
"""Compute capabilities for which kernels can be compiled and run: without and with wgmma."""

OUTPUTS = {
    "dequantize_nf4_kernel": {"p_w"},
    "quantize_nf4_kernel": {"p_packed", "p_absmax"},
    "quantize_absmax_kernel": {"p_absmax_q", "p_absmax_scale", "p_absmax_offset"},
    "linear_nf4_kernel": {"p_y"},
    "linear_nf4_small_m_kernel": {"p_y"},
    "linear_nf4_grad_x_kernel": {"p_grad_x"},
    "lora_down_kernel": {"p_s"},
    "lora_up_kernel": {"p_out"},
    "lora_ds_grad_B_kernel": {"p_ds", "p_grad_B"},
    "lora_grad_A_kernel": {"p_grad_A"},
    "merge_lora_kernel": {"p_w"},
    "sum_partials_kernel": {"p_out"},
    "rms_norm_kernel": {"p_s", "p_y", "p_scale"},
    "rms_norm_backward_kernel": {"p_grad_x", "p_parts"},
    "rope_kernel": {"p_out"},
    "glu_kernel": {"p_y"},
    "glu_backward_kernel": {"p_grad_gate", "p_grad_up"},
    "multi_lora_down_kernel": {"p_s"},
    "multi_lora_up_kernel": {"p_out"},
    "multi_lora_ds_grad_B_kernel": {"p_ds", "p_grad_B"},
    "multi_lora_grad_A_kernel": {"p_grad_A"},
    "cross_entropy_rows_kernel": {"p_losses", "p_log_sums", "p_out"},
}
"""Kernel -> the pointers that it writes; a write through any other pointer fails the launch."""


@contextmanager
def executing_ptx(mode: str = "plain", capability: int = 80) -> Iterator[list[Compiled]]:
    """Compile Triton's launches inside the block and run them on the host.

    mode: "plain", "asan" or "tsan".   capability: one of CAPABILITIES.
    """

    def execute(launch: Compiled) -> None:
        module = cuda_host.load_ptx(launch.kernel.asm["ptx"], mode, f"{launch.name}.ptx")
        assert not module.unsupported, f"{launch.name}: {module.unsupported}"
        outputs = OUTPUTS[launch.name] | ({"p_copy"} if launch.constants.get("COPY") else set())
        arguments = [
            cuda_host.out(value) if name in outputs else value.detach() if isinstance(value, Tensor) else value
            for name, value in _same_tensors(launch.runtime_arguments, outputs).items()
        ]
        metadata = launch.kernel.metadata
        block = (32 * metadata.num_warps, 1, 1)
        module.launch(metadata.name, launch.grid, block, metadata.shared, arguments)

    with ExitStack() as stack:
        stack.enter_context(assume_capability(capability))
        yield stack.enter_context(compiling_for(capability, execute))


def _same_tensors(arguments: dict[str, object], outputs: set[str]) -> dict[str, object]:
    """Return the arguments with one object per address, because the emulator copies every object to separate memory."""
    known: dict[tuple[int, int], Tensor] = {}
    merged: dict[str, object] = {}
    for name in sorted(arguments, key=lambda n: n not in outputs):
        value = arguments[name]
        if isinstance(value, Tensor):
            value = value if value.is_contiguous() else _memory_of_rows(value)
            value = known.setdefault((value.data_ptr(), value.numel() * value.element_size()), value)
        merged[name] = value
    return {name: merged[name] for name in arguments}


def _memory_of_rows(matrix: Tensor) -> Tensor:
    """Return the memory from the first to the last element of a matrix whose rows have a stride."""
    rows, columns = matrix.shape
    assert matrix.stride(1) == 1
    return matrix.as_strided(((rows - 1) * matrix.stride(0) + columns,), (1,), matrix.storage_offset())
