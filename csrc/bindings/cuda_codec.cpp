#include "cuda_tensors.h"

namespace qlora::cuda_bindings {
namespace {

void dequantize_nf4(Tensor packed, OptionalTensor absmax, OptionalTensor absmax_q, OptionalTensor absmax_scale,
                    OptionalTensor absmax_offset, int64_t blocksize, Tensor out) {
    const DeviceGuard guard(packed.get_device_index());
    const CudaArguments arguments("dequantize_nf4", packed);
    // A contiguous out is one row: packed bytes and blocks do not end with the rows of a matrix.
    const bool rows = out.dim() == 2 && !out.is_contiguous();
    const int64_t N = rows ? out.size(0) : 1, K = rows ? out.size(1) : out.numel();
    const DType dtype = arguments.float_type(out, "out");
    DequantizeNF4Args args{
        .weight = arguments.weight(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, N, K),
        .w = nullptr,
        .row_stride = K,
        .dtype = dtype,
    };
    if (rows) {
        const auto written = arguments.written_rows(out, "out", N, K, dtype);
        args.w = written.data;
        args.row_stride = written.stride;
    } else {
        args.w = arguments.written_floats(out, "out", K, dtype);
    }
    check(launch_dequantize_nf4(&args, current_stream(packed)), "dequantize_nf4");
}

// Computes packed and absmax of w. partial_sums: receives sums of absmax for the second level, or null.
void quantize(const Tensor& w, int64_t blocksize, Tensor& packed, Tensor& absmax, double* partial_sums) {
    const CudaArguments arguments("quantize_nf4", w);
    const int64_t numel = w.numel();
    const AnyFloat source = arguments.any_float(w, "w", numel);
    const QuantizeNF4Args args{
        .w = source.data,
        .dtype = source.dtype,
        .block_shift = arguments.block_shift(blocksize),
        .numel = numel,
        .packed = arguments.written<uint8_t>(packed, "packed", ceil_div(numel, 2)),
        .absmax = arguments.written<float>(absmax, "absmax", ceil_div(numel, blocksize)),
        .partial_sums = partial_sums,
    };
    check(launch_quantize_nf4(&args, current_stream(w)), "quantize_nf4");
}

void quantize_nf4(Tensor w, int64_t blocksize, Tensor packed, Tensor absmax) {
    const DeviceGuard guard(w.get_device_index());
    quantize(w, blocksize, packed, absmax, nullptr);
}

// Computes absmax_q, absmax_scale and absmax_offset from absmax and its partial sums, in one launch.
void quantize_absmax_from_sums(const Tensor& absmax, const double* partial_sums, int64_t n_partial_sums,
                               Tensor& absmax_q, Tensor& absmax_scale, Tensor& absmax_offset) {
    const CudaArguments arguments("quantize_absmax", absmax);
    const int64_t n_blocks = absmax.numel();
    const QuantizeAbsmaxArgs args{
        .absmax = arguments.data<float>(absmax, "absmax", n_blocks),
        .n_blocks = n_blocks,
        .partial_sums = partial_sums,
        .n_partial_sums = n_partial_sums,
        .absmax_q = arguments.written<uint8_t>(absmax_q, "absmax_q", n_blocks),
        .absmax_scale = arguments.written<float>(absmax_scale, "absmax_scale", ceil_div(n_blocks, kNestedBlocksize)),
        .absmax_offset = arguments.written<float>(absmax_offset, "absmax_offset", 1),
    };
    check(launch_quantize_absmax(&args, current_stream(absmax)), "quantize_absmax");
}

// Two launches: partial sums of absmax, then its quantization.
void quantize_absmax(Tensor absmax, Tensor partial_sums, Tensor absmax_q, Tensor absmax_scale, Tensor absmax_offset) {
    const DeviceGuard guard(absmax.get_device_index());
    const CudaArguments arguments("quantize_absmax", absmax);
    const int64_t n_blocks = absmax.numel(), sums = sum_absmax_partial_sums(n_blocks);
    auto* partial = arguments.written<double>(partial_sums, "partial_sums", sums);
    check(
        launch_sum_absmax(arguments.data<float>(absmax, "absmax", n_blocks), partial, n_blocks, current_stream(absmax)),
        "quantize_absmax");
    quantize_absmax_from_sums(absmax, partial, sums, absmax_q, absmax_scale, absmax_offset);
}

// Quantizes both levels in two launches; the first one computes the partial sums.
void quantize_nf4_double(Tensor w, int64_t blocksize, Tensor packed, Tensor absmax, Tensor partial_sums,
                         Tensor absmax_q, Tensor absmax_scale, Tensor absmax_offset) {
    const DeviceGuard guard(w.get_device_index());
    const CudaArguments arguments("quantize_nf4", w);
    const int64_t sums = quantize_nf4_partial_sums(w.numel(), arguments.block_shift(blocksize));
    auto* partial = arguments.written<double>(partial_sums, "partial_sums", sums);
    quantize(w, blocksize, packed, absmax, partial);
    quantize_absmax_from_sums(absmax, partial, sums, absmax_q, absmax_scale, absmax_offset);
}

// Returns the number of doubles that quantize_absmax and quantize_nf4_double need as scratch memory.
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
