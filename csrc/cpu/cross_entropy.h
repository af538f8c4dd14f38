// Arguments of linear_cross_entropy: borrowed pointers, all contiguous.
#pragma once

#include <cstdint>

#include "qlora/dtypes.h"

namespace qlora {

// logits z[m, v] = f(scale * (hidden[m] . weight[v] + bias[v])), where f(z) = z, or softcap * tanh(z / softcap) if
// softcap > 0.
struct CrossEntropyProblem {
    int64_t M, V, K;
    DType dtype;            // of hidden and its gradient
    AnyFloat weight;        // [V, K]; rounded to `dtype` when used
    AnyFloat bias;          // [V], or data == nullptr
    const int64_t* labels;  // [M], in [0, V) or `ignored`
    int64_t ignored;
    float scale;
    float softcap;
};

// Results of each token m; zero if its label is `ignored`.
struct CrossEntropyResults {
    float* losses;      // -log p(label)
    float* log_sums;    // log of the sum of exp(z)
    void* grad_hidden;  // [M, K] of `dtype`: the gradient of losses[m]; null if it is not needed
};

}  // namespace qlora
