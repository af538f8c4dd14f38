// A kernel library (plugin.h): PTX, nvcc's of csrc/cuda or Triton's of one kernel, translated to C++ and linked with
// this file and the emulator's runtime. build.py writes the table of parameters.
#include "kernels_of_project.h"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <string_view>
#include <vector>

#include "plugin.h"

extern "C" {
int cuda_host_launch_ptx(const char* kernel, const unsigned* grid, const unsigned* block, unsigned shared_bytes,
                         const uint8_t* parameters);
const char* cuda_host_error();
void cuda_host_clear_error();
}

namespace {

constexpr int kIllegalAddress = 700, kLaunchFailed = 719;  // CUresult
constexpr size_t kPadding = 16;                            // translated code reads whole words

const KernelParameters* find(std::string_view kernel) {
    for (const KernelParameters& known : kernel_parameters())
        if (known.kernel == kernel) return &known;
    return nullptr;
}

}  // namespace

extern "C" int fake_cuda_kernel_parameters(const char* kernel, unsigned* offsets, unsigned* bytes, int capacity) {
    const KernelParameters* const known = find(kernel);
    const int count = known ? static_cast<int>(known->parameters.size()) : -1;
    if (count > capacity) return -1;
    for (int i = 0; i < count; i++) {
        offsets[i] = known->parameters[i].offset;
        bytes[i] = known->parameters[i].bytes;
    }
    return count;
}

extern "C" int fake_cuda_kernel_launch(const fake_cuda_launch* launch) {
    static std::mutex one_grid_at_a_time;
    const std::lock_guard guard(one_grid_at_a_time);
    const KernelParameters& known = *find(launch->kernel);
    size_t size = kPadding;
    for (const auto& parameter : known.parameters)
        size = std::max<size_t>(size, parameter.offset + parameter.bytes + kPadding);
    std::vector<uint64_t> packed(size / sizeof(uint64_t) + 1);
    for (size_t i = 0; i < known.parameters.size(); i++) {
        const auto& parameter = known.parameters[i];
        memcpy(reinterpret_cast<char*>(packed.data()) + parameter.offset, launch->parameters[i], parameter.bytes);
    }
    // Another device's memory among the pointers: a device guard is missing, or operands are mixed up. A struct's
    // padding has any bytes, which may look like an address.
    for (const auto& parameter : known.parameters) {
        for (const unsigned offset : parameter.words) {
            const int owner = fake_cuda_owner(reinterpret_cast<const void*>(packed[offset / sizeof(uint64_t)]));
            if (owner < 0 || owner == launch->device) continue;
            fprintf(stderr, "fake_cuda: %s runs on device %d with memory of device %d\n", launch->kernel,
                    launch->device, owner);
            return kIllegalAddress;
        }
    }
    cuda_host_clear_error();
    const int result = cuda_host_launch_ptx(launch->kernel, launch->grid, launch->block, launch->shared_bytes,
                                            reinterpret_cast<const uint8_t*>(packed.data()));
    if (*cuda_host_error() == '\0') return result;
    fprintf(stderr, "fake_cuda: %s\n", cuda_host_error());
    return kLaunchFailed;
}
