// Arguments of adamw_step: borrowed pointers and rows of the plan (qlora_kernels/ops/adamw_step.py).
#pragma once

#include <cstdint>

#include "qlora/dtypes.h"

namespace qlora {

struct AdamWParam {
    void* data;
    const void* grad;  // if null, the parameter's segments are skipped
    DType dtype;       // of both
    float step;
};

// One row of `segments`; the members are its columns.
struct AdamWSegment {
    int64_t param, start, numel, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, counter;
};

struct AdamWStep {
    const AdamWParam* params;
    const AdamWSegment* segments;
    int64_t n_segments;
    uint8_t* arena;
    const uint64_t* seed;  // null: round to nearest
    double lr, beta1, beta2, eps, weight_decay;
    float grad_multiplier;
};

}  // namespace qlora
