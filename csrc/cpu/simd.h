// The vector vocabulary of the kernels. Each kernel source is compiled once per instruction set (QLORA_ISA names it,
// and is the namespace); this header picks the words for the one at hand:
//
//     F32, kLanes                          a vector of floats and its length
//     load, load_n, store, store_n         from and to float, Bf16, Fp16; _n touches only the first n elements
//     zero, set1, fma, add, mul, max_magnitude, hsum
//     keep(v, bits)                        lane i of v where bit i is set, else 0
//     kTranspose, transpose_tile           dst[c * dst_ld + r] = src[r * ld + c] on dwords, a square tile
//     Code16, code16<T, E>, lookup         sixteen values of one block, looked up by nibbles (decode.h)
#pragma once

#include <cstdint>
#include <cstring>

#include "qlora/dtypes.h"

#ifndef QLORA_ISA
#error "compile with -DQLORA_ISA=portable|avx2|avx512|avx512_bf16 (python/build_support/cpu.py)"
#endif

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace qlora::QLORA_ISA {

template <class T>
static inline F32 load_n(const T* p, int n) {
    if (n == kLanes) return load(p);
    T padded[kLanes] = {};
    memcpy(padded, p, n * sizeof(T));
    return load(padded);
}

template <class T>
static inline void store_n(T* p, F32 v, int n) {
    if (n == kLanes) return store(p, v);
    T padded[kLanes];
    store(padded, v);
    memcpy(p, padded, n * sizeof(T));
}

// dst[c * dst_ld + r] = src[r * src_ld + c] for rows x columns dwords; writes exactly `rows` dwords of each dst row.
static inline void transpose_dwords(const uint32_t* src, int64_t src_ld, int rows, int64_t columns, uint32_t* dst,
                                    int64_t dst_ld) {
    for (int r = 0; r < rows; r += kTranspose) {
        const int height = rows - r < kTranspose ? rows - r : kTranspose;
        int64_t c = 0;
        for (; c + kTranspose <= columns; c += kTranspose) {
            transpose_tile(src + r * src_ld + c, src_ld, height, dst + c * dst_ld + r, dst_ld);
        }
        for (; c < columns; ++c) {
            for (int i = 0; i < height; ++i) dst[c * dst_ld + r + i] = src[(r + i) * src_ld + c];
        }
    }
}

// As store, but free to take a subnormal bf16 for zero: results of sums, not of the codec.
template <class T>
static inline void store_sum(T* p, F32 v) {
    store(p, v);
}

#ifdef __AVX512BF16__
static inline void store_sum(Bf16* p, F32 v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), round_bf16_fast(v)); }
#endif

template <class T>
static inline void store_sum_n(T* p, F32 v, int n) {
    if (n == kLanes) return store_sum(p, v);
    store_n(p, v, n);
}

}  // namespace qlora::QLORA_ISA
