#include "cuda_tensors.h"

namespace qlora::cuda_bindings {
namespace {

// s [M, r] = scale * dropout(x) lora_A^T and, where it is given, copy [M, K] = x. Rows of s and copy may have a stride;
// lora_A has x's dtype. seed: int64 [1], or none without dropout.
void lora_down(Tensor x, Tensor lora_A, OptionalTensor seed, int64_t threshold, double scale, Tensor s,
               OptionalTensor copy) {
    const DeviceGuard guard(x.get_device_index());
    const CudaArguments arguments("linear_nf4_lora", x);
    const auto [M, K] = arguments.matrix(x, "x");
    const int64_t r = arguments.matrix(lora_A, "lora_A").rows;
    const DType dtype = arguments.float_type(x, "x");
    bindings::require(threshold >= 0 && threshold <= 1 << 16,
                      "linear_nf4_lora: threshold must be from 0 to 65536, got ", threshold);
    const auto written = arguments.written_rows(s, "s", M, r, dtype);
    LoraDownArgs args{
        .x = arguments.floats(x, "x", arguments.product(M, K, "x"), dtype),
        .lora_A = arguments.floats(lora_A, "lora_A", arguments.product(r, K, "lora_A"), dtype),
        .seed = arguments.data<int64_t>(seed, "seed", 1),
        .s = written.data,
        .s_stride = written.stride,
        .copy = nullptr,
        .copy_stride = 0,
        .dtype = dtype,
        .M = M,
        .K = arguments.to_int(K, "K"),
        .r = arguments.to_int(r, "r"),
        .threshold = static_cast<int>(threshold),
        .scale = static_cast<float>(scale),
    };
    if (copy) {
        const auto rows = arguments.written_rows(*copy, "copy", M, K, dtype);
        args.copy = rows.data;
        args.copy_stride = rows.stride;
        bindings::require(rows.stride % 8 == 0, "linear_nf4_lora: the stride of copy must be a multiple of 8, got ",
                          rows.stride);
    }
    for (const void* address : {args.x, args.lora_A, static_cast<const void*>(args.copy)}) {
        bindings::require(reinterpret_cast<uintptr_t>(address) % 16 == 0,
                          "linear_nf4_lora: x, lora_A and copy must be 16-byte aligned");
    }
    check(launch_lora_down(&args, current_stream(x)), "linear_nf4_lora: lora_down");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def(
        "cuda_lora_down(Tensor x, Tensor lora_A, Tensor? seed, int threshold, float scale, Tensor(a!) s, "
        "Tensor(b!)? copy) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CUDA, m) { m.impl("cuda_lora_down", TORCH_BOX(&lora_down)); }

}  // namespace qlora::cuda_bindings
