#include "cpu_tensors.h"

namespace qlora::bindings {
namespace {

std::tuple<Tensor, Tensor> quantize_nf4(Tensor w, int64_t blocksize) {
    const int64_t numel = w.numel();
    const AnyFloat source = any_float(w, "w", numel);
    Tensor packed = torch::stable::new_empty(w, {ceil_div(numel, 2)}, ScalarType::Byte);
    Tensor absmax = torch::stable::new_empty(w, {ceil_div(numel, blocksize)}, ScalarType::Float);
    cpu_kernels().quantize_nf4(source.data, source.dtype, numel, block_shift_of(blocksize),
                               static_cast<uint8_t*>(packed.mutable_data_ptr()),
                               static_cast<float*>(absmax.mutable_data_ptr()));
    return {packed, absmax};
}

// The mean is torch's own, taken in Python: its order of summation is part of what other implementations store.
std::tuple<Tensor, Tensor> quantize_absmax(Tensor absmax, Tensor offset) {
    const int64_t blocks = absmax.numel();
    const float* source = data_of<float>(absmax, "absmax", ScalarType::Float, blocks);
    Tensor absmax_q = torch::stable::new_empty(absmax, {blocks}, ScalarType::Byte);
    Tensor absmax_scale = torch::stable::new_empty(absmax, {ceil_div(blocks, kNestedBlocksize)});
    cpu_kernels().quantize_absmax(source, blocks, *data_of<float>(offset, "offset", ScalarType::Float, 1),
                                  static_cast<uint8_t*>(absmax_q.mutable_data_ptr()),
                                  static_cast<float*>(absmax_scale.mutable_data_ptr()));
    return {absmax_q, absmax_scale};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def("cpu_quantize_nf4(Tensor w, int blocksize) -> (Tensor, Tensor)");
    m.def("cpu_quantize_absmax(Tensor absmax, Tensor offset) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CPU, m) {
    m.impl("cpu_quantize_nf4", TORCH_BOX(&quantize_nf4));
    m.impl("cpu_quantize_absmax", TORCH_BOX(&quantize_absmax));
}

}  // namespace qlora::bindings
