#include "cuda_tensors.h"

namespace qlora::cuda_bindings {
namespace {

// y = dropout(x), or y += dropout(x): x and y of one shape and dtype, seed int64 [1] on their device.
void dropout(Tensor x, Tensor seed, int64_t threshold, double scale, bool add, Tensor y) {
    const DeviceGuard guard(x.get_device_index());
    const int type = type_of(x, "x");
    STD_TORCH_CHECK(type_of(y, "y") == type, "x and y must have one dtype");
    STD_TORCH_CHECK(threshold >= 0 && threshold <= 1 << 16, "threshold must be from 0 to 65536, got ", threshold);
    check(launch_dropout(data_of(x, "x", x.numel()), type, data_of<int64_t>(seed, "seed", ScalarType::Long, 1),
                         static_cast<int>(threshold), static_cast<float>(scale), add,
                         checked(y, "y", x.numel()).mutable_data_ptr(), x.numel(), current_stream(x)),
          "linear_nf4_lora: dropout");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def("cuda_dropout(Tensor x, Tensor seed, int threshold, float scale, bool add, Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CUDA, m) { m.impl("cuda_dropout", TORCH_BOX(&dropout)); }

}  // namespace qlora::cuda_bindings
