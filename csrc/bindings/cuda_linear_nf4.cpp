#include "cuda_tensors.h"

namespace qlora::cuda_bindings {
namespace {

void linear_nf4_small_m(Tensor x, Tensor packed, OptionalTensor absmax, OptionalTensor absmax_q,
                        OptionalTensor absmax_scale, OptionalTensor absmax_offset, OptionalTensor bias,
                        OptionalTensor s, OptionalTensor lora_B, double scaling, int64_t blocksize, Tensor y) {
    const DeviceGuard guard(x.get_device_index());
    const CudaArguments arguments("linear_nf4", x);
    const auto [M, K] = arguments.matrix(x, "x");
    const int64_t N = arguments.matrix(y, "y").columns, r = s ? arguments.matrix(*s, "s").columns : 0;
    const Weight w(arguments, packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize,
                   arguments.product(N, K, "the weight"));
    const int type = arguments.type_of(x, "x");
    bindings::require(arguments.type_of(y, "y") == type && (!s || arguments.type_of(s, "s") == type),
                      "linear_nf4: x, s and y must have one dtype");
    bindings::require(s.has_value() == lora_B.has_value(), "linear_nf4: s and lora_B must be given together");
    check(launch_linear_nf4_small_m(
              arguments.floats(x, "x", M * K), type, w.packed, w.absmax, w.absmax_q, w.absmax_scale, w.absmax_offset,
              w.block_shift, arguments.floats(bias, "bias", N), arguments.type_of(bias, "bias"),
              arguments.floats(s, "s", arguments.product(M, r, "s")),
              arguments.floats(lora_B, "lora_B", arguments.product(N, r, "lora_B")),
              arguments.type_of(lora_B, "lora_B"), arguments.to_int(r, "r"), static_cast<float>(scaling),
              arguments.written_floats(y, "y", arguments.product(M, N, "y")), arguments.to_int(M, "M"),
              arguments.to_int(N, "N"), arguments.to_int(K, "K"), current_stream(x)),
          "linear_nf4");
}

// partial: fp32 [splits, M, out] scratch, or none for one split.
void linear_nf4_gemm(Tensor x, Tensor packed, OptionalTensor absmax, OptionalTensor absmax_q,
                     OptionalTensor absmax_scale, OptionalTensor absmax_offset, OptionalTensor bias,
                     OptionalTensor down, OptionalTensor up, double scaling, int64_t blocksize, bool transposed,
                     OptionalTensor partial, Tensor y) {
    const DeviceGuard guard(x.get_device_index());
    const char* op = transposed ? "linear_nf4_grad_x" : "linear_nf4";
    const CudaArguments arguments(op, x);
    const auto [M, depth] = arguments.matrix(x, "x");
    const int64_t out = arguments.matrix(y, "y").columns, r = down ? arguments.matrix(*down, "down").columns : 0;
    const int64_t N = transposed ? depth : out, K = transposed ? out : depth;
    const Weight w(arguments, packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize,
                   arguments.product(N, K, "the weight"));
    const int type = arguments.type_of(x, "x");
    bindings::require(arguments.type_of(y, "y") == type, op, ": x and y must have one dtype");
    bindings::require(down.has_value() == up.has_value(), op, ": down and up must be given together");
    bindings::require(!down || (arguments.type_of(down, "down") == type && arguments.type_of(up, "up") == type), op,
                      ": down and up must have the dtype of x");
    const int64_t y_numel = arguments.product(M, out, "y"), splits = partial ? partial->size(0) : 1;
    float* scratch = partial
                         ? arguments.written<float>(*partial, "partial", arguments.product(splits, y_numel, "partial"))
                         : nullptr;
    check(launch_linear_nf4_gemm(arguments.floats(x, "x", M * depth), type, w.packed, w.absmax, w.absmax_q,
                                 w.absmax_scale, w.absmax_offset, w.block_shift, arguments.floats(bias, "bias", out),
                                 arguments.type_of(bias, "bias"),
                                 arguments.floats(down, "down", arguments.product(M, r, "down")),
                                 arguments.floats(up, "up", arguments.product(out, r, "up")), arguments.to_int(r, "r"),
                                 static_cast<float>(scaling), arguments.written_floats(y, "y", y_numel), scratch,
                                 arguments.to_int(splits, "splits"), transposed, arguments.to_int(M, "M"),
                                 arguments.to_int(N, "N"), arguments.to_int(K, "K"), current_stream(x)),
          op);
}

int64_t gemm_splits(int64_t M, int64_t out, int64_t depth, int64_t multiprocessors) {
    const CudaArguments arguments("linear_nf4");
    for (const int64_t size : {M, out, depth, multiprocessors}) arguments.positive(size, "a problem");
    return linear_nf4_gemm_splits(arguments.to_int(M, "M"), arguments.to_int(out, "out"),
                                  arguments.to_int(depth, "depth"),
                                  arguments.to_int(multiprocessors, "multiprocessors"));
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
