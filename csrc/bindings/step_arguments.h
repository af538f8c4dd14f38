// The checks of an optimizer's parameters and gradients, which are processed as flat arrays in memory order.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "arguments.h"

namespace qlora::bindings {

// A class on top of CpuArguments or CudaArguments.
template <class DeviceArguments>
class StepArguments : public DeviceArguments {
  public:
    using DeviceArguments::DeviceArguments;

    // Raises unless `param` and `grad` are floats of one dtype that each fill a dense block of memory, in one layout.
    // An empty gradient means none.
    void check_pair(const Tensor& param, const Tensor& grad) const {
        dense(param, "params");
        if (grad.numel() == 0) return;
        require(grad.scalar_type() == param.scalar_type(), this->op_, ": grads must have the dtype of their params");
        require(laid_out_alike(param, grad), this->op_, ": grads must have the sizes and strides of their params");
        dense(grad, "grads");
    }

  private:
    void dense(const Tensor& tensor, const char* name) const {
        const ScalarType dtype = tensor.scalar_type();
        const bool is_half = dtype == ScalarType::BFloat16 || dtype == ScalarType::Half;
        require(is_half || dtype == ScalarType::Float, this->op_, ": ", name, " must be float32, bfloat16 or float16");
        this->check_device(tensor, name);
        require(tensor.is_contiguous() || fills_a_block(tensor), this->op_, ": ", name,
                " must fill a block of memory, without gaps or overlapping elements");
        this->address(tensor, name, tensor.numel(), is_half ? 2 : 4);
    }

    static bool fills_a_block(const Tensor& tensor) {
        const auto sizes = tensor.sizes(), strides = tensor.strides();
        std::vector<std::pair<int64_t, int64_t>> dims;
        for (size_t i = 0; i < sizes.size(); ++i) {
            if (sizes[i] != 1) dims.emplace_back(strides[i], sizes[i]);
        }
        std::sort(dims.begin(), dims.end());
        int64_t expected = 1;
        for (const auto& [stride, size] : dims) {
            if (stride != expected) return false;
            expected *= size;
        }
        return true;
    }

    static bool laid_out_alike(const Tensor& a, const Tensor& b) {
        const auto a_sizes = a.sizes(), a_strides = a.strides(), b_sizes = b.sizes(), b_strides = b.strides();
        if (a_sizes.size() != b_sizes.size()) return false;
        for (size_t i = 0; i < a_sizes.size(); ++i) {
            if (a_sizes[i] != b_sizes[i] || (a_sizes[i] != 1 && a_strides[i] != b_strides[i])) return false;
        }
        return true;
    }
};

}  // namespace qlora::bindings
