// CUDA tensors to what the launchers take. The public ops have checked shapes and values; these checks guard the
// pointers. The library loads into a torch without CUDA, so that its ops can be listed anywhere.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <bit>
#include <optional>
#include <stdexcept>
#include <string>

#include "launchers.h"

namespace qlora::cuda_bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;
using OptionalTensor = std::optional<Tensor>;

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

// qlora::FloatType.
inline int type_of(const Tensor& tensor, const char* name) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return 0;
        case ScalarType::BFloat16:
            return 1;
        case ScalarType::Half:
            return 2;
        default:
            STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
    }
}
inline int type_of(const OptionalTensor& tensor, const char* name) { return tensor ? type_of(*tensor, name) : 0; }

inline const Tensor& checked(const Tensor& tensor, const char* name, int64_t numel) {
    STD_TORCH_CHECK(tensor.is_cuda() && tensor.is_contiguous(), name, " must be a contiguous CUDA tensor");
    STD_TORCH_CHECK(tensor.numel() == numel, name, " must have ", numel, " elements, got ", tensor.numel());
    return tensor;
}

inline const void* data_of(const Tensor& tensor, const char* name, int64_t numel) {
    return checked(tensor, name, numel).const_data_ptr();
}
inline const void* data_of(const OptionalTensor& tensor, const char* name, int64_t numel) {
    return tensor ? data_of(*tensor, name, numel) : nullptr;
}
template <class T>
const T* data_of(const Tensor& tensor, const char* name, ScalarType dtype, int64_t numel) {
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
    return static_cast<const T*>(data_of(tensor, name, numel));
}
template <class T>
const T* data_of(const OptionalTensor& tensor, const char* name, ScalarType dtype, int64_t numel) {
    return tensor ? data_of<T>(*tensor, name, dtype, numel) : nullptr;
}
template <class T>
T* written(Tensor& tensor, const char* name, ScalarType dtype, int64_t numel) {
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, " has the wrong dtype");
    return static_cast<T*>(checked(tensor, name, numel).mutable_data_ptr());
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int block_shift_of(int64_t blocksize) {
    STD_TORCH_CHECK(blocksize >= 32 && blocksize <= 4096 && std::has_single_bit(static_cast<uint64_t>(blocksize)),
                    "blocksize must be a power of two from 32 to 4096, got ", blocksize);
    return std::countr_zero(static_cast<uint64_t>(blocksize));
}

// An NF4 weight of `numel` elements.
struct Weight {
    const uint8_t* packed;
    const float* absmax;
    const uint8_t* absmax_q;
    const float* absmax_scale;
    const float* absmax_offset;
    int block_shift;

    Weight(const Tensor& packed_tensor, const OptionalTensor& absmax_tensor, const OptionalTensor& q,
           const OptionalTensor& scale, const OptionalTensor& offset, int64_t blocksize, int64_t numel)
        : block_shift(block_shift_of(blocksize)) {
        const int64_t blocks = ceil_div(numel, blocksize);
        STD_TORCH_CHECK(absmax_tensor.has_value() != (q && scale && offset),
                        "absmax, or absmax_q, absmax_scale and absmax_offset, must be given");
        packed = data_of<uint8_t>(packed_tensor, "packed", ScalarType::Byte, ceil_div(numel, 2));
        absmax = data_of<float>(absmax_tensor, "absmax", ScalarType::Float, blocks);
        absmax_q = data_of<uint8_t>(q, "absmax_q", ScalarType::Byte, blocks);
        absmax_scale = data_of<float>(scale, "absmax_scale", ScalarType::Float, ceil_div(blocks, 256));
        absmax_offset = data_of<float>(offset, "absmax_offset", ScalarType::Float, 1);
    }
};

}  // namespace qlora::cuda_bindings
