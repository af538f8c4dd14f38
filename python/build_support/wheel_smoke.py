"""A test that runs in an environment with an installed wheel: imports it, runs the CPU kernels, checks the CUDA
library.

Arguments: the architectures that the CUDA library must be built for; none for a wheel without a CUDA library.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import torch

import qlora_kernels as qk
from qlora_kernels.ops.registry import library_facts

if not __debug__:
    raise RuntimeError("wheel_smoke: assert statements must be executed, got python -O; unset PYTHONOPTIMIZE")


def check_cpu() -> None:
    """Compare codec, linear and LoRA training on the compiled kernels with the reference."""
    torch.manual_seed(0)
    w, x = torch.randn(96, 128), torch.randn(5, 128, requires_grad=True)
    lora_A, lora_B = torch.randn(4, 128, requires_grad=True), torch.randn(96, 4, requires_grad=True)
    results = []
    for backend in ("cpu", "reference"):
        with qk.use_backend(backend):
            packed, state = qk.quantize_nf4(w)
            y = qk.linear_nf4_lora(x, packed, state, lora_A, lora_B, scaling=0.5)
            gradients = torch.autograd.grad(y.square().sum(), (x, lora_A, lora_B))
            results.append((packed, qk.dequantize_nf4(packed, state), y, *gradients))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(results[0][0], results[1][0])


def check_cuda(archs: list[str]) -> None:
    """Check the CUDA library's build record without loading it, and load it under a CUDA torch of its major version."""
    reason = qk.backends()["cuda"]
    if not archs:
        assert "not built" in reason, reason
        return
    built = library_facts("cuda")["kernels built for"]
    names, _, toolkit = built.partition(" by CUDA ")
    assert [f"sm_{arch.removesuffix('+PTX')}" for arch in names.split(";")] == archs, built
    if (torch.version.cuda or "").partition(".")[0] == toolkit.partition(".")[0]:
        assert torch._C._dispatch_has_kernel_for_dispatch_key("qlora_kernels_C::cuda_dequantize_nf4", "CUDA")
        assert torch.ops.qlora_kernels_C.cuda_has_current_stream()
    else:
        assert "this torch is built with" in reason, reason
        assert names in reason, reason


if __name__ == "__main__":
    assert Path(qk.__file__).is_relative_to(sys.prefix), f"{qk.__file__} is not what was installed into {sys.prefix}"
    check_cpu()
    check_cuda(sys.argv[1:])
    print(f"Python {platform.python_version()}, torch {torch.__version__}: {', '.join(sys.argv[1:]) or 'CPU'} ok")
