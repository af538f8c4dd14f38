#include "cuda_tensors.h"

namespace qlora::cuda_bindings {
namespace {

void linear_nf4_small_m(Tensor x, Tensor packed, OptionalTensor absmax, OptionalTensor absmax_q,
                        OptionalTensor absmax_scale, OptionalTensor absmax_offset, OptionalTensor bias,
                        OptionalTensor s, OptionalTensor lora_B, double scaling, int64_t blocksize, Tensor y) {
    const DeviceGuard guard(x.get_device_index());
    const int64_t M = x.size(0), K = x.size(1), N = y.size(1), r = s ? s->size(1) : 0;
    const Weight w(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, N * K);
    const int type = type_of(x, "x");
    STD_TORCH_CHECK(type_of(y, "y") == type && (!s || type_of(s, "s") == type), "x, s and y must have one dtype");
    STD_TORCH_CHECK(s.has_value() == lora_B.has_value(), "s and lora_B must be given together");
    check(launch_linear_nf4_small_m(data_of(x, "x", M * K), type, w.packed, w.absmax, w.absmax_q, w.absmax_scale,
                                    w.absmax_offset, w.block_shift, data_of(bias, "bias", N), type_of(bias, "bias"),
                                    data_of(s, "s", M * r), data_of(lora_B, "lora_B", N * r), type_of(lora_B, "lora_B"),
                                    static_cast<int>(r), static_cast<float>(scaling),
                                    checked(y, "y", M * N).mutable_data_ptr(), static_cast<int>(M), static_cast<int>(N),
                                    static_cast<int>(K), current_stream(x)),
          "linear_nf4");
}

// partial: fp32 [splits, M, out] scratch, or none for one split.
void linear_nf4_gemm(Tensor x, Tensor packed, OptionalTensor absmax, OptionalTensor absmax_q,
                     OptionalTensor absmax_scale, OptionalTensor absmax_offset, OptionalTensor bias,
                     OptionalTensor down, OptionalTensor up, double scaling, int64_t blocksize, bool transposed,
                     OptionalTensor partial, Tensor y) {
    const DeviceGuard guard(x.get_device_index());
    const int64_t M = x.size(0), depth = x.size(1), out = y.size(1), r = down ? down->size(1) : 0;
    const int64_t N = transposed ? depth : out, K = transposed ? out : depth;
    const Weight w(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, N * K);
    const int type = type_of(x, "x");
    STD_TORCH_CHECK(type_of(y, "y") == type, "x and y must have one dtype");
    STD_TORCH_CHECK(down.has_value() == up.has_value(), "down and up must be given together");
    STD_TORCH_CHECK(!down || (type_of(down, "down") == type && type_of(up, "up") == type),
                    "down and up must have the dtype of x");
    const int64_t splits = partial ? partial->size(0) : 1;
    float* scratch = partial ? written<float>(*partial, "partial", ScalarType::Float, splits * M * out) : nullptr;
    check(launch_linear_nf4_gemm(data_of(x, "x", M * depth), type, w.packed, w.absmax, w.absmax_q, w.absmax_scale,
                                 w.absmax_offset, w.block_shift, data_of(bias, "bias", out), type_of(bias, "bias"),
                                 data_of(down, "down", M * r), data_of(up, "up", out * r), static_cast<int>(r),
                                 static_cast<float>(scaling), checked(y, "y", M * out).mutable_data_ptr(), scratch,
                                 static_cast<int>(splits), transposed, static_cast<int>(M), static_cast<int>(N),
                                 static_cast<int>(K), current_stream(x)),
          transposed ? "linear_nf4_grad_x" : "linear_nf4");
}

int64_t gemm_splits(int64_t M, int64_t out, int64_t depth, int64_t multiprocessors) {
    return linear_nf4_gemm_splits(static_cast<int>(M), static_cast<int>(out), static_cast<int>(depth),
                                  static_cast<int>(multiprocessors));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def(
        "cuda_linear_nf4_small_m(Tensor x, Tensor packed, Tensor? absmax, Tensor? absmax_q, Tensor? absmax_scale, "
        "Tensor? absmax_offset, Tensor? bias, Tensor? s, Tensor? lora_B, float scaling, int blocksize, Tensor(a!) y) "
        "-> ()");
    m.def(
        "cuda_linear_nf4_gemm(Tensor x, Tensor packed, Tensor? absmax, Tensor? absmax_q, Tensor? absmax_scale, "
        "Tensor? absmax_offset, Tensor? bias, Tensor? down, Tensor? up, float scaling, int blocksize, bool transposed, "
        "Tensor(a!)? partial, Tensor(b!) y) -> ()");
    m.def("cuda_linear_nf4_gemm_splits(int M, int out, int depth, int multiprocessors) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CUDA, m) {
    m.impl("cuda_linear_nf4_small_m", TORCH_BOX(&linear_nf4_small_m));
    m.impl("cuda_linear_nf4_gemm", TORCH_BOX(&linear_nf4_gemm));
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CompositeExplicitAutograd, m) {
    m.impl("cuda_linear_nf4_gemm_splits", TORCH_BOX(&gemm_splits));
}

}  // namespace qlora::cuda_bindings
