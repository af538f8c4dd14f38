#include <cmath>

#include "cpu_tensors.h"

namespace qlora::bindings {
namespace {

Lora lora_of(const CpuArguments& arguments, const Tensor& lora_A, const Tensor& lora_B, const OptionalTensor& seed,
             double scaling, double dropout_p, int64_t N, int64_t K) {
    Lora lora{};
    lora.r = arguments.matrix(lora_A, "lora_A").rows;
    lora.A = arguments.any_float(lora_A, "lora_A", arguments.product(lora.r, K, "lora_A"));
    lora.B = arguments.any_float(lora_B, "lora_B", arguments.product(N, lora.r, "lora_B"));
    lora.scaling = static_cast<float>(scaling);
    if (dropout_p > 0.0) {
        require(dropout_p < 1.0 - 0x1p-17, "linear_nf4_lora: dropout_p must be below 1 - 2**-17, got ", dropout_p);
        // nearbyint rounds halves to even, as Python's round does, so that the mask depends only on (seed, p).
        lora.threshold = static_cast<uint32_t>(std::nearbyint(dropout_p * 65536.0));
        lora.seed = static_cast<uint64_t>(arguments.only<int64_t>(seed, "seed"));
    }
    return lora;
}

std::tuple<Tensor, Tensor> linear_nf4_lora(Tensor x, Tensor packed, OptionalTensor absmax, OptionalTensor absmax_q,
                                           OptionalTensor absmax_scale, OptionalTensor absmax_offset,
                                           OptionalTensor bias, Tensor lora_A, Tensor lora_B, OptionalTensor seed,
                                           double scaling, double dropout_p, int64_t blocksize, int64_t out_features) {
    const CpuArguments arguments("linear_nf4_lora");
    const auto [M, K] = arguments.matrix(x, "x");
    const int64_t N = arguments.positive(out_features, "the weight");
    const AnyFloat rows = arguments.any_float(x, "x", M * K), summand = arguments.any_float(bias, "bias", N);
    const NF4Weight weight = arguments.weight(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, N, K);
    const Lora lora = lora_of(arguments, lora_A, lora_B, seed, scaling, dropout_p, N, K);
    Tensor y = empty({M, N}, x.scalar_type());
    Tensor s = empty({M, lora.r}, x.scalar_type());
    cpu_kernels().linear_nf4_lora({weight, rows.dtype, M}, lora, rows.data, summand, y.mutable_data_ptr(),
                                  s.mutable_data_ptr());
    return {y, s};
}

std::tuple<Tensor, Tensor, Tensor> linear_nf4_lora_backward(Tensor grad_y, Tensor x, Tensor s, Tensor packed,
                                                            OptionalTensor absmax, OptionalTensor absmax_q,
                                                            OptionalTensor absmax_scale, OptionalTensor absmax_offset,
                                                            Tensor lora_A, Tensor lora_B, OptionalTensor seed,
                                                            double scaling, double dropout_p, int64_t blocksize,
                                                            bool need_grad_x) {
    const CpuArguments arguments("linear_nf4_lora_backward");
    const auto [M, K] = arguments.matrix(x, "x");
    const int64_t N = arguments.matrix(grad_y, "grad_y").columns;
    const DType dtype = arguments.float_type(x, "x");
    const NF4Weight weight = arguments.weight(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, N, K);
    const Lora lora = lora_of(arguments, lora_A, lora_B, seed, scaling, dropout_p, N, K);
    const void* rows = arguments.floats(x, "x", M * K, dtype);
    const void* grad_rows = arguments.floats(grad_y, "grad_y", arguments.product(M, N, "grad_y"), dtype);
    const void* down = arguments.floats(s, "s", arguments.product(M, lora.r, "s"), dtype);
    Tensor grad_x = need_grad_x ? empty({M, K}, x.scalar_type()) : empty({0}, x.scalar_type());
    Tensor grad_A = empty({lora.r, K}, ScalarType::Float);
    Tensor grad_B = empty({N, lora.r}, ScalarType::Float);
    cpu_kernels().linear_nf4_lora_backward(
        {weight, dtype, M}, lora, grad_rows, rows, down, need_grad_x ? grad_x.mutable_data_ptr() : nullptr,
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
