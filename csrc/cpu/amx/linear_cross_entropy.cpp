// linear_cross_entropy on AMX tiles for bf16 hidden states; other dtypes use the avx512_bf16 kernels.
#include "../linear_cross_entropy.h"

#include "amx_tiles.h"
#include "ops.h"

namespace qlora::QLORA_ISA {

void linear_cross_entropy(const CrossEntropyProblem& p, const void* hidden, const CrossEntropyResults& results) {
    if (p.dtype != DType::kBfloat16) return avx512_bf16::kKernels.linear_cross_entropy(p, hidden, results);
    CrossEntropy<Bf16, AmxTiles>(p, hidden, results).run();
}

}  // namespace qlora::QLORA_ISA
