#include "cuda_tensors.h"

namespace qlora::cuda_bindings {
namespace {

void dequantize_nf4(Tensor packed, OptionalTensor absmax, OptionalTensor absmax_q, OptionalTensor absmax_scale,
                    OptionalTensor absmax_offset, int64_t blocksize, Tensor out) {
    const DeviceGuard guard(packed.get_device_index());
    const int64_t numel = out.numel();
    const Weight w(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, numel);
    const int type = type_of(out, "out");
    void* data = checked(out, "out", numel).mutable_data_ptr();
    check(launch_dequantize_nf4(w.packed, w.absmax, w.absmax_q, w.absmax_scale, w.absmax_offset, w.block_shift, data,
                                type, numel, current_stream(packed)),
          "dequantize_nf4");
}

// partial_sums: sums of absmax for the second level, or null.
void quantize_first_level(const Tensor& w, int64_t blocksize, Tensor& packed, Tensor& absmax, double* partial_sums) {
    const int64_t numel = w.numel();
    check(launch_quantize_nf4(data_of(w, "w", numel), type_of(w, "w"),
                              written<uint8_t>(packed, "packed", ScalarType::Byte, ceil_div(numel, 2)),
                              written<float>(absmax, "absmax", ScalarType::Float, ceil_div(numel, blocksize)),
                              partial_sums, numel, block_shift_of(blocksize), current_stream(w)),
          "quantize_nf4");
}

void quantize_nf4(Tensor w, int64_t blocksize, Tensor packed, Tensor absmax) {
    const DeviceGuard guard(w.get_device_index());
    quantize_first_level(w, blocksize, packed, absmax, nullptr);
}

// The second level from absmax and sums of its parts: one launch.
void quantize_second_level(const Tensor& absmax, const double* partial_sums, int64_t n_partial_sums, Tensor& absmax_q,
                           Tensor& absmax_scale, Tensor& absmax_offset) {
    const int64_t n_blocks = absmax.numel();
    check(launch_quantize_absmax(
              data_of<float>(absmax, "absmax", ScalarType::Float, n_blocks), partial_sums, n_partial_sums,
              written<uint8_t>(absmax_q, "absmax_q", ScalarType::Byte, n_blocks),
              written<float>(absmax_scale, "absmax_scale", ScalarType::Float, ceil_div(n_blocks, 256)),
              written<float>(absmax_offset, "absmax_offset", ScalarType::Float, 1), n_blocks, current_stream(absmax)),
          "quantize_absmax");
}

// Two launches: partial sums of absmax, then the second level.
void quantize_absmax(Tensor absmax, Tensor partial_sums, Tensor absmax_q, Tensor absmax_scale, Tensor absmax_offset) {
    const DeviceGuard guard(absmax.get_device_index());
    const int64_t n_blocks = absmax.numel(), sums = sum_absmax_partial_sums(n_blocks);
    auto* partial = written<double>(partial_sums, "partial_sums", ScalarType::Double, sums);
    check(launch_sum_absmax(data_of<float>(absmax, "absmax", ScalarType::Float, n_blocks), partial, n_blocks,
                            current_stream(absmax)),
          "quantize_absmax");
    quantize_second_level(absmax, partial, sums, absmax_q, absmax_scale, absmax_offset);
}

// Two launches for both levels: the first leaves the partial sums behind.
void quantize_nf4_double(Tensor w, int64_t blocksize, Tensor packed, Tensor absmax, Tensor partial_sums,
                         Tensor absmax_q, Tensor absmax_scale, Tensor absmax_offset) {
    const DeviceGuard guard(w.get_device_index());
    const int64_t sums = quantize_nf4_partial_sums(w.numel(), block_shift_of(blocksize));
    auto* partial = written<double>(partial_sums, "partial_sums", ScalarType::Double, sums);
    quantize_first_level(w, blocksize, packed, absmax, partial);
    quantize_second_level(absmax, partial, sums, absmax_q, absmax_scale, absmax_offset);
}

// Doubles that quantize_absmax and quantize_nf4_double need as scratch.
int64_t absmax_partial_sums(int64_t n_blocks) { return sum_absmax_partial_sums(n_blocks); }
int64_t nf4_partial_sums(int64_t numel, int64_t blocksize) {
    return quantize_nf4_partial_sums(numel, block_shift_of(blocksize));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def(
        "cuda_dequantize_nf4(Tensor packed, Tensor? absmax, Tensor? absmax_q, Tensor? absmax_scale, "
        "Tensor? absmax_offset, int blocksize, Tensor(a!) out) -> ()");
    m.def("cuda_quantize_nf4(Tensor w, int blocksize, Tensor(a!) packed, Tensor(b!) absmax) -> ()");
    m.def(
        "cuda_quantize_absmax(Tensor absmax, Tensor(a!) partial_sums, Tensor(b!) absmax_q, Tensor(c!) absmax_scale, "
        "Tensor(d!) absmax_offset) -> ()");
    m.def(
        "cuda_quantize_nf4_double(Tensor w, int blocksize, Tensor(a!) packed, Tensor(b!) absmax, "
        "Tensor(c!) partial_sums, Tensor(d!) absmax_q, Tensor(e!) absmax_scale, Tensor(f!) absmax_offset) -> ()");
    m.def("cuda_absmax_partial_sums(int n_blocks) -> int");
    m.def("cuda_nf4_partial_sums(int numel, int blocksize) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CUDA, m) {
    m.impl("cuda_dequantize_nf4", TORCH_BOX(&dequantize_nf4));
    m.impl("cuda_quantize_nf4", TORCH_BOX(&quantize_nf4));
    m.impl("cuda_quantize_absmax", TORCH_BOX(&quantize_absmax));
    m.impl("cuda_quantize_nf4_double", TORCH_BOX(&quantize_nf4_double));
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CompositeExplicitAutograd, m) {
    m.impl("cuda_absmax_partial_sums", TORCH_BOX(&absmax_partial_sums));
    m.impl("cuda_nf4_partial_sums", TORCH_BOX(&nf4_partial_sums));
}

}  // namespace qlora::cuda_bindings
