// Tensors to what the kernels take. The public ops have checked shapes and values; these checks guard the pointers.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <bit>
#include <optional>

#include "kernels.h"

namespace qlora::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& tensor, const char* name) {
    switch (tensor.scalar_type()) {
        case ScalarType::Float:
            return DType::kFloat32;
        case ScalarType::BFloat16:
            return DType::kBfloat16;
        case ScalarType::Half:
            return DType::kFloat16;
        default:
            STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
    }
}

inline const Tensor& checked(const Tensor& tensor, const char* name, int64_t numel) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), name, " must be a contiguous CPU tensor");
    STD_TORCH_CHECK(tensor.numel() == numel, name, " must have ", numel, " elements, got ", tensor.numel());
    return tensor;
}

template <class T>
const T* data_of(const OptionalTensor& tensor, const char* name, ScalarType dtype, int64_t numel) {
    STD_TORCH_CHECK(tensor.has_value(), name, " must be given");
    STD_TORCH_CHECK(tensor->scalar_type() == dtype, name, " has the wrong dtype");
    return static_cast<const T*>(checked(*tensor, name, numel).const_data_ptr());
}

inline AnyFloat any_float(const Tensor& tensor, const char* name, int64_t numel) {
    return {checked(tensor, name, numel).const_data_ptr(), dtype_of(tensor, name)};
}

inline AnyFloat any_float(const OptionalTensor& tensor, const char* name, int64_t numel) {
    if (!tensor.has_value()) return {nullptr, DType::kFloat32};
    return any_float(*tensor, name, numel);
}

inline int block_shift_of(int64_t blocksize) {
    STD_TORCH_CHECK(blocksize >= 32 && blocksize <= 4096 && std::has_single_bit(static_cast<uint64_t>(blocksize)),
                    "blocksize must be a power of two from 32 to 4096, got ", blocksize);
    return std::countr_zero(static_cast<uint64_t>(blocksize));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline NF4Weight weight_of(const Tensor& packed, const OptionalTensor& absmax, const OptionalTensor& absmax_q,
                           const OptionalTensor& absmax_scale, const OptionalTensor& absmax_offset, int64_t blocksize,
                           int64_t N, int64_t K) {
    NF4Weight weight{};
    const int64_t blocks = ceil_div(N * K, blocksize);
    weight.block_shift = block_shift_of(blocksize);
    weight.N = N;
    weight.K = K;
    weight.packed = data_of<uint8_t>(packed, "packed", ScalarType::Byte, ceil_div(N * K, 2));
    if (absmax.has_value()) {
        weight.absmax = data_of<float>(absmax, "absmax", ScalarType::Float, blocks);
        return weight;
    }
    weight.absmax_q = data_of<uint8_t>(absmax_q, "absmax_q", ScalarType::Byte, blocks);
    weight.absmax_scale =
        data_of<float>(absmax_scale, "absmax_scale", ScalarType::Float, ceil_div(blocks, kNestedBlocksize));
    weight.absmax_offset = *data_of<float>(absmax_offset, "absmax_offset", ScalarType::Float, 1);
    return weight;
}

// A fresh contiguous CPU tensor. On the CPU this entry goes straight to the allocator; torch::stable::new_empty goes
// through the dispatcher, which takes as long as a small kernel.
template <size_t kDims>
Tensor empty(const int64_t (&sizes)[kDims], ScalarType dtype) {
    int64_t strides[kDims];
    int64_t stride = 1;
    for (size_t dim = kDims; dim-- > 0; stride *= sizes[dim]) strides[dim] = stride;
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        kDims, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
        aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

}  // namespace qlora::bindings
