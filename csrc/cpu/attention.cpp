// Attention on register tiles, for each dtype of the heads.
#include "attention.h"

#include "ops.h"

namespace qlora::QLORA_ISA {

void attention(const AttentionProblem& p, const AttentionOutputs& outputs) {
    with_type(p.dtype,
              [&]<class T>(T*) { Attention<T, RegisterTiles<typename Arithmetic<T>::Mac>>(p).forward(outputs); });
}

void attention_backward(const AttentionProblem& p, const AttentionGradients& gradients) {
    with_type(p.dtype,
              [&]<class T>(T*) { Attention<T, RegisterTiles<typename Arithmetic<T>::Mac>>(p).backward(gradients); });
}

}  // namespace qlora::QLORA_ISA
