#include "cuda_tensors.h"

namespace qlora::cuda_bindings {
namespace {

void dequantize_nf4(Tensor packed, OptionalTensor absmax, OptionalTensor absmax_q, OptionalTensor absmax_scale,
                    OptionalTensor absmax_offset, int64_t blocksize, Tensor out) {
    const DeviceGuard guard(packed.get_device_index());
    const CudaArguments arguments("dequantize_nf4", packed);
    const int64_t numel = out.numel();
    const Weight w(arguments, packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, numel);
    const int type = arguments.type_of(out, "out");
    void* data = arguments.written_floats(out, "out", numel);
    check(launch_dequantize_nf4(w.packed, w.absmax, w.absmax_q, w.absmax_scale, w.absmax_offset, w.block_shift, data,
                                type, numel, current_stream(packed)),
          "dequantize_nf4");
}

// partial_sums: sums of absmax for the second level, or null.
void quantize_first_level(const Tensor& w, int64_t blocksize, Tensor& packed, Tensor& absmax, double* partial_sums) {
    const CudaArguments arguments("quantize_nf4", w);
    const int block_shift = arguments.block_shift(blocksize);
    const int64_t numel = w.numel();
    check(launch_quantize_nf4(arguments.floats(w, "w", numel), arguments.type_of(w, "w"),
                              arguments.written<uint8_t>(packed, "packed", ceil_div(numel, 2)),
                              arguments.written<float>(absmax, "absmax", ceil_div(numel, blocksize)), partial_sums,
                              numel, block_shift, current_stream(w)),
          "quantize_nf4");
}

void quantize_nf4(Tensor w, int64_t blocksize, Tensor packed, Tensor absmax) {
    const DeviceGuard guard(w.get_device_index());
    quantize_first_level(w, blocksize, packed, absmax, nullptr);
}

// The second level from absmax and sums of its parts: one launch.
void quantize_second_level(const Tensor& absmax, const double* partial_sums, int64_t n_partial_sums, Tensor& absmax_q,
                           Tensor& absmax_scale, Tensor& absmax_offset) {
    const CudaArguments arguments("quantize_absmax", absmax);
    const int64_t n_blocks = absmax.numel();
    check(launch_quantize_absmax(arguments.data<float>(absmax, "absmax", n_blocks), partial_sums, n_partial_sums,
                                 arguments.written<uint8_t>(absmax_q, "absmax_q", n_blocks),
                                 arguments.written<float>(absmax_scale, "absmax_scale", ceil_div(n_blocks, 256)),
                                 arguments.written<float>(absmax_offset, "absmax_offset", 1), n_blocks,
                                 current_stream(absmax)),
          "quantize_absmax");
}

// Two launches: partial sums of absmax, then the second level.
void quantize_absmax(Tensor absmax, Tensor partial_sums, Tensor absmax_q, Tensor absmax_scale, Tensor absmax_offset) {
    const DeviceGuard guard(absmax.get_device_index());
    const CudaArguments arguments("quantize_absmax", absmax);
    const int64_t n_blocks = absmax.numel(), sums = sum_absmax_partial_sums(n_blocks);
    auto* partial = arguments.written<double>(partial_sums, "partial_sums", sums);
    check(
        launch_sum_absmax(arguments.data<float>(absmax, "absmax", n_blocks), partial, n_blocks, current_stream(absmax)),
        "quantize_absmax");
    quantize_second_level(absmax, partial, sums, absmax_q, absmax_scale, absmax_offset);
}

// Two launches for both levels: the first leaves the partial sums behind.
void quantize_nf4_double(Tensor w, int64_t blocksize, Tensor packed, Tensor absmax, Tensor partial_sums,
                         Tensor absmax_q, Tensor absmax_scale, Tensor absmax_offset) {
    const DeviceGuard guard(w.get_device_index());
    const CudaArguments arguments("quantize_nf4", w);
    const int64_t sums = quantize_nf4_partial_sums(w.numel(), arguments.block_shift(blocksize));
    auto* partial = arguments.written<double>(partial_sums, "partial_sums", sums);
    quantize_first_level(w, blocksize, packed, absmax, partial);
    quantize_second_level(absmax, partial, sums, absmax_q, absmax_scale, absmax_offset);
}

// Doubles that quantize_absmax and quantize_nf4_double need as scratch.
int64_t absmax_partial_sums(int64_t n_blocks) {
    bindings::require(n_blocks >= 0, "quantize_absmax: n_blocks must be >= 0, got ", n_blocks);
    return sum_absmax_partial_sums(n_blocks);
}
int64_t nf4_partial_sums(int64_t numel, int64_t blocksize) {
    bindings::require(numel >= 0, "quantize_nf4: numel must be >= 0, got ", numel);
    return quantize_nf4_partial_sums(numel, CudaArguments("quantize_nf4").block_shift(blocksize));
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
