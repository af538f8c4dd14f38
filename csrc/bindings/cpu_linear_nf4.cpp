#include "cpu_tensors.h"

namespace qlora::bindings {
namespace {

Tensor linear_nf4(Tensor x, Tensor packed, OptionalTensor absmax, OptionalTensor absmax_q, OptionalTensor absmax_scale,
                  OptionalTensor absmax_offset, OptionalTensor bias, int64_t blocksize, int64_t out_features) {
    const CpuArguments arguments("linear_nf4");
    const auto [M, K] = arguments.matrix(x, "x");
    const int64_t N = arguments.positive(out_features, "the weight");
    const AnyFloat rows = arguments.any_float(x, "x", M * K), summand = arguments.any_float(bias, "bias", N);
    const NF4Weight weight = arguments.weight(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, N, K);
    Tensor y = empty({M, N}, x.scalar_type());
    cpu_kernels().linear_nf4({weight, rows.dtype, M}, rows.data, summand, y.mutable_data_ptr());
    return y;
}

Tensor linear_nf4_grad_x(Tensor grad_y, Tensor packed, OptionalTensor absmax, OptionalTensor absmax_q,
                         OptionalTensor absmax_scale, OptionalTensor absmax_offset, int64_t blocksize,
                         int64_t in_features) {
    const CpuArguments arguments("linear_nf4_grad_x");
    const auto [M, N] = arguments.matrix(grad_y, "grad_y");
    const int64_t K = arguments.positive(in_features, "the weight");
    const AnyFloat rows = arguments.any_float(grad_y, "grad_y", M * N);
    const NF4Weight weight = arguments.weight(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, N, K);
    Tensor grad_x = empty({M, K}, grad_y.scalar_type());
    cpu_kernels().linear_nf4_grad_x({weight, rows.dtype, M}, rows.data, grad_x.mutable_data_ptr());
    return grad_x;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def(
        "cpu_linear_nf4(Tensor x, Tensor packed, Tensor? absmax, Tensor? absmax_q, Tensor? absmax_scale, "
        "Tensor? absmax_offset, Tensor? bias, int blocksize, int out_features) -> Tensor");
    m.def(
        "cpu_linear_nf4_grad_x(Tensor grad_y, Tensor packed, Tensor? absmax, Tensor? absmax_q, Tensor? absmax_scale, "
        "Tensor? absmax_offset, int blocksize, int in_features) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CPU, m) {
    m.impl("cpu_linear_nf4", TORCH_BOX(&linear_nf4));
    m.impl("cpu_linear_nf4_grad_x", TORCH_BOX(&linear_nf4_grad_x));
}

}  // namespace qlora::bindings
