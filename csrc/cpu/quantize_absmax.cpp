// quantize_absmax: the second level. Per 256 constants scale = max|absmax - offset|; absmax_q = how many boundaries of
// the dynamic map lie strictly below (absmax - offset) * (1 / scale).
//
// One constant per 64 weights: a branchless binary search is quick enough beside the pass over the weights.
#include "ops.h"
#include "qlora/parallel.h"
#include "simd.h"

namespace qlora::QLORA_ISA {
namespace {

// Number of boundaries strictly below v: eight halvings of the 255 boundaries, each a conditional add.
uint8_t absmax_index(float v) {
    int index = 0;
#pragma GCC unroll 8
    for (int half = 128; half > 0; half >>= 1) index += v > kAbsmaxBoundaries[index + half - 1] ? half : 0;
    return static_cast<uint8_t>(index);
}

}  // namespace

void quantize_absmax(const float* absmax, int64_t blocks, float offset, uint8_t* absmax_q, float* absmax_scale) {
    const int64_t groups = (blocks + kNestedBlocksize - 1) / kNestedBlocksize;
    parallel_ranges(groups, 16, [&](int64_t group0, int64_t group1) {
        for (int64_t g = group0; g < group1; ++g) {
            const int64_t begin = g * kNestedBlocksize;
            const int64_t end = begin + kNestedBlocksize < blocks ? begin + kNestedBlocksize : blocks;
            float scale = 0.0f;
            for (int64_t i = begin; i < end; ++i) {
                const float distance = __builtin_fabsf(absmax[i] - offset);
                scale = distance > scale ? distance : scale;
            }
            if (scale < kSmallestAbsmax) {
                absmax_scale[g] = 0.0f;
                memset(absmax_q + begin, kAbsmaxZeroIndex, static_cast<size_t>(end - begin));
                continue;
            }
            absmax_scale[g] = scale;
            const float inverse = 1.0f / scale;
            for (int64_t i = begin; i < end; ++i) absmax_q[i] = absmax_index((absmax[i] - offset) * inverse);
        }
    });
}

}  // namespace qlora::QLORA_ISA
