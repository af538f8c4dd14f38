// The layout of operands in AMX tiles, and the functions that pack them.
//
// A tile product is C[16 x 16] += L[16 x 32] R[32 x 16]. One step is 32 elements of the contraction:
//
//     L: row i is 32 elements of row i            R: row p is the pair (2p, 2p + 1) of each of 16 columns
//
//       i  | k0 k1 k2 ........... k31 |             p  | k2p k2p+1 of col 0 | ... | k2p k2p+1 of col 15 |
//
// The side of the weight determines the cost of decoding:
//
//     forward  y^T = W x^T         L = 16 rows of W: 32 weights of one row are the output of one table lookup
//                                  R = 16 tokens of x, transposed once per call; y^T is transposed when it is stored
//     grad_x   grad_x = grad_y W   L = 16 tokens of grad_y, a copy
//                                  R = 16 columns of W with pairs of rows: a table of 2 x 16 values looks up both
//
// Nibble order. 64 bytes of a row of W are 128 weights: 32 words of four nibbles. The lookup of nibble c of every word
// gives the weights k = 4j + c, so that a group of 128 fills four steps, step c with k = c, c + 4, c + 8, ... A last
// group of 64 fills two steps with k = 2j + c. The order of the terms does not change a sum, so forward packs x in the
// same order. In grad_x the columns of a strip of 64 are in this order and are reordered when they are stored.
//
// K is padded with zeros to a multiple of 64 (whole steps), N in grad_x and r to multiples of 32.
#pragma once

#include "../pack.h"
#include "tile.h"

namespace qlora::QLORA_ISA {

inline constexpr int64_t kStep = 32;     // elements of the contraction in one tile product
inline constexpr int64_t kGroup64 = 64;  // weights with a common absmax in the fast decoders
inline constexpr int64_t kGroup128 = 128;

static inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Steps of a contraction along K in nibble order, and of one along n or r.
static inline int64_t nibble_steps(int64_t K) { return round_up(K, kGroup64) / kStep; }
static inline int64_t natural_steps(int64_t length) { return round_up(length, kStep) / kStep; }

// The low words of a and b as pairs, and likewise the high words.
static inline __m512i low_pairs(__m512i a, __m512i b) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16));
}
static inline __m512i high_pairs(__m512i a, __m512i b) {
    return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b);
}

// Rows of bf16 in which elements beyond `length` and elements dropped by dropout are zero.
struct TokenRows {
    const Bf16* data;  // [rows, length]
    int64_t rows, length;
    const uint8_t* kept;  // dropout bitmap, or null
    int64_t position;     // index of data[0] in the bitmap

    // Mask of those elements [k, k + 32) that exist.
    __mmask32 existing(int64_t k) const {
        const int64_t left = length - k;
        return left >= 32 ? 0xffffffff : left <= 0 ? 0 : (1u << left) - 1;
    }

    // Elements [k, k + 32) of row m, of which `mask` exist; the others are zero.
    __m512i load(int64_t m, int64_t k, __mmask32 mask) const {
        if (m >= rows || mask == 0) return _mm512_setzero_si512();
        const int64_t offset = m * length + k;
        if (kept) mask &= static_cast<__mmask32>(bits_at(kept, position + offset));
        return _mm512_maskz_loadu_epi16(mask, data + offset);
    }
};

// Packs an R tile of 16 tokens in nibble order: x for the forward product. step_bytes: distance between steps.
static inline void pack_right_nibble_order(const TokenRows& x, uint8_t* out, int64_t step_bytes) {
    const int64_t padded = round_up(x.length, kGroup64);
    for (int64_t k = 0; k < padded; k += kGroup128, out += 4 * step_bytes) {
        const bool half = padded - k < kGroup128;
        for (int part = 0; part < (half ? 2 : 4); ++part) {
            const __mmask32 existing = x.existing(k + 32 * part);
            __m512i v[16];
#pragma GCC unroll 16
            for (int m = 0; m < 16; ++m) v[m] = x.load(m, k + 32 * part, existing);
            transpose_registers(v);  // lane m of v[i] is the pair (2i, 2i + 1) of token m
            if (half) {
                uint8_t* row = out + part * 8 * kTileRowBytes;
#pragma GCC unroll 8
                for (int p = 0; p < 8; ++p, row += kTileRowBytes) {
                    _mm512_store_si512(row, low_pairs(v[2 * p], v[2 * p + 1]));
                    _mm512_store_si512(row + step_bytes, high_pairs(v[2 * p], v[2 * p + 1]));
                }
            } else {
                uint8_t* row = out + part * 4 * kTileRowBytes;
#pragma GCC unroll 4
                for (int p = 0; p < 4; ++p, row += kTileRowBytes) {
                    _mm512_store_si512(row, low_pairs(v[4 * p], v[4 * p + 2]));
                    _mm512_store_si512(row + step_bytes, high_pairs(v[4 * p], v[4 * p + 2]));
                    _mm512_store_si512(row + 2 * step_bytes, low_pairs(v[4 * p + 1], v[4 * p + 3]));
                    _mm512_store_si512(row + 3 * step_bytes, high_pairs(v[4 * p + 1], v[4 * p + 3]));
                }
            }
        }
    }
}

// Packs an R tile of 16 tokens in natural order: s for the low-rank product of forward.
static inline void pack_right(const TokenRows& s, uint8_t* out, int64_t step_bytes) {
    for (int64_t j = 0; j < s.length; j += kStep, out += step_bytes) {
        const __mmask32 existing = s.existing(j);
        __m512i v[16];
#pragma GCC unroll 16
        for (int m = 0; m < 16; ++m) v[m] = s.load(m, j, existing);
        transpose_registers(v);
#pragma GCC unroll 16
        for (int p = 0; p < 16; ++p) _mm512_store_si512(out + p * kTileRowBytes, v[p]);
    }
}

// Packs an L tile of 16 tokens in natural order: grad_y and ds.
static inline void pack_left(const TokenRows& rows, uint8_t* out, int64_t step_bytes) {
    for (int64_t m = 0; m < 16; ++m, out += kTileRowBytes) {
        for (int64_t n = 0, step = 0; n < rows.length; n += kStep, ++step) {
            _mm512_store_si512(out + step * step_bytes, rows.load(m, n, rows.existing(n)));
        }
    }
}

struct NibbleOrder {
    alignas(64) uint16_t fourth[32]{}, second[32]{};

    constexpr NibbleOrder() {
        for (int i = 0; i < 32; ++i) {
            fourth[i] = static_cast<uint16_t>(4 * (i % 16));
            second[i] = static_cast<uint16_t>(2 * i);
        }
    }
};

// Packs one row of L tiles in nibble order from `length` elements, a multiple of 64: lora_A, and weights that the fast
// decoders do not support.
static inline void pack_left_nibble_order(const Bf16* row, int64_t length, uint8_t* out, int64_t step_bytes) {
    static constexpr NibbleOrder kOrder;
    const __m512i fourth = _mm512_load_si512(kOrder.fourth), second = _mm512_load_si512(kOrder.second);
    for (int64_t k = 0; k < length; k += kGroup128, row += kGroup128, out += 4 * step_bytes) {
        const bool half = length - k < kGroup128;
        const int parts = half ? 2 : 4;
        __m512i v[4] = {};
        for (int i = 0; i < parts; ++i) v[i] = _mm512_loadu_si512(row + 32 * i);
        for (int c = 0; c < parts; ++c) {
            const __m512i shift = _mm512_set1_epi16(static_cast<short>(c));
            __m512i words;
            if (half) {
                words = _mm512_permutex2var_epi16(v[0], _mm512_add_epi16(second, shift), v[1]);
            } else {
                const __m512i order = _mm512_add_epi16(fourth, shift);
                words = _mm512_mask_blend_epi32(0xff00, _mm512_permutex2var_epi16(v[0], order, v[1]),
                                                _mm512_permutex2var_epi16(v[2], order, v[3]));
            }
            _mm512_store_si512(out + c * step_bytes, words);
        }
    }
}

// Packs one row of pairs of the four R tiles of a 64-column strip, columns in nibble order, from 64 elements of each of
// two rows: lora_A, and weights that the fast decoder does not support.
static inline void pack_pairs_nibble_order(const Bf16* even, const Bf16* odd, uint8_t* out) {
    for (int c = 0; c < 4; ++c) {
        uint32_t* row = reinterpret_cast<uint32_t*>(out + c * kTileBytes);
        for (int j = 0; j < 16; ++j) row[j] = even[4 * j + c].bits | static_cast<uint32_t>(odd[4 * j + c].bits) << 16;
    }
}

}  // namespace qlora::QLORA_ISA
