#include "cpu_tensors.h"

namespace qlora::bindings {
namespace {

void dequantize_nf4(Tensor packed, OptionalTensor absmax, OptionalTensor absmax_q, OptionalTensor absmax_scale,
                    OptionalTensor absmax_offset, int64_t blocksize, Tensor out) {
    const NF4Weight weight =
        weight_of(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, 1, out.numel());
    checked(out, "out", out.numel());
    cpu_kernels().dequantize_nf4(weight, dtype_of(out, "out"), out.mutable_data_ptr());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def(
        "cpu_dequantize_nf4(Tensor packed, Tensor? absmax, Tensor? absmax_q, Tensor? absmax_scale, "
        "Tensor? absmax_offset, int blocksize, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CPU, m) { m.impl("cpu_dequantize_nf4", TORCH_BOX(&dequantize_nf4)); }

}  // namespace qlora::bindings
