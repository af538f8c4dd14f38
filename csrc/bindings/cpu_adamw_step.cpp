#include <algorithm>
#include <vector>

#include "cpu_tensors.h"

namespace qlora::bindings {
namespace {

class StepArguments : public CpuArguments {
  public:
    StepArguments() : CpuArguments("adamw_step") {}

    // A parameter and its gradient, which lie in memory alike: both are walked flat. An empty gradient skips it.
    AdamWParam param(const Tensor& param, const Tensor& grad, float step) const {
        const int64_t numel = param.numel();
        const DType dtype = float_type(param, "params");
        const void* data = dense(param, "params", numel);
        if (grad.numel() == 0) return {const_cast<void*>(data), nullptr, dtype, step};
        STD_TORCH_CHECK(float_type(grad, "grads") == dtype, op_, ": grads must have the dtype of their params");
        STD_TORCH_CHECK(grad.numel() == numel && laid_out_alike(param, grad), op_,
                        ": grads must have the sizes and strides of their params");
        return {numel ? param.mutable_data_ptr() : nullptr, dense(grad, "grads", numel), dtype, step};
    }

    // The rows are the caller's plan and become addresses: each is checked against the memory that it points into.
    void check(const AdamWSegment& segment, const std::vector<Tensor>& params, int64_t arena_bytes) const {
        STD_TORCH_CHECK(segment.param >= 0 && segment.param < static_cast<int64_t>(params.size()), op_,
                        ": segments: no parameter ", segment.param);
        const int64_t numel = params[static_cast<size_t>(segment.param)].numel();
        STD_TORCH_CHECK(segment.start >= 0 && segment.start % kStateBlocksize == 0 && segment.numel >= 0 &&
                            segment.start <= numel && segment.numel <= numel - segment.start && segment.counter >= 0 &&
                            segment.counter <= INT64_MAX - numel,
                        op_, ": segments: elements ", segment.start, " and on, ", segment.numel,
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

  private:
    // The address of a tensor whose elements fill a block of memory, in whatever order of its dimensions.
    const void* dense(const Tensor& tensor, const char* name, int64_t numel) const {
        check_device(tensor, name);
        STD_TORCH_CHECK(tensor.is_contiguous() || fills_a_block(tensor), op_, ": ", name,
                        " must fill a block of memory, without gaps and without elements that share a place");
        return address(tensor, name, numel, tensor.scalar_type() == ScalarType::Float ? 4 : 2);
    }

    static bool fills_a_block(const Tensor& tensor) {
        const auto sizes = tensor.sizes(), strides = tensor.strides();
        std::vector<std::pair<int64_t, int64_t>> dims;
        for (size_t i = 0; i < sizes.size(); ++i) {
            if (sizes[i] != 1) dims.emplace_back(strides[i], sizes[i]);
        }
        std::sort(dims.begin(), dims.end());
        int64_t expected = 1;
        return std::all_of(dims.begin(), dims.end(), [&](const auto& dim) {
            const bool next = dim.first == expected;
            expected *= dim.second;
            return next;
        });
    }

    static bool laid_out_alike(const Tensor& a, const Tensor& b) {
        if (a.is_contiguous() && b.is_contiguous()) return true;
        const auto a_sizes = a.sizes(), a_strides = a.strides(), b_sizes = b.sizes(), b_strides = b.strides();
        if (a_sizes.size() != b_sizes.size()) return false;
        for (size_t i = 0; i < a_sizes.size(); ++i) {
            if (a_sizes[i] != b_sizes[i] || (a_sizes[i] != 1 && a_strides[i] != b_strides[i])) return false;
        }
        return true;
    }

    void check_range(int64_t offset, int64_t bytes, int64_t alignment, int64_t arena_bytes) const {
        STD_TORCH_CHECK(
            offset >= 0 && offset % alignment == 0 && offset <= arena_bytes && bytes <= arena_bytes - offset, op_,
            ": segments: bytes ", offset, " and on, ", bytes, " of them, lie outside the arena or are not aligned");
    }
};

void adamw_step(std::vector<Tensor> params, std::vector<Tensor> grads, Tensor steps, Tensor segments, Tensor arena,
                OptionalTensor seed, double lr, double beta1, double beta2, double eps, double weight_decay,
                double grad_multiplier) {
    const StepArguments arguments;
    STD_TORCH_CHECK(grads.size() == params.size(), "adamw_step: grads must be one for each of params");
    const int64_t arena_bytes = arena.numel();
    const float* t = arguments.data<float>(steps, "steps", static_cast<int64_t>(params.size()));
    const int64_t columns = sizeof(AdamWSegment) / sizeof(int64_t), n_segments = segments.numel() / columns;
    const auto* rows =
        reinterpret_cast<const AdamWSegment*>(arguments.data<int64_t>(segments, "segments", n_segments * columns));
    auto* bytes = arguments.written<uint8_t>(arena, "arena", arena_bytes);
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(bytes) % alignof(float) == 0, "adamw_step: arena must be aligned");

    // Copies: the step writes into tensors that may share memory with `segments` and `steps`.
    const std::vector<AdamWSegment> plan(rows, rows + n_segments);
    std::vector<AdamWParam> pointers;
    pointers.reserve(params.size());
    for (size_t i = 0; i < params.size(); ++i) pointers.push_back(arguments.param(params[i], grads[i], t[i]));
    for (const AdamWSegment& segment : plan) arguments.check(segment, params, arena_bytes);

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
