// Kernel launches without <<<>>>: plain C++ that host compilers accept, with the error of every launch returned.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

namespace qlora {

struct LaunchShape {
    dim3 grid, block;
    size_t dynamic_shared_bytes = 0;
    cudaStream_t stream = nullptr;
};

template <class... Parameters, class... Arguments>
cudaError_t launch(const LaunchShape& shape, void (*kernel)(Parameters...), Arguments&&... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = shape.grid;
    config.blockDim = shape.block;
    config.dynamicSmemBytes = shape.dynamic_shared_bytes;
    config.stream = shape.stream;
    return cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
}

template <class Integer>
constexpr __host__ __device__ Integer ceil_div(Integer a, Integer b) {
    return (a + b - 1) / b;
}

}  // namespace qlora
