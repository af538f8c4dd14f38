// Shared parts of the linear ops: the arithmetic for x's dtype, panels of the quantized weight, loads and stores of
// tiles.
#pragma once

#include "kernels.h"
#include "pack.h"

namespace qlora::QLORA_ISA {

inline constexpr int kVectors = 2;
inline constexpr int kColumns = kVectors * kLanes;

// Maps x's dtype T to the arithmetic. The weight is always rounded to T, so that y is x @ dequantize(W, T)^T.
template <class T>
struct Arithmetic {
    using Mac = Fp32Fma;
    using Rounding = RoundWidened<T>;
};

#ifdef __AVX512BF16__
template <>
struct Arithmetic<Bf16> {
    using Mac = Bf16Dot;
    using Rounding = RoundForDot;
};
#endif

// Distance in rows by which grad_x's panels prefetch. Panels read short pieces of many rows, which hardware prefetchers
// do not detect.
inline constexpr int64_t kPrefetchRows = 8;

// B[k, n] = W[n, k], for y = x W^T.
template <class T>
static inline auto weight_columns(const NF4Weight& w) {
    using A = Arithmetic<T>;
    return [&w](const PanelRange& range, typename A::Mac::Elem* panel) {
        fill_from_rows<typename A::Mac, kColumns>(range, w.K, panel,
                                                  [&](int64_t n, int64_t k, int64_t count, typename A::Mac::Elem* dst) {
                                                      const int64_t begin = n * w.K + k;
                                                      prefetch_range(w, begin + count, count);
                                                      decode_range<typename A::Rounding>(w, begin, begin + count, dst);
                                                  });
    };
}

// dst[i] = W[n, k + i] for i < count; also prefetches a later row.
template <class T>
static inline void weight_row(const NF4Weight& w, int64_t n, int64_t k, int64_t count,
                              typename Arithmetic<T>::Mac::Elem* dst) {
    const int64_t begin = n * w.K + k;
    prefetch_range(w, begin + kPrefetchRows * w.K, count);
    decode_range<typename Arithmetic<T>::Rounding>(w, begin, begin + count, dst);
}

// B[n, k] = W[n, k], for grad_x = grad_y W: the same bytes, decoded without a transposition.
template <class T>
static inline auto weight_rows(const NF4Weight& w) {
    using Mac = typename Arithmetic<T>::Mac;
    return [&w](const PanelRange& range, typename Mac::Elem* panel) {
        fill_from_columns<Mac, kColumns>(range, w.N, panel,
                                         [&](int64_t n, int64_t k, int64_t count, typename Mac::Elem* dst) {
                                             weight_row<T>(w, n, k, count, dst);
                                             return dst;
                                         });
    };
}

// Stores one tile's accumulators, plus a bias by column if given, to rows of a row-major [*, row_length] output.
template <int kWidth, class T>
static inline void store_tile(const float* c, const Tiling& tiling, int64_t tile, int64_t column0, int64_t columns,
                              int64_t row_length, T* out, const float* bias = nullptr) {
    F32 added[kWidth / kLanes];
    for (int64_t j = 0; j < kWidth; j += kLanes) {
        const int n = static_cast<int>(columns - j < 0 ? 0 : columns - j < kLanes ? columns - j : kLanes);
        added[j / kLanes] = bias && n > 0 ? load_n(bias + column0 + j, n) : zero();
    }
    const int64_t row0 = tiling.begin(tile);
    const int rows = tiling.size(tile);
    T* row = out + row0 * row_length + column0;
    if constexpr (kWidth == 2 * kLanes) {
        if (columns == kWidth) {
            for (int i = 0; i < rows; ++i, c += kWidth, row += row_length) {
                store_sums(row, add(load(c), added[0]), add(load(c + kLanes), added[1]));
            }
            return;
        }
    }
    for (int i = 0; i < rows; ++i, c += kWidth, row += row_length) {
        for (int64_t j = 0; j < columns; j += kLanes) {
            const F32 sum = add(load(c + j), added[j / kLanes]);
            store_sum_n(row + j, sum, static_cast<int>(columns - j < kLanes ? columns - j : kLanes));
        }
    }
}

// Lets the tile kernel store a strip of a row-major [*, row_length] output, if it can and the strip is whole.
template <class Mac, class T>
static inline void store_in_kernel(T* out, int64_t row_length, int64_t column0, int64_t columns, StripEnd<Mac>& end) {
    if constexpr (Mac::kRoundsTiles && std::is_same_v<T, typename Mac::Elem>) {
        if (columns != kColumns) return;
        end.out = out + column0;
        end.out_stride = row_length;
    }
}

// The bias as fp32 in scratch memory; null stays null.
static inline const float* bias_as_float(AnyFloat bias, int64_t N) {
    if (!bias.data) return nullptr;
    if (bias.dtype == DType::kFloat32) return static_cast<const float*>(bias.data);
    float* converted = static_cast<float*>(workspace(Slot::kSmall, static_cast<size_t>(N) * sizeof(float)));
    convert_row(bias, 0, N, converted);
    return converted;
}

// Calls body(static_cast<T*>(nullptr)) for the C++ type of `dtype`.
template <class Body>
static inline void with_type(DType dtype, const Body& body) {
    switch (dtype) {
        case DType::kFloat32:
            return body(static_cast<float*>(nullptr));
        case DType::kBfloat16:
            return body(static_cast<Bf16*>(nullptr));
        case DType::kFloat16:
            return body(static_cast<Fp16*>(nullptr));
    }
}

}  // namespace qlora::QLORA_ISA
