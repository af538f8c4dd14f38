// Operands of panel_gemm (gemm.h): rows of x, of gradients and of LoRA factors, in place, copied, or as panels.
#pragma once

#include <type_traits>

#include "gemm.h"

namespace qlora::QLORA_ISA {

// Elements of a conversion buffer; a few rows of this length fit in L1.
inline constexpr int64_t kSpan = 256;

// dst[i] = src[i], converted, for the combinations that the ops need.
template <class T, class E>
static inline void convert_row(const T* src, int64_t n, E* dst) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const int m = static_cast<int>(n - i < kLanes ? n - i : kLanes);
        store_n(dst + i, load_n(src + i, m), m);
    }
}

static inline void convert_row(const float* src, int64_t n, float* dst) { memcpy(dst, src, n * sizeof(float)); }
static inline void convert_row(const Bf16* src, int64_t n, Bf16* dst) { memcpy(dst, src, n * sizeof(Bf16)); }

template <class E>
static inline void convert_row(const AnyFloat& src, int64_t offset, int64_t n, E* dst) {
    switch (src.dtype) {
        case DType::kFloat32:
            return convert_row(static_cast<const float*>(src.data) + offset, n, dst);
        case DType::kBfloat16:
            return convert_row(static_cast<const Bf16*>(src.data) + offset, n, dst);
        case DType::kFloat16:
            return convert_row(static_cast<const Fp16*>(src.data) + offset, n, dst);
    }
}

// dst[i] = src[offset + i] * scale, rounded to x's dtype T, as `lora_A.to(x.dtype)` is, for any arithmetic type E.
template <class T, class E>
static inline void factor_row(const AnyFloat& src, int64_t offset, int64_t n, float scale, E* dst) {
    float values[kSpan];
    const F32 factor = set1(scale);
    for (int64_t i = 0; i < n; i += kSpan) {
        const int64_t m = n - i < kSpan ? n - i : kSpan;
        convert_row(src, offset + i, m, values);
        for (int64_t j = 0; j < m; j += kLanes) {
            T rounded[kLanes];
            store(rounded, mul(load(values + j), factor));
            store_n(dst + i + j, load(rounded), static_cast<int>(m - j < kLanes ? m - j : kLanes));
        }
    }
}

template <class E>
static inline void zero_row(E* dst, int64_t n) {
    if (n > 0) memset(dst, 0, static_cast<size_t>(n) * sizeof(E));
}

// The 64 bits of a bitmap from bit `position` on, the first in bit 0. The bitmap is padded by eight bytes.
static inline uint64_t bits_at(const uint8_t* bits, int64_t position) {
    uint64_t word;
    memcpy(&word, bits + (position >> 3), sizeof word);
    return word >> (position & 7);
}

// dst[i] = src[i] if bit (position + i) is set, otherwise 0.
template <class T, class E>
static inline void masked_row(const T* src, int64_t n, const uint8_t* bits, int64_t position, E* dst) {
    for (int64_t i = 0; i < n; i += kLanes) {
        const int m = static_cast<int>(n - i < kLanes ? n - i : kLanes);
        store_n(dst + i, keep(load_n(src + i, m), static_cast<uint32_t>(bits_at(bits, position + i))), m);
    }
}

#ifdef __AVX512BW__
// Uses the bits as the mask of a load, without arithmetic.
static inline void masked_row(const Bf16* src, int64_t n, const uint8_t* bits, int64_t position, Bf16* dst) {
    for (int64_t i = 0; i < n; i += 32) {
        const __mmask32 inside = n - i < 32 ? (1u << (n - i)) - 1 : 0xffffffff;
        const __mmask32 kept = static_cast<__mmask32>(bits_at(bits, position + i)) & inside;
        _mm512_mask_storeu_epi16(dst + i, inside, _mm512_maskz_loadu_epi16(kept, src + i));
    }
}
#endif

// Strides that are multiples of 2 KiB map to 2 L1 sets (4 KiB per way), so that the rows of a tile evict each other.
inline constexpr int64_t kConflict = 2048;

// Elements from one row of a copied operand to the next.
template <class Elem>
static inline int64_t copy_stride(int64_t length) {
    constexpr int64_t kLine = 64 / sizeof(Elem);
    const int64_t stride = (length + kLine - 1) / kLine * kLine;
    return stride * static_cast<int64_t>(sizeof(Elem)) % kConflict == 0 ? stride + kLine : stride;
}

// A[m, l] for l < length from read(m, dst), which writes a row, in `data`, M * copy_stride(length) elements.
template <class Mac, class Read>
static LhsView<Mac> lhs_copy(typename Mac::Elem* data, int64_t M, int64_t length, const Read& read) {
    using Elem = typename Mac::Elem;
    const int64_t steps = steps_of<Mac>(length), stride = copy_stride<Elem>(length);
    parallel_ranges(M, kMaxRows, [&](int64_t m0, int64_t m1) {
        for (int64_t m = m0; m < m1; ++m) {
            Elem* row = data + m * stride;
            read(m, row);
            zero_row(row + length, steps * Mac::kPair - length);
        }
    });
    return {data, stride, Mac::kPair, steps, {M, kMaxRows}};
}

template <class Mac, class Read>
static LhsView<Mac> lhs_copy(Slot slot, int64_t M, int64_t length, const Read& read) {
    using Elem = typename Mac::Elem;
    const size_t bytes = static_cast<size_t>(M * copy_stride<Elem>(length)) * sizeof(Elem);
    return lhs_copy<Mac>(static_cast<Elem*>(workspace(slot, bytes)), M, length, read);
}

// Whether rows of `length` elements of T are read in place: their dtype and their stride allow it.
template <class Mac, class T>
static inline bool reads_in_place(int64_t length) {
    if constexpr (!std::is_same_v<T, typename Mac::Elem>) return false;
    return length % Mac::kPair == 0 && length * static_cast<int64_t>(sizeof(T)) % kConflict != 0;
}

// A[m, l] = src[m * length + l], in place or in `copy`, M * copy_stride(length) elements.
template <class Mac, class T>
static LhsView<Mac> lhs_view(const T* src, int64_t M, int64_t length, typename Mac::Elem* copy) {
    if constexpr (std::is_same_v<T, typename Mac::Elem>) {
        if (reads_in_place<Mac, T>(length)) return {src, length, Mac::kPair, length / Mac::kPair, {M, kMaxRows}};
    }
    return lhs_copy<Mac>(copy, M, length,
                         [&](int64_t m, typename Mac::Elem* dst) { convert_row(src + m * length, length, dst); });
}

template <class Mac, class T>
static LhsView<Mac> lhs_view(Slot slot, const T* src, int64_t M, int64_t length) {
    using Elem = typename Mac::Elem;
    const size_t bytes = static_cast<size_t>(M * copy_stride<Elem>(length)) * sizeof(Elem);
    return lhs_view<Mac>(src, M, length,
                         reads_in_place<Mac, T>(length) ? nullptr : static_cast<Elem*>(workspace(slot, bytes)));
}

// A[j, m] = src[m * stride + j] for j < r, for products that contract over tokens: in place, or with the rows of a pair
// interleaved.
template <class Mac, class T>
static LhsView<Mac> lhs_transposed(Slot slot, const T* src, int64_t M, int64_t r, int64_t stride) {
    using Elem = typename Mac::Elem;
    constexpr int64_t kPair = Mac::kPair;
    const int64_t steps = steps_of<Mac>(M);
    if constexpr (kPair == 1 && std::is_same_v<T, Elem>) {
        return {src, 1, stride, steps, {r, kMaxRows}};
    } else {
        Elem* out = static_cast<Elem*>(workspace(slot, static_cast<size_t>(steps * r * kPair) * sizeof(Elem)));
        if constexpr (kPair == 1) {
            for (int64_t m = 0; m < M; ++m) convert_row(src + m * stride, r, out + m * r);
        } else {
            static_assert(std::is_same_v<T, Elem>);
            constexpr int kAtOnce = 16;
            for (int64_t m = 0; m < M; m += kPair) {
                const Elem* row = src + m * stride;
                const Elem* next = m + 1 < M ? row + stride : nullptr;
                Elem* pairs = out + m * r;
                int64_t j = 0;
                for (; next && j + kAtOnce <= r; j += kAtOnce) {
                    interleave<kAtOnce>(row + j, next + j, reinterpret_cast<uint32_t*>(pairs + kPair * j));
                }
                for (; j < r; ++j) {
                    const Elem pair[kPair] = {row[j], next ? next[j] : Elem{}};
                    memcpy(pairs + kPair * j, pair, sizeof pair);
                }
            }
        }
        return {out, kPair, kPair * r, steps, {r, kMaxRows}};
    }
}

// Panel strips whose columns are rows of the source: B[l, n] = row n, element l. `read(n, begin, count, dst)`.
template <class Mac, int kColumns, class Read>
static void fill_from_rows(const PanelRange& range, int64_t length, typename Mac::Elem* panel, const Read& read) {
    using Elem = typename Mac::Elem;
    constexpr int kPair = Mac::kPair;
    const auto [column0, columns, step0, step1] = range;
    alignas(64) Elem rows[kTranspose][kSpan];
    for (int64_t strip = 0; strip < columns; strip += kColumns) {
        for (int r0 = 0; r0 < kColumns; r0 += kTranspose) {
            Elem* out = panel + r0 * kPair;
            for (int64_t s = step0; s < step1; s += kSpan / kPair) {
                const int64_t steps = step1 - s < kSpan / kPair ? step1 - s : kSpan / kPair;
                const int64_t begin = s * kPair;
                const int64_t count = begin + steps * kPair <= length ? steps * kPair : length - begin;
                for (int i = 0; i < kTranspose; ++i) {
                    const int64_t column = strip + r0 + i;
                    const int64_t n = column < columns ? count : 0;
                    if (n > 0) read(column0 + column, begin, n, rows[i]);
                    zero_row(rows[i] + n, steps * kPair - n);
                }
                transpose_dwords(reinterpret_cast<const uint32_t*>(rows), kSpan / kPair, kTranspose, steps,
                                 reinterpret_cast<uint32_t*>(out), kColumns);
                out += steps * kColumns * kPair;
            }
        }
        panel += (step1 - step0) * kColumns * kPair;
    }
}

// Panel strips whose columns are columns of the source: B[l, n] = row l, element n. `read(l, begin, count, dst)`
// returns the elements: in dst, or in place if all columns of the strips exist.
template <class Mac, int kColumns, class Read>
static void fill_from_columns(const PanelRange& range, int64_t length, typename Mac::Elem* panel, const Read& read) {
    using Elem = typename Mac::Elem;
    constexpr int kPair = Mac::kPair;
    constexpr int kWidest = kColumns * static_cast<int>(kMaxGroup);
    const auto [column0, columns, step0, step1] = range;
    const int64_t strips = (columns + kColumns - 1) / kColumns;
    const int64_t strip_size = (step1 - step0) * kColumns * kPair;
    alignas(64) Elem buffers[kPair][kWidest];
    for (int p = 0; p < kPair; ++p) zero_row(buffers[p] + columns, strips * kColumns - columns);
    for (int64_t s = step0; s < step1; ++s) {
        const Elem* rows[kPair];
        for (int p = 0; p < kPair; ++p) {
            const int64_t l = s * kPair + p;
            if (l < length) {
                rows[p] = read(l, column0, columns, buffers[p]);
            } else {
                zero_row(buffers[p], columns);
                rows[p] = buffers[p];
            }
        }
        for (int64_t strip = 0; strip < strips; ++strip) {
            Elem* out = panel + strip * strip_size + (s - step0) * kColumns * kPair;
            const int64_t at = strip * kColumns;
            if constexpr (kPair == 1) {
                memcpy(out, rows[0] + at, kColumns * sizeof(Elem));
            } else {
                interleave<kColumns>(rows[0] + at, rows[1] + at, reinterpret_cast<uint32_t*>(out));
            }
        }
    }
}

}  // namespace qlora::QLORA_ISA
