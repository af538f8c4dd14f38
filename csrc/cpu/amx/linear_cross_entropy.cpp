// linear_cross_entropy on tiles for bf16 hidden states; other types run on avx512_bf16.
#include "../linear_cross_entropy.h"

#include "amx_tiles.h"
#include "ops.h"

namespace qlora::QLORA_ISA {

void linear_cross_entropy(const CrossEntropyProblem& p, const void* hidden, const CrossEntropyResults& results) {
    if (p.dtype != DType::kBfloat16) return avx512_bf16::kKernels.linear_cross_entropy(p, hidden, results);
    CrossEntropy<Bf16, AmxTiles>(p, hidden, results).run();
}

}  // namespace qlora::QLORA_ISA
