// Arguments of linear_cross_entropy: borrowed pointers, all contiguous.
#pragma once

#include <cstdint>

#include "qlora/dtypes.h"
#include "qlora/nf4_weight.h"

namespace qlora {

// The weight of an output head, [V, K], used rounded to the dtype of the hidden states. Its first K - rank columns are
// either dense or NF4; the last `rank` columns are the factor B of a low-rank update, whose other factor has been
// applied to the hidden states.
struct HeadWeight {
    AnyFloat dense;     // [V, K - rank], or data == nullptr
    NF4Weight nf4;      // [V, K - rank]; read where dense.data is null
    AnyFloat low_rank;  // [V, rank]
    int64_t rank;       // 0 for none
};

// logits z[m, v] = f(scale * (hidden[m] . weight[v] + bias[v])), where f(z) = z, or softcap * tanh(z / softcap) if
// softcap > 0.
struct CrossEntropyProblem {
    int64_t M, V, K;
    DType dtype;  // of hidden and its gradient
    HeadWeight weight;
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
