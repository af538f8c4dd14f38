#include <vector>

#include "cpu_tensors.h"
#include "step_arguments.h"

namespace qlora::bindings {
namespace {

void check_range(int64_t offset, int64_t bytes, int64_t alignment, int64_t arena_bytes) {
    require(offset >= 0 && offset % alignment == 0 && offset <= arena_bytes && bytes <= arena_bytes - offset,
            "adamw_step: segments: bytes ", offset, " and on, ", bytes,
            " of them, lie outside the arena or are not aligned");
}

// The rows are planned by the caller and become addresses, so each is checked against its tensor's memory.
void check(const AdamWSegment& segment, const std::vector<int64_t>& numels, int64_t arena_bytes) {
    require(segment.param >= 0 && segment.param < static_cast<int64_t>(numels.size()),
            "adamw_step: segments: no parameter ", segment.param);
    const int64_t numel = numels[static_cast<size_t>(segment.param)];
    require(segment.start >= 0 && segment.start % kStateBlocksize == 0 && segment.numel >= 0 &&
                segment.start <= numel && segment.numel <= numel - segment.start && segment.counter >= 0 &&
                segment.counter <= INT64_MAX - numel,
            "adamw_step: segments: elements ", segment.start, " and on, ", segment.numel,
            " of them, lie outside their parameter or do not start a block");
    const bool quantized = segment.exp_avg_absmax >= 0;
    const int64_t width = quantized ? 1 : 4, absmax_bytes = 4 * ceil_div(segment.numel, kStateBlocksize);
    check_range(segment.exp_avg, segment.numel * width, width, arena_bytes);
    check_range(segment.exp_avg_sq, segment.numel * width, width, arena_bytes);
    if (quantized) {
        check_range(segment.exp_avg_absmax, absmax_bytes, 4, arena_bytes);
        check_range(segment.exp_avg_sq_absmax, absmax_bytes, 4, arena_bytes);
    }
}

AdamWParam pointers_of(const StepArguments<CpuArguments>& arguments, const Tensor& param, const Tensor& grad,
                       float step) {
    arguments.check_pair(param, grad);
    const DType dtype = arguments.float_type(param, "params");
    if (grad.numel() == 0) return {nullptr, nullptr, dtype, step};
    return {param.mutable_data_ptr(), grad.const_data_ptr(), dtype, step};
}

void adamw_step(std::vector<Tensor> params, std::vector<Tensor> grads, Tensor steps, Tensor segments, Tensor arena,
                OptionalTensor seed, double lr, double beta1, double beta2, double eps, double weight_decay,
                double grad_multiplier) {
    const StepArguments<CpuArguments> arguments("adamw_step");
    require(grads.size() == params.size(), "adamw_step: grads must be one for each of params");
    const int64_t arena_bytes = arena.numel();
    const float* t = arguments.data<float>(steps, "steps", static_cast<int64_t>(params.size()));
    const int64_t columns = sizeof(AdamWSegment) / sizeof(int64_t), n_segments = segments.numel() / columns;
    const auto* rows =
        reinterpret_cast<const AdamWSegment*>(arguments.data<int64_t>(segments, "segments", n_segments * columns));
    auto* bytes = arguments.written<uint8_t>(arena, "arena", arena_bytes);
    require(reinterpret_cast<uintptr_t>(bytes) % alignof(float) == 0, "adamw_step: arena must be aligned");

    // Copied, because the step may write into tensors that share memory with `segments` and `steps`.
    const std::vector<AdamWSegment> plan(rows, rows + n_segments);
    std::vector<AdamWParam> pointers;
    pointers.reserve(params.size());
    std::vector<int64_t> numels;
    numels.reserve(params.size());
    for (size_t i = 0; i < params.size(); ++i) {
        pointers.push_back(pointers_of(arguments, params[i], grads[i], t[i]));
        numels.push_back(params[i].numel());
    }
    for (const AdamWSegment& segment : plan) check(segment, numels, arena_bytes);

    AdamWStep step{};
    step.params = pointers.data();
    step.segments = plan.data();
    step.n_segments = n_segments;
    step.arena = bytes;
    uint64_t key = 0;
    if (seed.has_value()) {
        key = static_cast<uint64_t>(arguments.only<int64_t>(seed, "seed"));
        step.seed = &key;
    }
    step.lr = lr;
    step.beta1 = beta1;
    step.beta2 = beta2;
    step.eps = eps;
    step.weight_decay = weight_decay;
    step.grad_multiplier = static_cast<float>(grad_multiplier);
    cpu_kernels().adamw_step(step);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def(
        "cpu_adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor steps, Tensor segments, Tensor(b!) arena, "
        "Tensor? seed, float lr, float beta1, float beta2, float eps, float weight_decay, float grad_multiplier) "
        "-> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CPU, m) { m.impl("cpu_adamw_step", TORCH_BOX(&adamw_step)); }

}  // namespace qlora::bindings
