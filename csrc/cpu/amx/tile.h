// The AMX tile operations for bf16: the instructions or, with QLORA_EMULATE_AMX defined, an emulation, which tests use
// on machines without AMX.
//
//     TileSession                 configures the eight tiles of this thread, 16 rows x 64 bytes each; its destructor
//                                 releases them
//     zero_tile<T>()              tile T = 0
//     load_tile<T>(p, stride)     tile T = 16 rows of 64 bytes, the first at p, `stride` bytes apart (64 by default)
//     load_tile_streaming<T>(p)   load_tile with a hint that L1 need not keep the lines
//     store_tile<T>(p, stride)    stores tile T to 16 rows, as load_tile loads them
//     tile_dot<C, L, R>()         C[i][j] += sum_p L[i][2p] * R[p][2j] + L[i][2p + 1] * R[p][2j + 1], fp32 sums of bf16
//
// In all kernels, tiles 0 to 3 are accumulators and tiles 4 to 7 operands.
//
// The emulation computes the hardware's results bit for bit: within one instruction, the even and the odd products of
// the pairs are summed in two chains of fused multiply-adds that start at zero; the chains are added, and their sum is
// added to C. Subnormal operands and results are flushed to zero, and rounding is to nearest even for any MXCSR. It
// needs AVX-512. Source: Intel's instruction set extensions reference, TDPBF16PS; compared with hardware on 4.6 million
// values.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace qlora::QLORA_ISA {

inline constexpr int kTileRows = 16;
inline constexpr int kTileRowBytes = 64;
inline constexpr int kTileBytes = kTileRows * kTileRowBytes;
inline constexpr int kTileFloats = kTileBytes / 4;

#ifndef QLORA_EMULATE_AMX

// The assembler needs no compiler flag for these instructions, and the compiler itself never emits one. The "memory"
// clobbers keep program order: GCC 12's intrinsics have none, and a tile load could move above the vector stores that
// fill its source.
struct TileSession {
    TileSession() {
        struct alignas(64) {
            uint8_t palette = 1, start_row = 0, reserved[14] = {};
            uint16_t row_bytes[16] = {};
            uint8_t rows[16] = {};
        } config;
        for (int t = 0; t < 8; ++t) config.row_bytes[t] = kTileRowBytes, config.rows[t] = kTileRows;
        asm volatile("ldtilecfg %0" ::"m"(config));
    }
    // A thread with configured tiles saves 8 KiB more state at every context switch.
    ~TileSession() { asm volatile("tilerelease" ::); }
    TileSession(const TileSession&) = delete;
    TileSession& operator=(const TileSession&) = delete;
};

template <int T>
static inline void zero_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
static inline void load_tile(const void* p, int64_t stride = kTileRowBytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
static inline void load_tile_streaming(const void* p) {
    asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(int64_t{kTileRowBytes}), "i"(T) : "memory");
}
template <int T>
static inline void store_tile(void* p, int64_t stride = kTileRowBytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int L, int R>
static inline void tile_dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(L), "i"(R));
}

#else

struct EmulatedTiles {
    bool configured = false;
    alignas(64) uint8_t data[8][kTileRows][kTileRowBytes];
};

// Not static: the functions of TileSession are shared by all sources, and therefore the tiles must be shared too.
inline EmulatedTiles& emulated_tiles() {
    static thread_local EmulatedTiles tiles;
    return tiles;
}

// The hardware raises #UD for a tile instruction without a configuration.
static inline EmulatedTiles& configured_tiles() {
    if (!emulated_tiles().configured) __builtin_trap();
    return emulated_tiles();
}

struct TileSession {
    TileSession() {
        if (emulated_tiles().configured) __builtin_trap();  // nested sessions would release the outer one's tiles
        emulated_tiles().configured = true;
        memset(emulated_tiles().data, 0xff, sizeof emulated_tiles().data);  // NaN: contents must not be relied on
    }
    ~TileSession() { emulated_tiles().configured = false; }
    TileSession(const TileSession&) = delete;
    TileSession& operator=(const TileSession&) = delete;
};

template <int T>
static inline void zero_tile() {
    memset(configured_tiles().data[T], 0, kTileBytes);
}
template <int T>
static inline void load_tile(const void* p, int64_t stride = kTileRowBytes) {
    for (int row = 0; row < kTileRows; ++row) {
        memcpy(configured_tiles().data[T][row], static_cast<const uint8_t*>(p) + row * stride, kTileRowBytes);
    }
}
template <int T>
static inline void load_tile_streaming(const void* p) {
    load_tile<T>(p);
}
template <int T>
static inline void store_tile(void* p, int64_t stride = kTileRowBytes) {
    for (int row = 0; row < kTileRows; ++row) {
        memcpy(static_cast<uint8_t*>(p) + row * stride, configured_tiles().data[T][row], kTileRowBytes);
    }
}

// Flushes subnormal numbers to zeros of the same sign.
static inline __m512 flush_subnormals(__m512 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __mmask16 subnormal = _mm512_testn_epi32_mask(bits, _mm512_set1_epi32(0x7f800000));
    return _mm512_castsi512_ps(
        _mm512_mask_and_epi32(bits, subnormal, bits, _mm512_set1_epi32(static_cast<int>(0x80000000))));
}

template <int C, int L, int R>
static inline void tile_dot() {
    static_assert(C != L && C != R && L != R, "the tiles of a product must differ");
    EmulatedTiles& tiles = configured_tiles();
    __m512 even_columns[16], odd_columns[16];
    for (int p = 0; p < 16; ++p) {
        const __m512i pairs = _mm512_load_si512(tiles.data[R][p]);
        even_columns[p] = flush_subnormals(_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)));
        odd_columns[p] = flush_subnormals(
            _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000)))));
    }
    for (int i = 0; i < kTileRows; ++i) {
        __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
        for (int p = 0; p < 16; ++p) {
            uint32_t pair;
            memcpy(&pair, tiles.data[L][i] + 4 * p, sizeof pair);
            const __m512i both = _mm512_set1_epi32(static_cast<int>(pair));
            const __m512 first = flush_subnormals(_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)));
            const __m512 second = flush_subnormals(
                _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000)))));
            even = flush_subnormals(_mm512_fmadd_ps(first, even_columns[p], even));
            odd = flush_subnormals(_mm512_fmadd_ps(second, odd_columns[p], odd));
        }
        const __m512 sum = flush_subnormals(_mm512_load_ps(tiles.data[C][i]));
        _mm512_store_ps(tiles.data[C][i],
                        flush_subnormals(_mm512_add_ps(sum, flush_subnormals(_mm512_add_ps(even, odd)))));
    }
}

#endif

}  // namespace qlora::QLORA_ISA
