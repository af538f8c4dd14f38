// dequantize_nf4: out[i] = code[q[i]] * absmax[i / blocksize], one fp32 product rounded once to the output type.
//
// It is bound by memory: half a byte is read and two or four are written per weight. The product is computed for the
// sixteen values of a block and not for each of its weights (decode.h), so that one core exceeds the store bandwidth.
#include "decode.h"
#include "ops.h"
#include "qlora/parallel.h"

namespace qlora::QLORA_ISA {
namespace {

// A multiple of every blocksize and of the cache line in every output dtype, so that no two tasks share a line.
constexpr int64_t kGrain = 1 << 15;

template <class T>
void dequantize(const NF4Weight& weight, T* out) {
    parallel_ranges(weight.N * weight.K, kGrain,
                    [&](int64_t begin, int64_t end) { decode_range<RoundTo<T>>(weight, begin, end, out + begin); });
}

}  // namespace

void dequantize_nf4(const NF4Weight& weight, DType dtype, void* out) {
    switch (dtype) {
        case DType::kFloat32:
            return dequantize(weight, static_cast<float*>(out));
        case DType::kBfloat16:
            return dequantize(weight, static_cast<Bf16*>(out));
        case DType::kFloat16:
            return dequantize(weight, static_cast<Fp16*>(out));
    }
}

}  // namespace qlora::QLORA_ISA
