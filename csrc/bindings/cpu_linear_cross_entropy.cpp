#include <cmath>

#include "cpu_tensors.h"

namespace qlora::bindings {
namespace {

std::tuple<Tensor, Tensor, Tensor> linear_cross_entropy(Tensor hidden, Tensor weight, OptionalTensor bias,
                                                        Tensor labels, int64_t ignore_index, double logit_scale,
                                                        double softcap, bool need_grad_hidden) {
    const char* op = "linear_cross_entropy";
    const CpuArguments arguments(op);
    const auto [M, K] = arguments.matrix(hidden, "hidden");
    const int64_t V = arguments.matrix(weight, "weight").rows;
    const AnyFloat rows = arguments.any_float(hidden, "hidden", M * K);
    const AnyFloat head = arguments.any_float(weight, "weight", arguments.product(V, K, "weight"));
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
        "cpu_linear_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, int ignore_index, "
        "float logit_scale, float softcap, bool need_grad_hidden) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CPU, m) {
    m.impl("cpu_linear_cross_entropy", TORCH_BOX(&linear_cross_entropy));
}

}  // namespace qlora::bindings
