// Launches: the driver's checks, the log entry, and the choice between source and translated PTX.
#include "cuda_host/launch.h"

#include <dlfcn.h>

#include "runtime_log.h"

namespace cuda_host {

std::vector<PtxKernel>& ptx_kernels() {
    static std::vector<PtxKernel> kernels;
    return kernels;
}

const PtxKernel* find_ptx_kernel(const std::string& name) {
    for (const PtxKernel& kernel : ptx_kernels()) {
        if (name == kernel.name) return &kernel;
    }
    return nullptr;
}

std::string kernel_name(const void* kernel) {
    Dl_info info;
    return kernel && dladdr(kernel, &info) && info.dli_sname && info.dli_saddr == kernel ? info.dli_sname : "";
}

namespace {

cudaError_t refuse(const std::string& reason) {
    machine().error = reason;
    return runtime_log().finish(cudaErrorInvalidConfiguration);
}

cudaError_t checked_launch(const cudaLaunchConfig_t& config, const std::string& name, const void* function,
                           size_t static_shared, void (*body)(void*), void* argument) {
    const dim3 grid = config.gridDim, block = config.blockDim;
    runtime_log().record("launch",
                         {grid.x, grid.y, grid.z, block.x, block.y, block.z, long(config.dynamicSmemBytes),
                          runtime_log().handle(config.stream)},
                         name);
    const cudaError_t injected = runtime_log().injected("launch");
    if (injected != cudaSuccess) return runtime_log().finish(injected);
    const size_t threads = size_t(block.x) * block.y * block.z, shared = config.dynamicSmemBytes;
    if (threads < 1 || threads > kMaxThreads) {
        return refuse(name + ": a block must have 1 to 1024 threads, got " + std::to_string(threads));
    }
    if (!grid.x || !grid.y || !grid.z || grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) {
        return refuse(name + ": grid out of range");
    }
    if (shared + static_shared > kMaxSharedBytes) {
        return refuse(name + ": " + std::to_string(shared + static_shared) +
                      " bytes of shared memory, no GPU has that");
    }
    if (shared > 48 * 1024 && runtime_log().allowed_dynamic_shared(function) < shared) {
        return refuse(name + ": over 48 KiB of dynamic shared memory without cudaFuncSetAttribute");
    }
    machine().run_grid(grid, block, shared + static_shared, body, argument);
    return runtime_log().finish(machine().error.empty() ? cudaSuccess : cudaErrorLaunchFailure);
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*), void* argument) {
    return checked_launch(config, kernel_name(kernel), kernel, 0, body, argument);
}

cudaError_t launch_ptx(const cudaLaunchConfig_t& config, const PtxKernel& kernel, const void* function,
                       const uint8_t* parameters) {
    auto call = [&] { kernel.body(parameters); };
    return checked_launch(
        config, kernel.name, function, kernel.static_shared_bytes,
        [](void* c) { (*static_cast<decltype(call)*>(c))(); }, &call);
}

}  // namespace cuda_host
