// The library's interface to worker.py: schedule, memory with guarded ends, errors, log, failures to inject.
#include <cstdlib>
#include <cstring>
#include <map>

#include "cuda_host/launch.h"
#include "runtime_log.h"

namespace cuda_host {
std::map<void*, size_t>& live_allocations();
std::map<int, int>& device_attributes();
}  // namespace cuda_host

namespace {

using cuda_host::machine;
using cuda_host::runtime_log;

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuard = 0;  // AddressSanitizer's own red zones are exact
#else
constexpr size_t kGuard = 256;
#endif
constexpr unsigned char kGuardByte = 0xA5;

std::map<void*, size_t>& arguments() {
    static std::map<void*, size_t> live;
    return live;
}

}  // namespace

extern "C" {

void cuda_host_schedule(uint64_t seed, int order) {
    machine().seed = seed;
    machine().order = cuda_host::Order(order);
}

const char* cuda_host_error() { return machine().error.c_str(); }
void cuda_host_clear_error() {
    machine().error.clear();
    cudaGetLastError();
}

// Memory for one argument, 256-byte aligned as cudaMalloc's, with guard bytes on both sides.
void* cuda_host_allocate(size_t bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, bytes + 2 * kGuard + (bytes == 0))) return nullptr;
    memset(memory, kGuardByte, bytes + 2 * kGuard);
    void* pointer = static_cast<char*>(memory) + kGuard;
    arguments()[pointer] = bytes;
    return pointer;
}

// Frees it. Returns -1 where a guard byte before it was overwritten, 1 where one after it was, else 0.
int cuda_host_release(void* pointer) {
    const size_t bytes = arguments()[pointer];
    const auto* start = static_cast<unsigned char*>(pointer);
    int verdict = 0;
    for (size_t i = 1; i <= kGuard; i++) {
        if (start[bytes + i - 1] != kGuardByte) verdict = 1;
        if (*(start - i) != kGuardByte) verdict = -1;
    }
    arguments().erase(pointer);
    free(static_cast<char*>(pointer) - kGuard);
    return verdict;
}

int cuda_host_log_size() { return int(runtime_log().lines.size()); }
const char* cuda_host_log_line(int index) { return runtime_log().lines[index].c_str(); }
void cuda_host_clear_log() { runtime_log().lines.clear(); }
void cuda_host_fail(const char* call, int error, int after) { runtime_log().inject(call, cudaError_t(error), after); }
void cuda_host_set_attribute(int attribute, int value) { cuda_host::device_attributes()[attribute] = value; }
int cuda_host_live_allocations() { return int(cuda_host::live_allocations().size()); }

int cuda_host_launch_ptx(const char* name, const unsigned* grid, const unsigned* block, unsigned shared_bytes,
                         const uint8_t* parameters) {
    const cuda_host::PtxKernel* kernel = cuda_host::find_ptx_kernel(name);
    if (!kernel) return cudaErrorInvalidDeviceFunction;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(grid[0], grid[1], grid[2]);
    config.blockDim = dim3(block[0], block[1], block[2]);
    config.dynamicSmemBytes = shared_bytes;
    // A launch by name stands for a loader that has asked for the shared memory it needs.
    runtime_log().allow_dynamic_shared(kernel, shared_bytes);
    return cuda_host::launch_ptx(config, *kernel, kernel, parameters);
}
}
