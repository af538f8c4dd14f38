// rms_norm: residual addition and root mean square norm, forward and backward (qlora_kernels/ops/rms_norm.py).
//
// It is bound by memory: each row is read once, and its second use hits L1. The number of rows per task does not depend
// on the number of threads, so that the sums of grad_weight have the same bits for any number.
#include <cmath>

#include "ops.h"
#include "qlora/parallel.h"
#include "qlora/workspace.h"
#include "simd.h"

namespace qlora::QLORA_ISA {
namespace {

constexpr int kSums = 4;  // independent chains of additions in a row
constexpr int64_t kTaskElements = 1 << 15;
constexpr int64_t kMostParts = 64;

// step(column, n, chain) for each vector of a row.
template <class Step>
static inline void each_vector(int64_t columns, const Step& step) {
    int64_t c = 0;
    for (; c + kSums * kLanes <= columns; c += kSums * kLanes) {
        for (int i = 0; i < kSums; ++i) step(c + i * kLanes, kLanes, i);
    }
    for (int i = 0; c < columns; c += kLanes, ++i) {
        step(c, static_cast<int>(columns - c < kLanes ? columns - c : kLanes), i % kSums);
    }
}

static inline float total_of(const F32 (&sums)[kSums]) {
    return hsum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

// The weight plus its offset, in fp32.
const float* factors(const RmsNorm& p) {
    if (p.weight.dtype == DType::kFloat32 && p.offset == 0.0f) return static_cast<const float*>(p.weight.data);
    float* out = static_cast<float*>(workspace(Slot::kSmall, static_cast<size_t>(p.columns) * sizeof(float)));
    const auto convert = [&](const auto* weight) {
        for (int64_t c = 0; c < p.columns; ++c) out[c] = to_float(weight[c]) + p.offset;
    };
    switch (p.weight.dtype) {
        case DType::kFloat32:
            convert(static_cast<const float*>(p.weight.data));
            break;
        case DType::kBfloat16:
            convert(static_cast<const Bf16*>(p.weight.data));
            break;
        case DType::kFloat16:
            convert(static_cast<const Fp16*>(p.weight.data));
            break;
    }
    return out;
}

template <class T, class Y>
void forward_row(const RmsNorm& p, const float* weight, const T* x, const T* residual, float eps, T* s, Y* y,
                 float* scale) {
    F32 sums[kSums] = {zero(), zero(), zero(), zero()};
    each_vector(p.columns, [&](int64_t c, int n, int chain) {
        F32 v = load_n(x + c, n);
        if (residual) {
            store_n(s + c, add(v, load_n(residual + c, n)), n);
            v = load_n(s + c, n);
        }
        sums[chain] = fma(v, v, sums[chain]);
    });
    *scale = 1.0f / std::sqrt(total_of(sums) / static_cast<float>(p.columns) + eps);
    const F32 factor = set1(*scale);
    const T* source = residual ? s : x;
    const bool rounds = p.offset == 0.0f;
    each_vector(p.columns, [&](int64_t c, int n, int) {
        const F32 normalized = mul(load_n(source + c, n), factor);
        const F32 kept = rounds ? rounded_to<T>(normalized) : normalized;
        store_sum_n(y + c, mul(kept, load_n(weight + c, n)), n);
    });
}

// sums [columns], or null: grad_weight of the rows processed so far.
template <class T, class Y>
void backward_row(const RmsNorm& p, const float* weight, const Y* grad_y, const T* grad_s, const T* s, float scale,
                  T* grad_x, float* grad_weight) {
    F32 sums[kSums] = {zero(), zero(), zero(), zero()};
    const F32 factor = set1(scale);
    each_vector(p.columns, [&](int64_t c, int n, int chain) {
        const F32 part = mul(load_n(grad_y + c, n), mul(load_n(s + c, n), factor));
        sums[chain] = fma(part, load_n(weight + c, n), sums[chain]);
        if (grad_weight) store_n(grad_weight + c, add(part, load_n(grad_weight + c, n)), n);
    });
    const F32 along = set1(-total_of(sums) / static_cast<float>(p.columns) * scale);
    each_vector(p.columns, [&](int64_t c, int n, int) {
        const F32 g = mul(load_n(grad_y + c, n), load_n(weight + c, n));
        F32 out = mul(factor, fma(load_n(s + c, n), along, g));
        if (grad_s) out = add(out, load_n(grad_s + c, n));
        store_sum_n(grad_x + c, out, n);
    });
}

// Rows per task, for about kTaskElements elements.
int64_t rows_of_task(const RmsNorm& p) {
    const int64_t rows = kTaskElements / p.columns;
    return rows < 1 ? 1 : rows;
}

template <class T, class Y>
void forward(const RmsNorm& p, const T* x, const T* residual, float eps, T* s, Y* y, float* scale) {
    const float* weight = factors(p);
    const int64_t C = p.columns;
    parallel_ranges(p.rows, rows_of_task(p), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const T* added = residual ? residual + r * C : nullptr;
            forward_row(p, weight, x + r * C, added, eps, s ? s + r * C : nullptr, y + r * C, scale + r);
        }
    });
}

template <class T, class Y>
void backward(const RmsNorm& p, const Y* grad_y, const T* grad_s, const T* s, const float* scale, T* grad_x,
              float* grad_weight) {
    const float* weight = factors(p);
    const int64_t C = p.columns;
    const auto rows = [&](int64_t begin, int64_t end, float* sums) {
        for (int64_t r = begin; r < end; ++r) {
            const T* added = grad_s ? grad_s + r * C : nullptr;
            backward_row(p, weight, grad_y + r * C, added, s + r * C, scale[r], grad_x + r * C, sums);
        }
    };
    if (!grad_weight) {
        parallel_ranges(p.rows, rows_of_task(p), [&](int64_t begin, int64_t end) { rows(begin, end, nullptr); });
        return;
    }
    int64_t length = rows_of_task(p);
    if (length * kMostParts < p.rows) length = (p.rows + kMostParts - 1) / kMostParts;
    const int64_t parts = (p.rows + length - 1) / length;
    const size_t bytes = static_cast<size_t>(parts * C) * sizeof(float);
    float* partial = static_cast<float*>(workspace(Slot::kPartial, bytes));
    parallel_tasks(parts, [&](int64_t part) {
        float* sums = partial + part * C;
        memset(sums, 0, static_cast<size_t>(C) * sizeof(float));
        const int64_t begin = part * length;
        rows(begin, begin + length < p.rows ? begin + length : p.rows, sums);
    });
    memcpy(grad_weight, partial, static_cast<size_t>(C) * sizeof(float));
    for (int64_t part = 1; part < parts; ++part) {
        for (int64_t c = 0; c < C; ++c) grad_weight[c] += partial[part * C + c];
    }
}

// run(T, Y) with null pointers of x's and y's types.
template <class Run>
void with_types(const RmsNorm& p, const Run& run) {
    const bool wide = p.y_dtype == DType::kFloat32;
    switch (p.dtype) {
        case DType::kFloat32:
            return run(static_cast<float*>(nullptr), static_cast<float*>(nullptr));
        case DType::kBfloat16:
            return wide ? run(static_cast<Bf16*>(nullptr), static_cast<float*>(nullptr))
                        : run(static_cast<Bf16*>(nullptr), static_cast<Bf16*>(nullptr));
        case DType::kFloat16:
            return wide ? run(static_cast<Fp16*>(nullptr), static_cast<float*>(nullptr))
                        : run(static_cast<Fp16*>(nullptr), static_cast<Fp16*>(nullptr));
    }
}

}  // namespace

void rms_norm(const RmsNorm& p, const void* x, const void* residual, float eps, void* s, void* y, float* scale) {
    with_types(p, [&]<class T, class Y>(T*, Y*) {
        forward(p, static_cast<const T*>(x), static_cast<const T*>(residual), eps, static_cast<T*>(s),
                static_cast<Y*>(y), scale);
    });
}

void add_residual(DType dtype, int64_t n, const void* x, const void* residual, void* s) {
    const auto add_rows = [n]<class T>(const T* x, const T* residual, T* s) {
        parallel_ranges(n, kTaskElements, [=](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; i += kLanes) {
                const int count = static_cast<int>(end - i < kLanes ? end - i : kLanes);
                store_n(s + i, add(load_n(x + i, count), load_n(residual + i, count)), count);
            }
        });
    };
    switch (dtype) {
        case DType::kFloat32:
            return add_rows(static_cast<const float*>(x), static_cast<const float*>(residual), static_cast<float*>(s));
        case DType::kBfloat16:
            return add_rows(static_cast<const Bf16*>(x), static_cast<const Bf16*>(residual), static_cast<Bf16*>(s));
        case DType::kFloat16:
            return add_rows(static_cast<const Fp16*>(x), static_cast<const Fp16*>(residual), static_cast<Fp16*>(s));
    }
}

void rms_norm_backward(const RmsNorm& p, const void* grad_y, const void* grad_s, const void* s, const float* scale,
                       void* grad_x, float* grad_weight) {
    with_types(p, [&]<class T, class Y>(T*, Y*) {
        backward(p, static_cast<const Y*>(grad_y), static_cast<const T*>(grad_s), static_cast<const T*>(s), scale,
                 static_cast<T*>(grad_x), grad_weight);
    });
}

}  // namespace qlora::QLORA_ISA
