"""A kernel of sm_90a on a fake device of that capability: tensor map, TMA and wgmma, launched through the driver."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

PROGRAM = """
import ctypes, os, re
from pathlib import Path
from tests.support import fake_cuda
fake_cuda.activate(capability="9.0")
import torch
from tests.support.cuda_host.build import emit_ptx, only_kernels
from tests.support.fake_cuda import host_ops
host_ops.install()

M, N, K, STAGES = 128, 64, 256, 3
SUCCESS, BF16, SWIZZLE_128B, SHARED_LIMIT = 0, 9, 3, 8
ptx = only_kernels(emit_ptx(Path("tests/cuda/emulator/hopper.cu")), "product_kernelI13__nv_bfloat16Li64")
name = re.search(r"\\.entry (\\w+)", ptx)[1].encode()
folder = Path(os.environ["FAKE_CUDA_FOLDER"])
driver, runtime = ctypes.CDLL(folder / "libcuda.so.1"), ctypes.CDLL(folder / "libcudart.so.13")

a, b = torch.randn(M, K).bfloat16().cuda(), torch.randn(N, K).bfloat16().cuda()
y = torch.full((M, N), torch.nan).cuda()
encode, found = ctypes.c_void_p(), ctypes.c_int()
entry, flags = runtime.cudaGetDriverEntryPointByVersion, ctypes.c_ulonglong(0)
assert entry(b"cuTensorMapEncodeTiled", ctypes.byref(encode), 12000, flags, ctypes.byref(found)) == SUCCESS
memory = ctypes.create_string_buffer(256)
tensor_map = ctypes.c_void_p(-(-ctypes.addressof(memory) // 128) * 128)
number, address = ctypes.c_int, ctypes.c_void_p
signature = ctypes.CFUNCTYPE(number, address, *[number] * 2, *[address] * 5, *[number] * 4)
sizes, strides = (ctypes.c_uint64 * 2)(K, N), (ctypes.c_uint64 * 1)(K * 2)
box, steps = (ctypes.c_uint32 * 2)(64, N), (ctypes.c_uint32 * 2)(1, 1)
layout = (b.data_ptr(), sizes, strides, box, steps, 0, SWIZZLE_128B, 0, 0)
assert signature(encode.value)(tensor_map, BF16, 2, *layout) == SUCCESS

module, function = ctypes.c_void_p(), ctypes.c_void_p()
assert driver.cuModuleLoadData(ctypes.byref(module), ptx.encode()) == SUCCESS
assert driver.cuModuleGetFunction(ctypes.byref(function), module, name) == SUCCESS
shared = STAGES * (N * 128 + 1024) + 1024
assert driver.cuFuncSetAttribute(function, SHARED_LIMIT, shared) == SUCCESS
values = (ctypes.c_void_p(a.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_int(K))
parameters = (ctypes.c_void_p * 4)(tensor_map, *[ctypes.addressof(value) for value in values])
assert driver.cuLaunchKernel(function, 1, 1, 1, 256, 1, 1, shared, None, parameters, None) == SUCCESS
torch.cuda.synchronize()
error = (y.cpu().double() - a.cpu().double() @ b.cpu().double().T).abs().max()
assert error < 1e-3, error
"""


SCHEDULES = ("eager",)
"""The program has a device of its own."""


def test_kernel_with_a_tensor_map() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
