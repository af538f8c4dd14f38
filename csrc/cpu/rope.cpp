// rope: rotary embedding of q and k, or its inverse (qlora_kernels/ops/rope.py).
//
// It is bound by memory. A task processes whole tokens: the angles of a position are loaded once for all heads of q and
// k.
#include "ops.h"
#include "qlora/parallel.h"
#include "simd.h"

namespace qlora::QLORA_ISA {
namespace {

constexpr int64_t kTokens = 16;  // minimum per task

// All heads of one token: (a, b) -> (a cos_a + b to_a, b cos_b + a to_b) on the halves a and b of a head.
template <class T>
void rotate_token(const RopeOperand& operand, int64_t batch, int64_t t, const T* cos, const T* sin, int64_t half,
                  bool inverse) {
    const T* x = static_cast<const T*>(operand.x) + batch * operand.strides[0] + t * operand.strides[2];
    T* out = static_cast<T*>(operand.out) + batch * operand.out_strides[0] + t * operand.out_strides[2];
    for (int64_t i = 0; i < half; i += kLanes) {
        const int n = static_cast<int>(half - i < kLanes ? half - i : kLanes);
        const F32 cos_a = load_n(cos + i, n), cos_b = load_n(cos + half + i, n);
        const F32 sin_a = load_n(sin + i, n), sin_b = load_n(sin + half + i, n);
        const F32 to_a = inverse ? sin_b : mul(sin_a, set1(-1.0f));
        const F32 to_b = inverse ? mul(sin_a, set1(-1.0f)) : sin_b;
        for (int64_t h = 0; h < operand.heads; ++h) {
            const T* head = x + h * operand.strides[1] + i;
            T* rotated = out + h * operand.out_strides[1] + i;
            const F32 a = load_n(head, n), b = load_n(head + half, n);
            store_sum_n(rotated, fma(a, cos_a, mul(b, to_a)), n);
            store_sum_n(rotated + half, fma(b, cos_b, mul(a, to_b)), n);
        }
    }
}

template <class T>
void rotate(const Rope& p) {
    parallel_ranges(p.B * p.T, kTokens, [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
            const int64_t batch = token / p.T, t = token % p.T, row = batch * p.table_stride + t * p.D;
            const T *cos = static_cast<const T*>(p.cos) + row, *sin = static_cast<const T*>(p.sin) + row;
            for (const RopeOperand& operand : p.operands) {
                rotate_token(operand, batch, t, cos, sin, p.D / 2, p.inverse);
            }
        }
    });
}

}  // namespace

void rope(const Rope& p) {
    switch (p.dtype) {
        case DType::kFloat32:
            return rotate<float>(p);
        case DType::kBfloat16:
            return rotate<Bf16>(p);
        case DType::kFloat16:
            return rotate<Fp16>(p);
    }
}

}  // namespace qlora::QLORA_ISA
