// What the runtime's files share. The runtime keeps a device and an error for each thread and calls the driver.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "plugin.h"

#define FAKE_CUDA_API extern "C" __attribute__((visibility("default")))

namespace fake_cuda {

// Keeps the thread's error for cudaGetLastError and returns it.
cudaError_t finish(int code);

// The context of the thread's current device becomes the driver's current one.
CUresult enter_device();

// Notes a call. Not 0: the failure that a test has injected, or that the driver is older than this runtime.
cudaError_t begin(const char* call, const void* return_address);

}  // namespace fake_cuda

// The first statement of every entry point that a failure can be injected into.
#define FAKE_CUDA_BEGIN() \
    if (const cudaError_t failed = fake_cuda::begin(__func__, __builtin_return_address(0))) return failed

// An entry point that calls the driver on the current device.
#define FAKE_CUDA_DRIVER(call)                                                \
    do {                                                                      \
        FAKE_CUDA_BEGIN();                                                    \
        const CUresult entered = fake_cuda::enter_device();                   \
        return fake_cuda::finish(entered != CUDA_SUCCESS ? entered : (call)); \
    } while (0)
