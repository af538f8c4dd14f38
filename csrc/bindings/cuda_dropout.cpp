#include "cuda_tensors.h"

namespace qlora::cuda_bindings {
namespace {

// y = dropout(x), or y += dropout(x): x and y of one shape and dtype, seed int64 [1] on their device.
void dropout(Tensor x, Tensor seed, int64_t threshold, double scale, bool add, Tensor y) {
    const DeviceGuard guard(x.get_device_index());
    const CudaArguments arguments("linear_nf4_lora", x);
    const int type = arguments.type_of(x, "x");
    const int64_t numel = x.numel();
    bindings::require(arguments.type_of(y, "y") == type, "linear_nf4_lora: x and y must have one dtype");
    bindings::require(threshold >= 0 && threshold <= 1 << 16,
                      "linear_nf4_lora: threshold must be from 0 to 65536, got ", threshold);
    check(launch_dropout(arguments.floats(x, "x", numel), type, arguments.data<int64_t>(seed, "seed", 1),
                         static_cast<int>(threshold), static_cast<float>(scale), add,
                         arguments.written_floats(y, "y", numel), numel, current_stream(x)),
          "linear_nf4_lora: dropout");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def("cuda_dropout(Tensor x, Tensor seed, int threshold, float scale, bool add, Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CUDA, m) { m.impl("cuda_dropout", TORCH_BOX(&dropout)); }

}  // namespace qlora::cuda_bindings
