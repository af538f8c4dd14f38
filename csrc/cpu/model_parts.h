// Arguments of the kernels for the parts between a model's linear layers.
#pragma once

#include <cstdint>

#include "qlora/dtypes.h"

namespace qlora {

// x, s and their gradients [rows, columns] of `dtype`, contiguous; y and grad_y of `y_dtype`, which is `dtype` or fp32.
// weight [columns]. offset: 0 or 1, added to the weight; for 1, the normalized row is not rounded before the product.
struct RmsNorm {
    int64_t rows, columns;
    DType dtype, y_dtype;
    AnyFloat weight;
    float offset;
};

// One tensor [B, heads, T, D] to rotate, D contiguous; strides of the other dimensions in elements.
struct RopeOperand {
    const void* x;
    void* out;
    int64_t heads;
    int64_t strides[3], out_strides[3];
};

// cos and sin [T, D], or [B, T, D] with `table_stride` elements between the tables of rows; 0 for one table. inverse:
// rotate by the opposite angles.
struct Rope {
    DType dtype;
    int64_t B, T, D;
    const void *cos, *sin;
    int64_t table_stride;
    bool inverse;
    RopeOperand operands[2];
};

enum class Activation { kSilu, kGeluTanh };

}  // namespace qlora
