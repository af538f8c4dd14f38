#include <cmath>

#include "cpu_tensors.h"

namespace qlora::bindings {
namespace {

Lora lora_of(const Tensor& lora_A, const Tensor& lora_B, const OptionalTensor& seed, double scaling, double dropout_p,
             int64_t N, int64_t K) {
    Lora lora{};
    lora.r = lora_A.size(0);
    lora.A = any_float(lora_A, "lora_A", lora.r * K);
    lora.B = any_float(lora_B, "lora_B", N * lora.r);
    lora.scaling = static_cast<float>(scaling);
    if (dropout_p > 0.0) {
        // nearbyint rounds halves to even, as Python's round does: the mask is one function of (seed, p) everywhere.
        lora.threshold = static_cast<uint32_t>(std::nearbyint(dropout_p * 65536.0));
        STD_TORCH_CHECK(lora.threshold < 65536, "dropout_p must be below 1 - 2**-17, got ", dropout_p);
        lora.seed = static_cast<uint64_t>(*data_of<int64_t>(seed, "seed", ScalarType::Long, 1));
    }
    return lora;
}

std::tuple<Tensor, Tensor> linear_nf4_lora(Tensor x, Tensor packed, OptionalTensor absmax, OptionalTensor absmax_q,
                                           OptionalTensor absmax_scale, OptionalTensor absmax_offset,
                                           OptionalTensor bias, Tensor lora_A, Tensor lora_B, OptionalTensor seed,
                                           double scaling, double dropout_p, int64_t blocksize, int64_t out_features) {
    const int64_t M = x.size(0), K = x.size(1);
    const LinearProblem problem{
        weight_of(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, out_features, K), dtype_of(x, "x"),
        M};
    const Lora lora = lora_of(lora_A, lora_B, seed, scaling, dropout_p, out_features, K);
    Tensor y = empty({M, out_features}, x.scalar_type());
    Tensor s = empty({M, lora.r}, x.scalar_type());
    cpu_kernels().linear_nf4_lora(problem, lora, checked(x, "x", M * K).const_data_ptr(),
                                  any_float(bias, "bias", out_features), y.mutable_data_ptr(), s.mutable_data_ptr());
    return {y, s};
}

std::tuple<Tensor, Tensor, Tensor> linear_nf4_lora_backward(Tensor grad_y, Tensor x, Tensor s, Tensor packed,
                                                            OptionalTensor absmax, OptionalTensor absmax_q,
                                                            OptionalTensor absmax_scale, OptionalTensor absmax_offset,
                                                            Tensor lora_A, Tensor lora_B, OptionalTensor seed,
                                                            double scaling, double dropout_p, int64_t blocksize,
                                                            bool need_grad_x) {
    const int64_t M = x.size(0), K = x.size(1), N = grad_y.size(1);
    const LinearProblem problem{weight_of(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, N, K),
                                dtype_of(x, "x"), M};
    STD_TORCH_CHECK(grad_y.scalar_type() == x.scalar_type() && s.scalar_type() == x.scalar_type(),
                    "grad_y, x and s must share one dtype");
    const Lora lora = lora_of(lora_A, lora_B, seed, scaling, dropout_p, N, K);
    Tensor grad_x = need_grad_x ? empty({M, K}, x.scalar_type()) : empty({0}, x.scalar_type());
    Tensor grad_A = empty({lora.r, K}, ScalarType::Float);
    Tensor grad_B = empty({N, lora.r}, ScalarType::Float);
    cpu_kernels().linear_nf4_lora_backward(
        problem, lora, checked(grad_y, "grad_y", M * N).const_data_ptr(), checked(x, "x", M * K).const_data_ptr(),
        checked(s, "s", M * lora.r).const_data_ptr(), need_grad_x ? grad_x.mutable_data_ptr() : nullptr,
        static_cast<float*>(grad_A.mutable_data_ptr()), static_cast<float*>(grad_B.mutable_data_ptr()));
    return {grad_x, grad_A, grad_B};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def(
        "cpu_linear_nf4_lora(Tensor x, Tensor packed, Tensor? absmax, Tensor? absmax_q, Tensor? absmax_scale, "
        "Tensor? absmax_offset, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? seed, float scaling, "
        "float dropout_p, int blocksize, int out_features) -> (Tensor, Tensor)");
    m.def(
        "cpu_linear_nf4_lora_backward(Tensor grad_y, Tensor x, Tensor s, Tensor packed, Tensor? absmax, "
        "Tensor? absmax_q, Tensor? absmax_scale, Tensor? absmax_offset, Tensor lora_A, Tensor lora_B, Tensor? seed, "
        "float scaling, float dropout_p, int blocksize, bool need_grad_x) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CPU, m) {
    m.impl("cpu_linear_nf4_lora", TORCH_BOX(&linear_nf4_lora));
    m.impl("cpu_linear_nf4_lora_backward", TORCH_BOX(&linear_nf4_lora_backward));
}

}  // namespace qlora::bindings
