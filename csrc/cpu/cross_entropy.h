// What linear_cross_entropy works on: borrowed pointers, all contiguous.
#pragma once

#include <cstdint>

#include "qlora/dtypes.h"

namespace qlora {

// logits z[m, v] = f(scale * (hidden[m] . weight[v] + bias[v])), f(z) = z, or softcap * tanh(z / softcap) if softcap >
// 0.
struct CrossEntropyProblem {
    int64_t M, V, K;
    DType dtype;            // of hidden and its gradient
    AnyFloat weight;        // [V, K]; used rounded to `dtype`
    AnyFloat bias;          // [V], or data == nullptr
    const int64_t* labels;  // [M], in [0, V) or `ignored`
    int64_t ignored;
    float scale;
    float softcap;
};

// Results of each token m, zero where its label is `ignored`.
struct CrossEntropyResults {
    float* losses;      // -log p(label)
    float* log_sums;    // log of the sum of exp(z)
    void* grad_hidden;  // [M, K] of `dtype`: the gradient of losses[m]; null where it is not wanted
};

}  // namespace qlora
