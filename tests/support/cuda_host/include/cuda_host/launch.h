// Kernel launches: cudaLaunchKernelEx runs the kernel's own C++, or the PTX that was translated for it.
#pragma once

#include <cuda_runtime.h>

#include <cstring>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "machine.h"

namespace cuda_host {

// A kernel that ptx/translate.py made of PTX text. Parameters arrive packed as the driver packs them.
struct PtxKernel {
    const char* name;
    void (*body)(const uint8_t* parameters);
    size_t parameter_bytes;
    size_t static_shared_bytes;
};

// Every translated kernel linked into this library. Where there is one, launches run these instead of the C++ source.
std::vector<PtxKernel>& ptx_kernels();

struct RegisterPtxKernel {
    explicit RegisterPtxKernel(const PtxKernel& kernel) { ptx_kernels().push_back(kernel); }
};

// The mangled name of a kernel, which nvcc and g++ agree on; empty for a kernel with internal linkage.
std::string kernel_name(const void* kernel);

// Checks the configuration as the driver does, logs the launch, runs it. Errors also stay for cudaGetLastError.
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* argument);
cudaError_t launch_ptx(const cudaLaunchConfig_t& config, const PtxKernel& kernel, const void* function,
                       const uint8_t* parameters);
const PtxKernel* find_ptx_kernel(const std::string& name);

template <class T>
void pack_parameter(std::vector<uint8_t>& packed, const T& value) {
    const size_t offset = (packed.size() + alignof(T) - 1) / alignof(T) * alignof(T);
    packed.resize(offset + sizeof(T));
    memcpy(packed.data() + offset, &value, sizeof(T));
}

template <class... Expected, class... Actual>
cudaError_t launch_kernel(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... actual) {
    std::tuple<Expected...> arguments{static_cast<Expected>(std::forward<Actual>(actual))...};
    const void* function = reinterpret_cast<const void*>(kernel);
    if (!ptx_kernels().empty()) {
        const PtxKernel* translated = find_ptx_kernel(kernel_name(function));
        if (!translated) {
            machine().error = "no PTX was translated for kernel '" + kernel_name(function) + "'";
            return cudaErrorInvalidDeviceFunction;
        }
        std::vector<uint8_t> packed;
        std::apply([&](const auto&... each) { (pack_parameter(packed, each), ...); }, arguments);
        return launch_ptx(*config, *translated, function, packed.data());
    }
    auto call = [&] { std::apply(kernel, arguments); };
    return launch(*config, function, [](void* c) { (*static_cast<decltype(call)*>(c))(); }, &call);
}

}  // namespace cuda_host

#define cudaLaunchKernelEx ::cuda_host::launch_kernel
