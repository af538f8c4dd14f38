#include "cuda_tensors.h"

namespace qlora::cuda_bindings {
namespace {

void linear_nf4_small_m(Tensor x, Tensor packed, OptionalTensor absmax, OptionalTensor absmax_q,
                        OptionalTensor absmax_scale, OptionalTensor absmax_offset, OptionalTensor bias,
                        OptionalTensor s, OptionalTensor lora_B, double scaling, int64_t blocksize,
                        int64_t multiprocessors, Tensor y) {
    const DeviceGuard guard(x.get_device_index());
    const CudaArguments arguments("linear_nf4", x);
    const auto [M, K] = arguments.matrix(x, "x");
    const int64_t N = arguments.matrix(y, "y").columns, r = s ? arguments.matrix(*s, "s").columns : 0;
    const DType dtype = arguments.float_type(x, "x");
    bindings::require(s.has_value() == lora_B.has_value(), "linear_nf4: s and lora_B must be given together");
    const LinearNF4SmallMArgs args{
        .x = arguments.floats(x, "x", arguments.product(M, K, "x"), dtype),
        .weight = arguments.weight(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, N, K),
        .bias = arguments.any_float(bias, "bias", N),
        .s = arguments.floats(s, "s", arguments.product(M, r, "s"), dtype),
        .lora_B = arguments.any_float(lora_B, "lora_B", arguments.product(N, r, "lora_B")),
        .y = arguments.written_floats(y, "y", arguments.product(M, N, "y"), dtype),
        .dtype = dtype,
        .M = arguments.to_int(M, "M"),
        .r = arguments.to_int(r, "r"),
        .scaling = static_cast<float>(scaling),
        .multiprocessors = arguments.to_int(multiprocessors, "multiprocessors"),
    };
    check(launch_linear_nf4_small_m(&args, current_stream(x)), "linear_nf4");
}

void linear_nf4_pairs(Tensor x, Tensor packed, OptionalTensor absmax, OptionalTensor absmax_q,
                      OptionalTensor absmax_scale, OptionalTensor absmax_offset, OptionalTensor bias, OptionalTensor s,
                      OptionalTensor lora_B, double scaling, int64_t blocksize, int64_t multiprocessors, Tensor y) {
    const DeviceGuard guard(x.get_device_index());
    const CudaArguments arguments("linear_nf4", x);
    const auto [M, K] = arguments.matrix(x, "x");
    const int64_t N = arguments.matrix(y, "y").columns, r = s ? arguments.matrix(*s, "s").columns : 0;
    constexpr DType dtype = DType::kBfloat16;
    bindings::require(s.has_value() == lora_B.has_value(), "linear_nf4: s and lora_B must be given together");
    const LinearNF4PairsArgs args{
        .x = arguments.floats(x, "x", arguments.product(M, K, "x"), dtype),
        .weight = arguments.weight(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, N, K),
        .bias = arguments.any_float(bias, "bias", N),
        .s = arguments.floats(s, "s", arguments.product(M, r, "s"), dtype),
        .lora_B = arguments.floats(lora_B, "lora_B", arguments.product(N, r, "lora_B"), dtype),
        .y = arguments.written_floats(y, "y", arguments.product(M, N, "y"), dtype),
        .M = arguments.to_int(M, "M"),
        .r = arguments.to_int(r, "r"),
        .scaling = static_cast<float>(scaling),
        .multiprocessors = arguments.to_int(multiprocessors, "multiprocessors"),
    };
    check(launch_linear_nf4_pairs(&args, current_stream(x)), "linear_nf4");
}

// The arguments that linear_nf4_gemm and linear_nf4_wgmma share. partial: fp32 [splits, M, gemm_n] scratch, or none for
// one split.
LinearNF4GemmArgs gemm_arguments(const char* op, const Tensor& x, const Tensor& packed, const OptionalTensor& absmax,
                                 const OptionalTensor& absmax_q, const OptionalTensor& absmax_scale,
                                 const OptionalTensor& absmax_offset, const OptionalTensor& bias,
                                 const OptionalTensor& lora_left, const OptionalTensor& lora_right, double scaling,
                                 int64_t blocksize, bool transposed, const OptionalTensor& partial, const Tensor& y) {
    const CudaArguments arguments(op, x);
    const auto [M, gemm_k] = arguments.matrix(x, "x");
    const int64_t gemm_n = arguments.matrix(y, "y").columns;
    const int64_t r = lora_left ? arguments.matrix(*lora_left, "lora_left").columns : 0;
    const int64_t N = transposed ? gemm_k : gemm_n, K = transposed ? gemm_n : gemm_k;
    const DType dtype = arguments.float_type(x, "x");
    bindings::require(lora_left.has_value() == lora_right.has_value(), op,
                      ": lora_left and lora_right must be given together");
    const int64_t y_numel = arguments.product(M, gemm_n, "y"), splits = partial ? partial->size(0) : 1;
    float* scratch = partial
                         ? arguments.written<float>(*partial, "partial", arguments.product(splits, y_numel, "partial"))
                         : nullptr;
    return {
        .x = arguments.floats(x, "x", arguments.product(M, gemm_k, "x"), dtype),
        .weight = arguments.weight(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize,
                                   arguments.to_int(N, "N"), arguments.to_int(K, "K")),
        .bias = arguments.any_float(bias, "bias", gemm_n),
        .lora_left = arguments.floats(lora_left, "lora_left", arguments.product(M, r, "lora_left"), dtype),
        .lora_right = arguments.floats(lora_right, "lora_right", arguments.product(gemm_n, r, "lora_right"), dtype),
        .y = arguments.written_floats(y, "y", y_numel, dtype),
        .partial = scratch,
        .dtype = dtype,
        .M = arguments.to_int(M, "M"),
        .r = arguments.to_int(r, "r"),
        .scaling = static_cast<float>(scaling),
        .splits = arguments.to_int(splits, "splits"),
        .transposed = transposed,
    };
}

void linear_nf4_gemm(Tensor x, Tensor packed, OptionalTensor absmax, OptionalTensor absmax_q,
                     OptionalTensor absmax_scale, OptionalTensor absmax_offset, OptionalTensor bias,
                     OptionalTensor lora_left, OptionalTensor lora_right, double scaling, int64_t blocksize,
                     bool transposed, OptionalTensor partial, Tensor y) {
    const DeviceGuard guard(x.get_device_index());
    const char* op = transposed ? "linear_nf4_grad_x" : "linear_nf4";
    const LinearNF4GemmArgs args = gemm_arguments(op, x, packed, absmax, absmax_q, absmax_scale, absmax_offset, bias,
                                                  lora_left, lora_right, scaling, blocksize, transposed, partial, y);
    check(launch_linear_nf4_gemm(&args, current_stream(x)), op);
}

void linear_nf4_wgmma(Tensor x, Tensor packed, OptionalTensor absmax, OptionalTensor absmax_q,
                      OptionalTensor absmax_scale, OptionalTensor absmax_offset, OptionalTensor bias,
                      OptionalTensor lora_left, OptionalTensor lora_right, double scaling, int64_t blocksize,
                      bool transposed, OptionalTensor partial, Tensor y) {
    const DeviceGuard guard(x.get_device_index());
    const std::string op = transposed ? "linear_nf4_grad_x" : "linear_nf4";
    const LinearNF4GemmArgs args =
        gemm_arguments(op.c_str(), x, packed, absmax, absmax_q, absmax_scale, absmax_offset, bias, lora_left,
                       lora_right, scaling, blocksize, transposed, partial, y);
    const cudaError_t error = launch_linear_nf4_wgmma(&args, current_stream(x));
    if (error == cudaErrorSymbolNotFound) {
        cudaGetLastError();
        throw std::runtime_error(
            op +
            ": the NVIDIA driver has no cuTensorMapEncodeTiled, which linear_nf4_wgmma needs; update the driver, or "
            "unset QLORA_CUDA_WGMMA");
    }
    check(error, op);
}

using CountSplits = int (*)(int M, int gemm_n, int gemm_k, int multiprocessors);

template <CountSplits count>
int64_t splits(int64_t M, int64_t gemm_n, int64_t gemm_k, int64_t multiprocessors) {
    const CudaArguments arguments("linear_nf4");
    for (const int64_t size : {M, gemm_n, gemm_k, multiprocessors}) arguments.positive(size, "a problem");
    return count(arguments.to_int(M, "M"), arguments.to_int(gemm_n, "gemm_n"), arguments.to_int(gemm_k, "gemm_k"),
                 arguments.to_int(multiprocessors, "multiprocessors"));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def(
        "cuda_linear_nf4_small_m(Tensor x, Tensor packed, Tensor? absmax, Tensor? absmax_q, Tensor? absmax_scale, "
        "Tensor? absmax_offset, Tensor? bias, Tensor? s, Tensor? lora_B, float scaling, int blocksize, int "
        "multiprocessors, "
        "Tensor(a!) y) -> ()");
    m.def(
        "cuda_linear_nf4_pairs(Tensor x, Tensor packed, Tensor? absmax, Tensor? absmax_q, Tensor? absmax_scale, "
        "Tensor? absmax_offset, Tensor? bias, Tensor? s, Tensor? lora_B, float scaling, int blocksize, int "
        "multiprocessors, "
        "Tensor(a!) y) -> ()");
    m.def(
        "cuda_linear_nf4_gemm(Tensor x, Tensor packed, Tensor? absmax, Tensor? absmax_q, Tensor? absmax_scale, "
        "Tensor? absmax_offset, Tensor? bias, Tensor? lora_left, Tensor? lora_right, float scaling, int blocksize, "
        "bool transposed, "
        "Tensor(a!)? partial, Tensor(b!) y) -> ()");
    m.def(
        "cuda_linear_nf4_wgmma(Tensor x, Tensor packed, Tensor? absmax, Tensor? absmax_q, Tensor? absmax_scale, "
        "Tensor? absmax_offset, Tensor? bias, Tensor? lora_left, Tensor? lora_right, float scaling, int blocksize, "
        "bool transposed, "
        "Tensor(a!)? partial, Tensor(b!) y) -> ()");
    m.def("cuda_linear_nf4_gemm_splits(int M, int gemm_n, int gemm_k, int multiprocessors) -> int");
    m.def("cuda_linear_nf4_wgmma_splits(int M, int gemm_n, int gemm_k, int multiprocessors) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CUDA, m) {
    m.impl("cuda_linear_nf4_small_m", TORCH_BOX(&linear_nf4_small_m));
    m.impl("cuda_linear_nf4_pairs", TORCH_BOX(&linear_nf4_pairs));
    m.impl("cuda_linear_nf4_gemm", TORCH_BOX(&linear_nf4_gemm));
    m.impl("cuda_linear_nf4_wgmma", TORCH_BOX(&linear_nf4_wgmma));
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CompositeExplicitAutograd, m) {
    m.impl("cuda_linear_nf4_gemm_splits", TORCH_BOX(&splits<&linear_nf4_gemm_splits>));
    m.impl("cuda_linear_nf4_wgmma_splits", TORCH_BOX(&splits<&linear_nf4_wgmma_splits>));
}

}  // namespace qlora::cuda_bindings
