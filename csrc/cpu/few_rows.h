// y = x W^T for a handful of tokens: the packed weights are streamed once, straight into dot products.
//
// Bound by reading the weights, so nothing is stored on the way: a vector of bytes becomes the values of its high
// nibbles (even k) and those of its low nibbles (odd k) by two table lookups, and x waits in that order. Four rows of W
// run side by side, for their independent sums; lanes hold partial sums over k and are added up at the end of the row.
#pragma once

#include "linear.h"

namespace qlora::QLORA_ISA {

// Beyond this many tokens the panels (gemm.h) are quicker.
inline constexpr int kFewRows = 8;

template <class Mac>
struct Halves;

template <>
struct Halves<FloatMac> {
    using Vector = F32;
    static constexpr int kChunk = 2 * kLanes;
    static Vector load_x(const float* x) { return load(x); }
};

#ifdef __AVX512BF16__
template <>
struct Halves<Bf16Mac> {
    using Vector = __m512i;
    static constexpr int kChunk = 4 * kLanes;
    static Vector load_x(const Bf16* x) { return _mm512_loadu_si512(x); }
};
#endif

// Whether rows are whole blocks and blocks whole chunks; other shapes go through panels.
template <class T>
static inline bool suits_few_rows(const LinearProblem& p) {
    const int64_t blocksize = int64_t{1} << p.weight.block_shift;
    return p.M <= kFewRows && p.weight.K % blocksize == 0 &&
           blocksize % Halves<typename Arithmetic<T>::Mac>::kChunk == 0;
}

// x [M, K] with each chunk's even elements before its odd ones.
template <class T>
static inline typename Arithmetic<T>::Mac::Elem* split_halves(const T* x, int64_t M, int64_t K) {
    using Mac = typename Arithmetic<T>::Mac;
    using Elem = typename Mac::Elem;
    constexpr int kHalf = Halves<Mac>::kChunk / 2;
    Elem* split = static_cast<Elem*>(workspace(Slot::kPackedA, static_cast<size_t>(M * K) * sizeof(Elem)));
    for (int64_t chunk = 0; chunk < M * K; chunk += 2 * kHalf) {
        for (int i = 0; i < kHalf; ++i) {
            split[chunk + i] = from_float<Elem>(to_float(x[chunk + 2 * i]));
            split[chunk + kHalf + i] = from_float<Elem>(to_float(x[chunk + 2 * i + 1]));
        }
    }
    return split;
}

// finish(n, sums) receives y[m, n] without bias for m < kM.
template <class T, int kM, class Finish>
static void few_rows(const NF4Weight& w, const typename Arithmetic<T>::Mac::Elem* x, const Finish& finish) {
    using Mac = typename Arithmetic<T>::Mac;
    using Vector = typename Halves<Mac>::Vector;
    constexpr int kChunk = Halves<Mac>::kChunk;
    constexpr int kRows = kM <= 4 ? 4 : 2;
    const int64_t row_blocks = w.K >> w.block_shift;
    const int64_t blocksize = int64_t{1} << w.block_shift;
    parallel_ranges(w.N, 16, [&](int64_t n0, int64_t n1) {
        for (int64_t n = n0; n < n1; n += kRows) {
            int64_t row[kRows];
            for (int i = 0; i < kRows; ++i) row[i] = n + i < n1 ? n + i : n1 - 1;
            F32 sum[kRows][kM];
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
                for (int m = 0; m < kM; ++m) sum[i][m] = zero();
            }
            for (int64_t b = 0; b < row_blocks; ++b) {
                decltype(Arithmetic<T>::Rounding::code(0.0f)) code[kRows];
                const uint8_t* bytes[kRows];
#pragma GCC unroll 4
                for (int i = 0; i < kRows; ++i) {
                    const int64_t block = row[i] * row_blocks + b;
                    code[i] = Arithmetic<T>::Rounding::code(first_level(w, block));
                    bytes[i] = w.packed + (block << w.block_shift >> 1);
                    __builtin_prefetch(bytes[i] + kRows * (w.K >> 1));
                }
                const typename Mac::Elem* x_block = x + b * blocksize;
                for (int64_t c = 0; c < blocksize; c += kChunk) {
                    Vector even[kRows], odd[kRows];
#pragma GCC unroll 4
                    for (int i = 0; i < kRows; ++i) lookup_halves(code[i], bytes[i] + (c >> 1), even[i], odd[i]);
#pragma GCC unroll 8
                    for (int m = 0; m < kM; ++m) {
                        const Vector x_even = Halves<Mac>::load_x(x_block + m * w.K + c);
                        const Vector x_odd = Halves<Mac>::load_x(x_block + m * w.K + c + kChunk / 2);
#pragma GCC unroll 4
                        for (int i = 0; i < kRows; ++i) {
                            sum[i][m] = Mac::mac(Mac::mac(sum[i][m], x_even, even[i]), x_odd, odd[i]);
                        }
                    }
                }
            }
            for (int i = 0; i < kRows && n + i < n1; ++i) {
                float sums[kM];
                for (int m = 0; m < kM; ++m) sums[m] = hsum(sum[i][m]);
                finish(n + i, sums);
            }
        }
    });
}

// Calls few_rows for the M at hand.
template <class T, int kM = kFewRows, class Finish>
static void few_rows_for(int64_t M, const NF4Weight& w, const typename Arithmetic<T>::Mac::Elem* x,
                         const Finish& finish) {
    if constexpr (kM > 1) {
        if (M < kM) return few_rows_for<T, kM - 1>(M, w, x, finish);
    }
    few_rows<T, kM>(w, x, finish);
}

}  // namespace qlora::QLORA_ISA
