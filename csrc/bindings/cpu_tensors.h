// Tensors to what the CPU kernels take.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "kernels.h"

namespace qlora::bindings {

class CpuArguments : public Arguments<Device::kCpu> {
  public:
    using Arguments::Arguments;

    DType float_type(const Tensor& tensor, const char* name) const {
        switch (tensor.scalar_type()) {
            case ScalarType::Float:
                return DType::kFloat32;
            case ScalarType::BFloat16:
                return DType::kBfloat16;
            case ScalarType::Half:
                return DType::kFloat16;
            default:
                fail(op_, ": ", name, " must be float32, bfloat16 or float16");
        }
    }

    AnyFloat any_float(const Tensor& tensor, const char* name, int64_t numel) const {
        const DType dtype = float_type(tensor, name);
        check_contiguous(tensor, name, numel);
        return {address(tensor, name, numel, size_of(dtype)), dtype};
    }

    AnyFloat any_float(const OptionalTensor& tensor, const char* name, int64_t numel) const {
        return tensor.has_value() ? any_float(*tensor, name, numel) : AnyFloat{nullptr, DType::kFloat32};
    }

    const void* floats(const Tensor& tensor, const char* name, int64_t numel, DType dtype) const {
        const AnyFloat elements = any_float(tensor, name, numel);
        require(elements.dtype == dtype, op_, ": ", name, " must have the dtype of the op's other activations");
        return elements.data;
    }

    template <class T>
    const T& only(const OptionalTensor& tensor, const char* name) const {
        given(tensor, name);
        return *data<T>(*tensor, name, 1);
    }

    NF4Weight weight(const Tensor& packed, const OptionalTensor& absmax, const OptionalTensor& absmax_q,
                     const OptionalTensor& absmax_scale, const OptionalTensor& absmax_offset, int64_t blocksize,
                     int64_t N, int64_t K) const {
        NF4Weight weight{};
        weight.block_shift = block_shift(blocksize);
        weight.N = N;
        weight.K = K;
        const int64_t numel = product(N, K, "the weight"), blocks = ceil_div(numel, blocksize);
        weight.packed = data<uint8_t>(packed, "packed", ceil_div(numel, 2));
        if (absmax.has_value()) {
            weight.absmax = data<float>(*absmax, "absmax", blocks);
            return weight;
        }
        given(absmax_q, "absmax, or absmax_q");
        given(absmax_scale, "absmax_scale");
        weight.absmax_q = data<uint8_t>(*absmax_q, "absmax_q", blocks);
        weight.absmax_scale = data<float>(*absmax_scale, "absmax_scale", ceil_div(blocks, kNestedBlocksize));
        weight.absmax_offset = only<float>(absmax_offset, "absmax_offset");
        return weight;
    }

  private:
    static constexpr int64_t size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

    void given(const OptionalTensor& tensor, const char* name) const {
        require(tensor.has_value(), op_, ": ", name, " must be given");
    }
};

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
