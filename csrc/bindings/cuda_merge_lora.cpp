#include "cuda_tensors.h"
#include "merge_lora.h"

namespace qlora::cuda_bindings {
namespace {

// out [N, K] = the dequantized weight + scaling * lora_B lora_A^T, rounded once. lora_A [K, r] is transposed; both
// factors have out's dtype, and r is a multiple of 16 up to 64.
void merge_lora(Tensor packed, OptionalTensor absmax, OptionalTensor absmax_q, OptionalTensor absmax_scale,
                OptionalTensor absmax_offset, Tensor lora_A, Tensor lora_B, double scaling, int64_t blocksize,
                Tensor out) {
    const DeviceGuard guard(packed.get_device_index());
    const CudaArguments arguments("linear_nf4_lora_merged", packed);
    const auto [N, K] = arguments.matrix(out, "out");
    const int64_t r = arguments.matrix(lora_B, "lora_B").columns;
    const DType dtype = arguments.float_type(out, "out");
    const MergeLoraArgs args{
        .weight = arguments.weight(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, N, K),
        .lora_A = arguments.floats(lora_A, "lora_A", arguments.product(K, r, "lora_A"), dtype),
        .lora_B = arguments.floats(lora_B, "lora_B", arguments.product(N, r, "lora_B"), dtype),
        .w = arguments.written_floats(out, "out", arguments.product(N, K, "out"), dtype),
        .dtype = dtype,
        .r = arguments.to_int(r, "r"),
        .scaling = static_cast<float>(scaling),
    };
    for (const void* address :
         {static_cast<const void*>(args.weight.packed), args.lora_A, args.lora_B, static_cast<const void*>(args.w)}) {
        bindings::require(reinterpret_cast<uintptr_t>(address) % 16 == 0,
                          "linear_nf4_lora_merged: packed, lora_A, lora_B and out must be 16-byte aligned");
    }
    check(launch_merge_lora(&args, current_stream(packed)), "linear_nf4_lora_merged: merge_lora");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def(
        "cuda_merge_lora(Tensor packed, Tensor? absmax, Tensor? absmax_q, Tensor? absmax_scale, Tensor? "
        "absmax_offset, Tensor lora_A, Tensor lora_B, float scaling, int blocksize, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CUDA, m) { m.impl("cuda_merge_lora", TORCH_BOX(&merge_lora)); }

}  // namespace qlora::cuda_bindings
