// CUDA tensors to what the launchers take. The library loads into a torch without CUDA, so that its ops can be listed
// anywhere.
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

// torch's current stream on the device of `tensor`. Raises where torch offers none. (cuda_platform.cpp)
cudaStream_t current_stream(const Tensor& tensor);

// Raises for a launcher's error, with the fix where the binaries are for other GPUs. what: the op, and what it was
// doing. The runtime's own record of the error is cleared: torch looks there after its next launch and would blame that
// one.
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

// The arguments of one op, all on the device of one of them.
class CudaArguments : public bindings::Arguments<bindings::Device::kCuda> {
  public:
    using Arguments::Arguments;

    // qlora::FloatType.
    int type_of(const Tensor& tensor, const char* name) const {
        switch (tensor.scalar_type()) {
            case ScalarType::Float:
                return 0;
            case ScalarType::BFloat16:
                return 1;
            case ScalarType::Half:
                return 2;
            default:
                bindings::fail(op_, ": ", name, " must be float32, bfloat16 or float16");
        }
    }
    int type_of(const OptionalTensor& tensor, const char* name) const { return tensor ? type_of(*tensor, name) : 0; }

    const void* floats(const Tensor& tensor, const char* name, int64_t numel) const {
        const int64_t size = type_of(tensor, name) == 0 ? 4 : 2;
        check_contiguous(tensor, name, numel);
        return address(tensor, name, numel, size);
    }
    const void* floats(const OptionalTensor& tensor, const char* name, int64_t numel) const {
        return tensor ? floats(*tensor, name, numel) : nullptr;
    }
    void* written_floats(const Tensor& tensor, const char* name, int64_t numel) const {
        floats(tensor, name, numel);
        return tensor.mutable_data_ptr();
    }

    // Sizes that the launchers take as int.
    int to_int(int64_t size, const char* name) const {
        bindings::require(size >= 0 && size <= INT32_MAX, op_, ": ", name, " must fit 32 bits, got ", size);
        return static_cast<int>(size);
    }
};

// An NF4 weight of `numel` elements.
struct Weight {
    const uint8_t* packed;
    const float* absmax;
    const uint8_t* absmax_q;
    const float* absmax_scale;
    const float* absmax_offset;
    int block_shift;

    Weight(const CudaArguments& arguments, const Tensor& packed_tensor, const OptionalTensor& absmax_tensor,
           const OptionalTensor& q, const OptionalTensor& scale, const OptionalTensor& offset, int64_t blocksize,
           int64_t numel)
        : block_shift(arguments.block_shift(blocksize)) {
        const int64_t blocks = ceil_div(numel, blocksize);
        bindings::require(absmax_tensor.has_value() != (q && scale && offset),
                          "absmax, or absmax_q, absmax_scale and absmax_offset, must be given");
        packed = arguments.data<uint8_t>(packed_tensor, "packed", ceil_div(numel, 2));
        absmax = arguments.data<float>(absmax_tensor, "absmax", blocks);
        absmax_q = arguments.data<uint8_t>(q, "absmax_q", blocks);
        absmax_scale = arguments.data<float>(scale, "absmax_scale", ceil_div(blocks, 256));
        absmax_offset = arguments.data<float>(offset, "absmax_offset", 1);
    }
};

}  // namespace qlora::cuda_bindings
