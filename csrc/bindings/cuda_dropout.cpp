#include "cuda_tensors.h"

namespace qlora::cuda_bindings {
namespace {

// y = dropout(x), or y += dropout(x): x and y of one shape and dtype, seed int64 [1] on their device.
void dropout(Tensor x, Tensor seed, int64_t threshold, double scale, bool add, Tensor y) {
    const DeviceGuard guard(x.get_device_index());
    const CudaArguments arguments("linear_nf4_lora", x);
    const AnyFloat source = arguments.any_float(x, "x", x.numel());
    bindings::require(threshold >= 0 && threshold <= 1 << 16,
                      "linear_nf4_lora: threshold must be from 0 to 65536, got ", threshold);
    const DropoutArgs args{
        .x = source.data,
        .y = arguments.written_floats(y, "y", x.numel(), source.dtype),
        .dtype = source.dtype,
        .threshold = static_cast<int>(threshold),
        .scale = static_cast<float>(scale),
        .add = add,
        .seed = arguments.data<int64_t>(seed, "seed", 1),
        .numel = x.numel(),
    };
    check(launch_dropout(&args, current_stream(x)), "linear_nf4_lora: dropout");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def("cuda_dropout(Tensor x, Tensor seed, int threshold, float scale, bool add, Tensor(a!) y) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CUDA, m) { m.impl("cuda_dropout", TORCH_BOX(&dropout)); }

}  // namespace qlora::cuda_bindings
