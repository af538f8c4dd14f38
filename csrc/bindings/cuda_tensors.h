// Conversion of CUDA tensors to launcher arguments. The library can be loaded by a torch without CUDA, so that its ops
// can be listed everywhere.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <stdexcept>
#include <string>

#include "arguments.h"
#include "launchers.h"

namespace qlora::cuda_bindings {

using bindings::ceil_div;
using bindings::OptionalTensor;
using bindings::ScalarType;
using bindings::Tensor;
using torch::stable::accelerator::DeviceGuard;

// Returns torch's current stream on the device of `tensor`. Raises if torch does not provide one. (cuda_platform.cpp)
cudaStream_t current_stream(const Tensor& tensor);

// Raises for a launcher's error, with the fix if the binaries are for other GPUs. what: the op and its action. The
// runtime's own record of the error is cleared, because torch reads it after its next launch and would report it for
// that launch.
inline void check(cudaError_t error, const std::string& what) {
    if (error == cudaSuccess) return;
    cudaGetLastError();
    if (error == cudaErrorNoKernelImageForDevice) {
        int device = 0, major = 0, minor = 0;
        cudaGetDevice(&device);
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
        const std::string arch = std::to_string(major) + std::to_string(minor);
        throw std::runtime_error(what + ": the CUDA kernels were built for " QLORA_BUILT_ARCHS ", this GPU is sm_" +
                                 arch + "; rebuild with QLORA_CUDA_ARCHS=" + arch);
    }
    throw std::runtime_error(what + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
}

// The arguments of one op, all on one device.
class CudaArguments : public bindings::Arguments<bindings::Device::kCuda> {
  public:
    using Arguments::Arguments;

    // A size that the launchers take as int.
    int to_int(int64_t size, const char* name) const {
        bindings::require(size >= 0 && size <= INT32_MAX, op_, ": ", name, " must fit 32 bits, got ", size);
        return static_cast<int>(size);
    }
};

}  // namespace qlora::cuda_bindings
