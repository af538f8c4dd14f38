#include <vector>

#include "cpu_tensors.h"

namespace qlora::bindings {
namespace {

// A row of `pointers`: hundreds of tensors cross the dispatcher as one.
struct PointerRow {
    int64_t data, grad, numel, dtype;
};

constexpr DType kDtypes[] = {DType::kFloat32, DType::kBfloat16, DType::kFloat16};

// The plan is Python's, and these rows become raw pointers: each is checked against the memory it points into.
void check_segment(const AdamWSegment& segment, const PointerRow* rows, int64_t n_params, int64_t arena_bytes) {
    STD_TORCH_CHECK(segment.param >= 0 && segment.param < n_params, "segments: no parameter ", segment.param);
    STD_TORCH_CHECK(segment.start >= 0 && segment.start % kStateBlocksize == 0 && segment.numel >= 0 &&
                        segment.start + segment.numel <= rows[segment.param].numel,
                    "segments: elements ", segment.start, " to ", segment.start + segment.numel,
                    " lie outside their parameter or do not start a block");
    const bool quantized = segment.exp_avg_absmax >= 0;
    const auto check_bytes = [&](int64_t offset, int64_t bytes, int64_t alignment) {
        STD_TORCH_CHECK(offset >= 0 && offset % alignment == 0 && offset + bytes <= arena_bytes, "segments: bytes ",
                        offset, " to ", offset + bytes, " lie outside the arena or are not aligned");
    };
    const int64_t width = quantized ? 1 : 4;
    check_bytes(segment.exp_avg, segment.numel * width, width);
    check_bytes(segment.exp_avg_sq, segment.numel * width, width);
    if (quantized) {
        check_bytes(segment.exp_avg_absmax, 4 * ceil_div(segment.numel, kStateBlocksize), 4);
        check_bytes(segment.exp_avg_sq_absmax, 4 * ceil_div(segment.numel, kStateBlocksize), 4);
    }
}

void adamw_step(Tensor pointers, Tensor steps, Tensor segments, Tensor arena, OptionalTensor seed, double lr,
                double beta1, double beta2, double eps, double weight_decay, double grad_multiplier) {
    const int64_t n_params = steps.numel(), n_segments = segments.size(0), arena_bytes = arena.numel();
    const float* t = data_of<float>(steps, "steps", ScalarType::Float, n_params);
    const auto* rows = reinterpret_cast<const PointerRow*>(
        data_of<int64_t>(pointers, "pointers", ScalarType::Long, n_params * (sizeof(PointerRow) / 8)));
    const auto* plan = reinterpret_cast<const AdamWSegment*>(
        data_of<int64_t>(segments, "segments", ScalarType::Long, n_segments * (sizeof(AdamWSegment) / 8)));
    data_of<uint8_t>(arena, "arena", ScalarType::Byte, arena_bytes);

    std::vector<AdamWParam> params;
    params.reserve(static_cast<size_t>(n_params));
    for (int64_t i = 0; i < n_params; ++i) {
        STD_TORCH_CHECK(rows[i].dtype >= 0 && rows[i].dtype < 3, "pointers: no dtype ", rows[i].dtype);
        params.push_back({reinterpret_cast<void*>(rows[i].data), reinterpret_cast<const void*>(rows[i].grad),
                          kDtypes[rows[i].dtype], t[i]});
    }
    for (int64_t i = 0; i < n_segments; ++i) check_segment(plan[i], rows, n_params, arena_bytes);

    AdamWStep step{};
    step.params = params.data();
    step.segments = plan;
    step.n_segments = n_segments;
    step.arena = static_cast<uint8_t*>(arena.mutable_data_ptr());
    uint64_t key = 0;
    if (seed.has_value()) {
        key = static_cast<uint64_t>(*data_of<int64_t>(seed, "seed", ScalarType::Long, 1));
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
        "cpu_adamw_step(Tensor pointers, Tensor steps, Tensor segments, Tensor(a!) arena, Tensor? seed, float lr, "
        "float beta1, float beta2, float eps, float weight_decay, float grad_multiplier) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CPU, m) { m.impl("cpu_adamw_step", TORCH_BOX(&adamw_step)); }

}  // namespace qlora::bindings
