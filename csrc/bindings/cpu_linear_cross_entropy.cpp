#include <cmath>

#include "cpu_tensors.h"

namespace qlora::bindings {
namespace {

// blocksize: 0 for a dense weight, otherwise `weight` is packed NF4 with the constants beside it.
std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy(Tensor hidden, Tensor weight, OptionalTensor absmax,
                                                        OptionalTensor absmax_q, OptionalTensor absmax_scale,
                                                        OptionalTensor absmax_offset, int64_t blocksize, int64_t V,
                                                        OptionalTensor low_rank, OptionalTensor bias, Tensor labels,
                                                        int64_t ignore_index, double logit_scale, double softcap,
                                                        bool need_grad_hidden) {
    const char* op = "linear_cross_entropy";
    const CpuArguments arguments(op);
    const auto [M, K] = arguments.matrix(hidden, "hidden");
    const int64_t rank = low_rank.has_value() ? arguments.matrix(*low_rank, "low_rank").columns : 0;
    require(V > 0 && rank < K, op,
            ": hidden must have more columns than low_rank, and out_features must be positive, got ", K, ", ", rank,
            " and ", V);
    HeadWeight head{};
    head.rank = rank;
    head.low_rank = arguments.any_float(low_rank, "low_rank", arguments.product(V, rank, "low_rank"));
    if (blocksize == 0) {
        head.dense = arguments.any_float(weight, "weight", arguments.product(V, K - rank, "weight"));
    } else {
        head.nf4 = arguments.weight(weight, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, V, K - rank);
    }
    const AnyFloat rows = arguments.any_float(hidden, "hidden", M * K);
    const AnyFloat summand = arguments.any_float(bias, "bias", V);
    const int64_t* chosen = arguments.data<int64_t>(labels, "labels", M);
    for (int64_t m = 0; m < M; ++m) {
        require((chosen[m] >= 0 && chosen[m] < V) || chosen[m] == ignore_index, op, ": labels must lie in [0, ", V,
                ") or equal ignore_index=", ignore_index, ", got ", chosen[m]);
    }
    require(std::isfinite(logit_scale) && std::isfinite(softcap) && softcap >= 0.0, op,
            ": logit_scale and softcap must be finite and softcap not negative, got ", logit_scale, " and ", softcap);
    Tensor losses = empty({M}, ScalarType::Float), log_sums = empty({M}, ScalarType::Float);
    Tensor grad_hidden = need_grad_hidden ? empty({M, K}, hidden.scalar_type()) : empty({0}, hidden.scalar_type());
    const CrossEntropyProblem problem{M,
                                      V,
                                      K,
                                      rows.dtype,
                                      head,
                                      summand,
                                      chosen,
                                      ignore_index,
                                      static_cast<float>(logit_scale),
                                      static_cast<float>(softcap)};
    cpu_kernels().linear_cross_entropy(
        problem, rows.data,
        {static_cast<float*>(losses.mutable_data_ptr()), static_cast<float*>(log_sums.mutable_data_ptr()),
         need_grad_hidden ? grad_hidden.mutable_data_ptr() : nullptr});
    return {losses, log_sums, grad_hidden};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def(
        "cpu_linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? absmax, Tensor? absmax_q, "
        "Tensor? absmax_scale, Tensor? absmax_offset, int blocksize, int out_features, Tensor? low_rank, Tensor? bias, "
        "Tensor labels, int ignore_index, float logit_scale, float softcap, bool need_grad_hidden) "
        "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CPU, m) {
    m.impl("cpu_linear_cross_entropy", TORCH_BOX(&linear_cross_entropy));
}

}  // namespace qlora::bindings
