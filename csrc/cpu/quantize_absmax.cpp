// quantize_absmax: the second level. For each 256 constants, scale = max|absmax - offset|, and absmax_q = number of
// boundaries of the dynamic map strictly below (absmax - offset) * (1 / scale).
//
// It uses the search of dynamic_map.h. A branchless binary search over the 255 boundaries took 41 ns per constant,
// twice the time of the whole pass over the 64 weights of its block.
#include "dynamic_map.h"
#include "ops.h"
#include "qlora/parallel.h"

namespace qlora::QLORA_ISA {

void quantize_absmax(const float* absmax, int64_t blocks, float offset, uint8_t* absmax_q, float* absmax_scale) {
    const int64_t groups = (blocks + kNestedBlocksize - 1) / kNestedBlocksize;
    parallel_ranges(groups, 16, [&](int64_t group0, int64_t group1) {
        alignas(64) float distance[kNestedBlocksize];
        for (int64_t g = group0; g < group1; ++g) {
            const int64_t begin = g * kNestedBlocksize;
            const int n = static_cast<int>(blocks - begin < kNestedBlocksize ? blocks - begin : kNestedBlocksize);
            memset(distance, 0, sizeof distance);
            for (int i = 0; i < n; ++i) distance[i] = absmax[begin + i] - offset;
            F32 largest = zero();
            collect_largest(distance, kNestedBlocksize, largest);
            absmax_scale[g] = encode_block<true>(distance, largest, absmax_q + begin, n);
        }
    });
}

}  // namespace qlora::QLORA_ISA
