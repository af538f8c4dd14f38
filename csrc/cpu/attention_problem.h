// Arguments of attention: borrowed pointers.
#pragma once

#include <cstdint>

#include "qlora/dtypes.h"

namespace qlora {

// A tensor [B, heads, T, D] whose last dimension is contiguous; strides in elements.
struct HeadsView {
    const void* data;
    int64_t batch, head, token;
};

// Query head h reads key head h / (H / KV). A query (b, t) attends to the keys [starts[b * Tq + t], ends[b * Tq + t]),
// with scores z = f(scale * q . k), f(z) = z, or softcap * tanh(z / softcap) if softcap > 0.
struct AttentionProblem {
    int64_t B, H, KV, Tq, Tk, D;
    DType dtype;  // of q, k, v, the output and all gradients
    float scale, softcap;
    const int64_t *starts, *ends;
    HeadsView q, k, v;
};

// out [B, Tq, H, D] and log_sums [B, H, Tq], the log of the sum of exp(z); both are zero for a query without keys.
struct AttentionOutputs {
    void* out;
    float* log_sums;
};

// grad_q [B, Tq, H, D], grad_k and grad_v [B, Tk, KV, D].
struct AttentionGradients {
    const void* out;  // the forward pass's result
    const float* log_sums;
    HeadsView grad_out;
    void *grad_q, *grad_k, *grad_v;
};

}  // namespace qlora
