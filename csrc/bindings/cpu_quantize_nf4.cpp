#include "cpu_tensors.h"

namespace qlora::bindings {
namespace {

std::tuple<Tensor, Tensor> quantize_nf4(Tensor w, int64_t blocksize) {
    const CpuArguments arguments("quantize_nf4");
    const int block_shift = arguments.block_shift(blocksize);
    const int64_t numel = w.numel();
    const AnyFloat source = arguments.any_float(w, "w", numel);
    Tensor packed = empty({ceil_div(numel, 2)}, ScalarType::Byte);
    Tensor absmax = empty({ceil_div(numel, blocksize)}, ScalarType::Float);
    cpu_kernels().quantize_nf4(source.data, source.dtype, numel, block_shift,
                               static_cast<uint8_t*>(packed.mutable_data_ptr()),
                               static_cast<float*>(absmax.mutable_data_ptr()));
    return {packed, absmax};
}

// torch's mean, because other implementations store results of its order of summation.
Tensor mean(const Tensor& tensor) {
    StableIValue stack[] = {torch::stable::detail::from(tensor),
                            torch::stable::detail::from(std::optional<ScalarType>())};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mean", "", stack, TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

std::tuple<Tensor, Tensor, Tensor> quantize_absmax(Tensor absmax) {
    const CpuArguments arguments("quantize_absmax");
    const int64_t blocks = absmax.numel();
    const float* source = arguments.data<float>(absmax, "absmax", blocks);
    Tensor absmax_q = empty({blocks}, ScalarType::Byte);
    Tensor absmax_scale = empty({ceil_div(blocks, kNestedBlocksize)}, ScalarType::Float);
    Tensor offset = mean(absmax);
    cpu_kernels().quantize_absmax(source, blocks, arguments.only<float>(offset, "offset"),
                                  static_cast<uint8_t*>(absmax_q.mutable_data_ptr()),
                                  static_cast<float*>(absmax_scale.mutable_data_ptr()));
    return {absmax_q, absmax_scale, offset};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> quantize_nf4_double(Tensor w, int64_t blocksize) {
    auto [packed, absmax] = quantize_nf4(w, blocksize);
    auto [absmax_q, absmax_scale, offset] = quantize_absmax(absmax);
    return {packed, absmax, absmax_q, absmax_scale, offset};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def("cpu_quantize_nf4(Tensor w, int blocksize) -> (Tensor, Tensor)");
    m.def("cpu_quantize_absmax(Tensor absmax) -> (Tensor, Tensor, Tensor)");
    m.def("cpu_quantize_nf4_double(Tensor w, int blocksize) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CPU, m) {
    m.impl("cpu_quantize_nf4", TORCH_BOX(&quantize_nf4));
    m.impl("cpu_quantize_absmax", TORCH_BOX(&quantize_absmax));
    m.impl("cpu_quantize_nf4_double", TORCH_BOX(&quantize_nf4_double));
}

}  // namespace qlora::bindings
