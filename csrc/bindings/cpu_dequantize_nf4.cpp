#include "cpu_tensors.h"

namespace qlora::bindings {
namespace {

void dequantize_nf4(Tensor packed, OptionalTensor absmax, OptionalTensor absmax_q, OptionalTensor absmax_scale,
                    OptionalTensor absmax_offset, int64_t blocksize, Tensor out) {
    const CpuArguments arguments("dequantize_nf4");
    const int64_t numel = out.numel();
    const NF4Weight weight =
        arguments.weight(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, 1, numel);
    const DType dtype = arguments.any_float(out, "out", numel).dtype;
    cpu_kernels().dequantize_nf4(weight, dtype, out.mutable_data_ptr());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def(
        "cpu_dequantize_nf4(Tensor packed, Tensor? absmax, Tensor? absmax_q, Tensor? absmax_scale, "
        "Tensor? absmax_offset, int blocksize, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CPU, m) { m.impl("cpu_dequantize_nf4", TORCH_BOX(&dequantize_nf4)); }

}  // namespace qlora::bindings
