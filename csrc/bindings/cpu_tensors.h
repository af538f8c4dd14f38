// Conversion of tensors to arguments of the CPU kernels.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "arguments.h"
#include "kernels.h"

namespace qlora::bindings {

class CpuArguments : public Arguments<Device::kCpu> {
  public:
    using Arguments::Arguments;

    template <class T>
    const T& only(const OptionalTensor& tensor, const char* name) const {
        given(tensor, name);
        return *data<T>(*tensor, name, 1);
    }
};

// Returns a new contiguous CPU tensor. This function calls the allocator directly; torch::stable::new_empty uses the
// dispatcher, which takes as long as a small kernel.
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
