#include <algorithm>
#include <vector>

#include "cuda_tensors.h"
#include "step_arguments.h"

namespace qlora::cuda_bindings {
namespace {

// table: int64 [n_params, 4] in device memory, (address, address of the gradient or 0, DType, numel) of each of
// `params`. The number lr is used if lr_tensor, a tensor on the device, is not given.
void adamw_step(std::vector<Tensor> params, std::vector<Tensor> grads, Tensor table, Tensor segments, Tensor steps,
                Tensor arena, OptionalTensor lr_tensor, double lr, OptionalTensor seed, OptionalTensor grad_multiplier,
                OptionalTensor found_inf, double beta1, double beta2, double eps, double weight_decay) {
    const bindings::StepArguments<CudaArguments> arguments("adamw_step", arena);
    const DeviceGuard guard(arena.get_device_index());
    bindings::require(grads.size() == params.size(), "adamw_step: grads must be one for each of params");
    const auto n_params = static_cast<int64_t>(params.size());
    int64_t largest = 0;
    for (size_t i = 0; i < params.size(); ++i) {
        arguments.check_pair(params[i], grads[i]);
        largest = std::max(largest, params[i].numel());
    }
    const bool lr_is_double = lr_tensor && lr_tensor->scalar_type() == ScalarType::Double;
    const OptionalTensor float_lr = lr_is_double ? OptionalTensor() : lr_tensor;
    const OptionalTensor double_lr = lr_is_double ? lr_tensor : OptionalTensor();
    const int64_t n_segments = segments.numel() / 8, arena_bytes = arena.numel();
    const AdamWArgs args{
        .tensors = arguments.data<int64_t>(table, "table", n_params * 4),
        .n_params = n_params,
        .segments = arguments.data<int64_t>(segments, "segments", n_segments * 8),
        .n_segments = n_segments,
        .steps = arguments.data<float>(steps, "steps", n_params),
        .arena = arguments.written<uint8_t>(arena, "arena", arena_bytes),
        .arena_bytes = arena_bytes,
        .lr = arguments.any_float(float_lr, "lr", 1),
        .double_lr = arguments.data<double>(double_lr, "lr", 1),
        .seed = arguments.data<int64_t>(seed, "seed", 1),
        .grad_multiplier = arguments.data<float>(grad_multiplier, "grad_multiplier", 1),
        .found_inf = arguments.data<float>(found_inf, "found_inf", 1),
        .scalars = {beta1, beta2, eps, weight_decay, lr},
        .largest_segment = largest,
    };
    check(launch_adamw_step(&args, current_stream(arena)), "adamw_step");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def(
        "cuda_adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor table, Tensor segments, Tensor steps, "
        "Tensor(b!) arena, Tensor? lr_tensor, float lr, Tensor? seed, Tensor? grad_multiplier, Tensor? found_inf, "
        "float beta1, float beta2, float eps, float weight_decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CUDA, m) { m.impl("cuda_adamw_step", TORCH_BOX(&adamw_step)); }

}  // namespace qlora::cuda_bindings
