#include "cpu_tensors.h"

namespace qlora::bindings {
namespace {

Tensor linear_nf4(Tensor x, Tensor packed, OptionalTensor absmax, OptionalTensor absmax_q, OptionalTensor absmax_scale,
                  OptionalTensor absmax_offset, OptionalTensor bias, int64_t blocksize, int64_t out_features) {
    const int64_t M = x.size(0), K = x.size(1);
    const LinearProblem problem{
        weight_of(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, out_features, K), dtype_of(x, "x"),
        M};
    Tensor y = empty({M, out_features}, x.scalar_type());
    cpu_kernels().linear_nf4(problem, checked(x, "x", M * K).const_data_ptr(), any_float(bias, "bias", out_features),
                             y.mutable_data_ptr());
    return y;
}

Tensor linear_nf4_grad_x(Tensor grad_y, Tensor packed, OptionalTensor absmax, OptionalTensor absmax_q,
                         OptionalTensor absmax_scale, OptionalTensor absmax_offset, int64_t blocksize,
                         int64_t in_features) {
    const int64_t M = grad_y.size(0), N = grad_y.size(1);
    const LinearProblem problem{
        weight_of(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, N, in_features),
        dtype_of(grad_y, "grad_y"), M};
    Tensor grad_x = empty({M, in_features}, grad_y.scalar_type());
    cpu_kernels().linear_nf4_grad_x(problem, checked(grad_y, "grad_y", M * N).const_data_ptr(),
                                    grad_x.mutable_data_ptr());
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
