#include "cuda_tensors.h"

namespace qlora::cuda_bindings {
namespace {

// lr as a number is used where lr_tensor, on the device, is not given.
void adamw_step(Tensor table, Tensor segments, Tensor steps, Tensor arena, OptionalTensor lr_tensor, double lr,
                OptionalTensor seed, OptionalTensor grad_multiplier, OptionalTensor found_inf, double beta1,
                double beta2, double eps, double weight_decay, int64_t largest) {
    const DeviceGuard guard(arena.get_device_index());
    const int64_t n_params = steps.numel(), n_segments = segments.size(0);
    constexpr int kFloat64 = 3;
    const bool is_double = lr_tensor && lr_tensor->scalar_type() == ScalarType::Double;
    const int lr_type = is_double ? kFloat64 : type_of(lr_tensor, "lr");
    const AdamWScalars scalars{beta1, beta2, eps, weight_decay, lr};
    check(launch_adamw_step(data_of(table, "table", n_params * 3),
                            data_of<int64_t>(segments, "segments", ScalarType::Long, n_segments * 8), n_segments,
                            data_of<float>(steps, "steps", ScalarType::Float, n_params),
                            written<uint8_t>(arena, "arena", ScalarType::Byte, arena.numel()),
                            data_of(lr_tensor, "lr", 1), lr_type, data_of<int64_t>(seed, "seed", ScalarType::Long, 1),
                            data_of<float>(grad_multiplier, "grad_multiplier", ScalarType::Float, 1),
                            data_of<float>(found_inf, "found_inf", ScalarType::Float, 1), &scalars, largest,
                            current_stream(arena)),
          "adamw_step");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def(
        "cuda_adamw_step(Tensor table, Tensor segments, Tensor steps, Tensor(a!) arena, Tensor? lr_tensor, float lr, "
        "Tensor? seed, Tensor? grad_multiplier, Tensor? found_inf, float beta1, float beta2, float eps, "
        "float weight_decay, int largest) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CUDA, m) { m.impl("cuda_adamw_step", TORCH_BOX(&adamw_step)); }

}  // namespace qlora::cuda_bindings
