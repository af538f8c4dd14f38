// y = x W^T as dot products along k. Both operands are used in their stored layout; unlike the panels of gemm.h,
// nothing is transposed. The lanes of a row's sums are added once per piece of K.
//
// Two table lookups decode a vector of packed bytes into the values of its high nibbles (even k) and of its low nibbles
// (odd k); x is stored in the same order. For a few tokens, the decoded values are multiplied directly. For more
// tokens, the values of 8 weight rows for one piece of K are decoded into L1 and reused for every token.
//
// The kernel is bound by reading the weights for one or two tokens, and by the FMAs from eight on.
#pragma once

#include "linear.h"

namespace qlora::QLORA_ISA {

// Number of rows of W that are processed together, and bytes of a piece of K: half of L1.
inline constexpr int kGroup = 8;
inline constexpr int64_t kPieceBytes = 16 << 10;

// Rows of W in a register tile, and tokens in it.
inline constexpr int kTileRows = 4;
#if defined(__AVX512F__)
inline constexpr int kTileTokens = 6;
inline constexpr int kDirectTokens = 8;
#elif defined(QLORA_NEON)
inline constexpr int kTileTokens = 6;
inline constexpr int kDirectTokens = 4;  // the fp32 table of a row takes four registers
#else
inline constexpr int kTileTokens = 3;
inline constexpr int kDirectTokens = 4;
#endif

template <class Mac>
struct OperandVector;

template <>
struct OperandVector<Fp32Fma> {
    using Vector = F32;
    static constexpr int kElements = kLanes;
    static Vector load_vector(const float* p) { return load(p); }
    static void store_vector(float* p, Vector v) { store(p, v); }
};

#ifdef __AVX512BF16__
template <>
struct OperandVector<Bf16Dot> {
    using Vector = __m512i;
    static constexpr int kElements = 2 * kLanes;
    static Vector load_vector(const Bf16* p) { return _mm512_loadu_si512(p); }
    static void store_vector(Bf16* p, Vector v) { _mm512_storeu_si512(p, v); }
};
#endif

// Whether dots support the shape (rows of whole blocks, blocks of whole pairs of vectors) and are faster than panels:
// adding lanes costs the same for each sum, even of a short row, while decoding panels costs the same for each weight.
template <class Mac>
static inline bool suits_dots(const NF4Weight& w, int64_t M) {
    const int64_t blocksize = int64_t{1} << w.block_shift;
    return M <= (w.K < 1024 ? 32 : 64) && w.K % blocksize == 0 && blocksize % (2 * OperandVector<Mac>::kElements) == 0;
}

// Splits two vectors into one of their even and one of their odd elements, `stride` apart.
template <class T>
static inline void split_pair(const T* x, float* split, int64_t stride) {
    for (int i = 0; i < kLanes; ++i) {
        split[i] = to_float(x[2 * i]);
        split[stride + i] = to_float(x[2 * i + 1]);
    }
}

#ifdef __AVX512BF16__
static inline void split_pair(const Bf16* x, Bf16* split, int64_t stride) {
    const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32, 30, 28, 26,
                                          24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    const __m512i first = _mm512_loadu_si512(x);
    const __m512i second = _mm512_loadu_si512(x + 32);
    _mm512_storeu_si512(split, _mm512_permutex2var_epi16(first, even, second));
    _mm512_storeu_si512(split + stride, _mm512_permutex2var_epi16(first, odd, second));
}
#endif

// x in tiles of tokens, each [vectors][tokens][kElements]: vector 2i holds the even elements of the i-th pair of
// vectors, and vector 2i + 1 the odd ones.
template <class Mac>
struct PackedTokens {
    using Elem = typename Mac::Elem;
    Elem* data;
    int64_t K;
    Tiling tiling;

    Elem* tile(int64_t t) const { return data + tiling.begin(t) * K; }
};

// Packs x [M, K] with K a whole number of vector pairs.
template <class Mac, class T>
static PackedTokens<Mac> pack_tokens(const T* x, int64_t M, int64_t K, int max_tokens) {
    using Elem = typename Mac::Elem;
    constexpr int kElements = OperandVector<Mac>::kElements;
    const size_t bytes = static_cast<size_t>(M * K) * sizeof(Elem);
    const PackedTokens<Mac> packed{static_cast<Elem*>(workspace(Slot::kRows, bytes)), K, {M, max_tokens}};
    parallel_ranges(packed.tiling.count, 4, [&](int64_t tile0, int64_t tile1) {
        for (int64_t t = tile0; t < tile1; ++t) {
            const int tokens = packed.tiling.size(t);
            const T* rows = x + packed.tiling.begin(t) * K;
            Elem* out = packed.tile(t);
            for (int64_t k = 0; k < K; k += 2 * kElements, out += 2 * tokens * kElements) {
                for (int m = 0; m < tokens; ++m) {
                    split_pair(rows + m * K + k, out + m * kElements, tokens * kElements);
                }
            }
        }
    });
    return packed;
}

// sums[m * kGroup + i] += the lanes of sum[i][m], for four rows i at a time.
template <int kRows, int kM>
static inline void add_lanes(const F32 (&sum)[kRows][kM], float* sums) {
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
        if constexpr (kRows == 4) {
            add_hsums(sum[0][m], sum[1][m], sum[2][m], sum[3][m], sums + m * kGroup);
        } else {
            for (int i = 0; i < kRows; ++i) sums[m * kGroup + i] += hsum(sum[i][m]);
        }
    }
}

// Prefetches `count` bytes at the same offset of the next group into L2; the bytes of this group and x fill L1.
static inline void prefetch_next(const uint8_t* bytes, int64_t group_bytes, int64_t count) {
    for (int64_t byte = 0; byte < count; byte += 64) __builtin_prefetch(bytes + group_bytes + byte, 0, 2);
}

// For at most kDirectTokens tokens: sums[m * kGroup + i] += (row i of W) . (token m) over blocks [block0, block1), for
// kGroup rows. `packed` and `absmax` point to the bytes and the constants of the first row. Rows from `valid` on do not
// exist: they read the last row, and their sums are not used.
template <class T, int kM>
static void direct_tile(const NF4Weight& w, const uint8_t* packed, const float* absmax, int valid, int64_t block0,
                        int64_t block1, const typename Arithmetic<T>::Mac::Elem* x, float* sums) {
    using Mac = typename Arithmetic<T>::Mac;
    using Vector = typename OperandVector<Mac>::Vector;
    constexpr int kElements = OperandVector<Mac>::kElements;
    constexpr int kRows = kM <= kDirectTokens / 2 ? 4 : 2;
    const int64_t row_blocks = w.K >> w.block_shift;
    const int64_t block_bytes = int64_t{1} << w.block_shift >> 1;
    const int64_t group_bytes = kGroup * row_blocks * block_bytes;
    x += block0 * 2 * block_bytes * kM;
    for (int row = 0; row < kGroup; row += kRows, sums += kRows) {
        const uint8_t* bytes[kRows];
        const float* row_absmax[kRows];
        F32 sum[kRows][kM];
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) {
            const int64_t first = (row + i < valid ? row + i : valid - 1) * row_blocks;
            bytes[i] = packed + (first + block0) * block_bytes;
            row_absmax[i] = absmax + first;
#pragma GCC unroll 8
            for (int m = 0; m < kM; ++m) sum[i][m] = zero();
        }
        const typename Mac::Elem* x_pair = x;
        for (int64_t b = block0; b < block1; ++b) {
            decltype(Arithmetic<T>::Rounding::code(0.0f)) code[kRows];
#pragma GCC unroll 4
            for (int i = 0; i < kRows; ++i) {
                code[i] = Arithmetic<T>::Rounding::code(row_absmax[i][b]);
                prefetch_next(bytes[i], group_bytes, block_bytes);
            }
            for (int64_t byte = 0; byte < block_bytes; byte += kElements) {
                Vector even[kRows], odd[kRows];
#pragma GCC unroll 4
                for (int i = 0; i < kRows; ++i) {
                    lookup_even_odd(code[i], bytes[i], even[i], odd[i]);
                    bytes[i] += kElements;
                }
#pragma GCC unroll 8
                for (int m = 0; m < kM; ++m) {
                    const Vector x_even = OperandVector<Mac>::load_vector(x_pair + m * kElements);
                    const Vector x_odd = OperandVector<Mac>::load_vector(x_pair + (kM + m) * kElements);
#pragma GCC unroll 4
                    for (int i = 0; i < kRows; ++i) {
                        sum[i][m] = Mac::mac(Mac::mac(sum[i][m], x_even, even[i]), x_odd, odd[i]);
                    }
                }
                x_pair += 2 * kM * kElements;
            }
        }
        add_lanes(sum, sums);
    }
}

// The values of one row over blocks [block0, block1), in the order of the tokens' vectors.
template <class T>
static inline void decode_even_odd(const uint8_t* packed, const float* absmax, int64_t block_bytes, int64_t block0,
                                   int64_t block1, typename Arithmetic<T>::Mac::Elem* values) {
    using Mac = typename Arithmetic<T>::Mac;
    constexpr int kElements = OperandVector<Mac>::kElements;
    packed += block0 * block_bytes;
    for (int64_t b = block0; b < block1; ++b) {
        const auto code = Arithmetic<T>::Rounding::code(absmax[b]);
        for (int64_t byte = 0; byte < block_bytes; byte += kElements, packed += kElements, values += 2 * kElements) {
            typename OperandVector<Mac>::Vector even, odd;
            lookup_even_odd(code, packed, even, odd);
            OperandVector<Mac>::store_vector(values, even);
            OperandVector<Mac>::store_vector(values + kElements, odd);
        }
    }
}

// sums[m * kGroup + i] += rows[i] times token m, for kGroup rows `stride` apart.
template <class Mac, int kM>
static void dot_tile(const typename Mac::Elem* rows, int64_t stride, int64_t vectors, const typename Mac::Elem* x,
                     float* sums) {
    constexpr int kElements = OperandVector<Mac>::kElements;
    for (int row = 0; row < kGroup; row += kTileRows, rows += kTileRows * stride, sums += kTileRows) {
        F32 sum[kTileRows][kM];
#pragma GCC unroll 4
        for (int i = 0; i < kTileRows; ++i) {
#pragma GCC unroll 8
            for (int m = 0; m < kM; ++m) sum[i][m] = zero();
        }
        for (int64_t v = 0; v < vectors; ++v) {
            typename OperandVector<Mac>::Vector token[kM];
#pragma GCC unroll 8
            for (int m = 0; m < kM; ++m) token[m] = OperandVector<Mac>::load_vector(x + (v * kM + m) * kElements);
#pragma GCC unroll 4
            for (int i = 0; i < kTileRows; ++i) {
                const auto weight = OperandVector<Mac>::load_vector(rows + i * stride + v * kElements);
#pragma GCC unroll 8
                for (int m = 0; m < kM; ++m) sum[i][m] = Mac::mac(sum[i][m], token[m], weight);
            }
        }
        add_lanes(sum, sums);
    }
}

template <class T>
using DirectTile = void (*)(const NF4Weight&, const uint8_t*, const float*, int, int64_t, int64_t,
                            const typename Arithmetic<T>::Mac::Elem*, float*);

template <class T, int kM = kDirectTokens>
static DirectTile<T> direct_tile_for(int64_t tokens) {
    if constexpr (kM > 1) {
        if (tokens < kM) return direct_tile_for<T, kM - 1>(tokens);
    }
    return direct_tile<T, kM>;
}

template <class Mac>
using DotTile = void (*)(const typename Mac::Elem*, int64_t, int64_t, const typename Mac::Elem*, float*);

template <class Mac, int kM = kTileTokens>
static DotTile<Mac> dot_tile_for(int tokens) {
    if constexpr (kM > 1) {
        if (tokens < kM) return dot_tile_for<Mac, kM - 1>(tokens);
    }
    return dot_tile<Mac, kM>;
}

// y [M, N] = start + x W^T + bias. start(n, valid, sums): initial values of rows n to n + valid, sums[M][kGroup].
template <class T, class Start>
static void linear_dots(const NF4Weight& w, int64_t M, const T* x, const float* bias, T* y, const Start& start) {
    using Mac = typename Arithmetic<T>::Mac;
    using Elem = typename Mac::Elem;
    constexpr int kElements = OperandVector<Mac>::kElements;
    const bool direct = M <= kDirectTokens;
    const PackedTokens<Mac> tokens = pack_tokens<Mac>(x, M, w.K, direct ? kDirectTokens : kTileTokens);
    const int64_t block_bytes = int64_t{1} << w.block_shift >> 1;
    const int64_t row_blocks = w.K >> w.block_shift;
    const int64_t piece_rows = direct ? M : kGroup;  // of x, or of decoded weights
    const int64_t max_blocks = kPieceBytes / (piece_rows * static_cast<int64_t>(sizeof(Elem))) >> w.block_shift;
    const int64_t pieces = max_blocks > 0 ? (row_blocks + max_blocks - 1) / max_blocks : row_blocks;
    const int64_t step = (row_blocks + pieces - 1) / pieces;
    const int64_t stride = step << w.block_shift;
    const int64_t group_bytes = kGroup * row_blocks * block_bytes;

    parallel_ranges(w.N, kGroup, [&](int64_t n0, int64_t n1) {
        const size_t absmax_bytes = static_cast<size_t>(kGroup * row_blocks) * sizeof(float);
        const size_t value_bytes = direct ? 0 : static_cast<size_t>(kGroup * stride) * sizeof(Elem);
        const size_t sum_bytes = static_cast<size_t>(M * kGroup) * sizeof(float);
        uint8_t* space = static_cast<uint8_t*>(workspace(Slot::kPartial, value_bytes + sum_bytes + absmax_bytes));
        Elem* values = reinterpret_cast<Elem*>(space);
        float* sums = reinterpret_cast<float*>(space + value_bytes);
        float* absmax = reinterpret_cast<float*>(space + value_bytes + sum_bytes);
        for (int64_t n = n0; n < n1; n += kGroup) {
            const int valid = static_cast<int>(n1 - n < kGroup ? n1 - n : kGroup);
            const uint8_t* packed = w.packed + (n * w.K >> 1);
            decode_absmax(w, n * row_blocks, valid * row_blocks, absmax);
            start(n, valid, sums);
            for (int64_t block = 0; block < row_blocks; block += step) {
                const int64_t end = block + step < row_blocks ? block + step : row_blocks;
                if (direct) {
                    direct_tile_for<T>(M)(w, packed, absmax, valid, block, end, tokens.tile(0), sums);
                    continue;
                }
                for (int i = 0; i < kGroup; ++i) {
                    const int64_t row = i < valid ? i : valid - 1;
                    prefetch_next(packed + (row * row_blocks + block) * block_bytes, group_bytes,
                                  (end - block) * block_bytes);
                    decode_even_odd<T>(packed + row * row_blocks * block_bytes, absmax + row * row_blocks, block_bytes,
                                       block, end, values + i * stride);
                }
                const int64_t k = block << w.block_shift;
                const int64_t vectors = ((end - block) << w.block_shift) / kElements;
                for (int64_t t = 0; t < tokens.tiling.count; ++t) {
                    const int size = tokens.tiling.size(t);
                    dot_tile_for<Mac>(size)(values, stride, vectors, tokens.tile(t) + k * size,
                                            sums + tokens.tiling.begin(t) * kGroup);
                }
            }
            for (int64_t m = 0; m < M; ++m) {
                float row[kGroup];
                for (int i = 0; i < kGroup; ++i)
                    row[i] = sums[m * kGroup + i] + (bias && i < valid ? bias[n + i] : 0.0f);
                T* out = y + m * w.N + n;
                for (int i = 0; i < valid; ++i) out[i] = from_float<T>(row[i]);
            }
        }
    });
}

}  // namespace qlora::QLORA_ISA
