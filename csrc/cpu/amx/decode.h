// Decodes NF4 weights into AMX tiles.
//
// The fast decoders process units of 128 weights: one or two loads, a table of 2 x 16 rounded values (two products, one
// conversion), four lookups, and four stores to four steps of the contraction. A task interleaves the units of its next
// chunk with the tile products of the current one, so that the tile unit and the vector ports work in parallel. No tile
// is loaded soon after it was stored: tile loads cannot be forwarded from stores and would stall.
//
// The fast decoders need K % 64 == 0 and blocks of at least 64, so that 64 consecutive weights of a row share one
// absmax. All other weights are decoded by decode_range (../decode.h), without interleaving.
#pragma once

#include "../linear.h"
#include "layout.h"

namespace qlora::QLORA_ISA {

#define QLORA_INLINE __attribute__((always_inline)) static inline

static inline bool suits_fast_decoder(const NF4Weight& w) { return w.K % kGroup64 == 0 && w.block_shift >= 6; }

// out[i] = absmax of the weights [64 (group0 + i), 64 (group0 + i + 1)), for weights that the fast decoders support.
static inline void absmax_of_groups(const NF4Weight& w, int64_t group0, int64_t groups, float* out) {
    const int shift = w.block_shift - 6;
    if (shift == 0) return decode_absmax(w, group0, groups, out);
    float blocks[kPiece];
    for (int64_t i = 0; i < groups;) {
        const int64_t block0 = (group0 + i) >> shift;
        const int64_t count = std::min<int64_t>(kPiece, ((group0 + groups - 1) >> shift) + 1 - block0);
        decode_absmax(w, block0, count, blocks);
        for (; i < groups && ((group0 + i) >> shift) < block0 + count; ++i) {
            out[i] = blocks[((group0 + i) >> shift) - block0];
        }
    }
}

// Whether the groups' absmax values are stored and need no decoding.
static inline bool stores_absmax_of_groups(const NF4Weight& w) { return w.absmax && w.block_shift == 6; }

// The sixteen rounded values of each of two blocks: entries 0..15 and 16..31.
QLORA_INLINE __m512i two_tables(float absmax0, float absmax1) {
    return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(scaled_code(absmax1), scaled_code(absmax0)));
}

// Looks up the low nibbles of `words`. upper_half: 16 in words that use the second table, otherwise 0.
QLORA_INLINE __m512i lookup_words(__m512i words, __m512i upper_half, __m512i tables) {
    constexpr int kAndOr = 0xea;  // (words & 15) | upper_half
    const __m512i index = _mm512_ternarylogic_epi32(words, _mm512_set1_epi16(15), upper_half, kAndOr);
    return _mm512_permutexvar_epi16(index, tables);
}

// Stores the values of nibble c of every word, k = 4j + c, at out + c * stride.
QLORA_INLINE void store_four_nibbles(__m512i words, __m512i upper_half, __m512i tables, uint8_t* out, int64_t stride) {
    _mm512_store_si512(out, lookup_words(_mm512_srli_epi16(words, 4), upper_half, tables));
    _mm512_store_si512(out + stride, lookup_words(words, upper_half, tables));
    _mm512_store_si512(out + 2 * stride, lookup_words(_mm512_srli_epi16(words, 12), upper_half, tables));
    _mm512_store_si512(out + 3 * stride, lookup_words(_mm512_srli_epi16(words, 8), upper_half, tables));
}

// Forward: decodes 128 weights of one row to one row of four L tiles.
QLORA_INLINE void decode_row128(const uint8_t* bytes, const float* absmax, uint8_t* out, int64_t stride) {
    const __m512i second = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    store_four_nibbles(_mm512_loadu_si512(bytes), second, two_tables(absmax[0], absmax[1]), out, stride);
}

// Forward: decodes the last 64 weights of a row to one row of two L tiles.
QLORA_INLINE void decode_row64(const uint8_t* bytes, const float* absmax, uint8_t* out, int64_t stride) {
    const __m512i table = two_tables(absmax[0], absmax[0]);
    const __m512i words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
    _mm512_store_si512(out, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table));
    _mm512_store_si512(out + stride, _mm512_permutexvar_epi16(words, table));
}

// grad_x: decodes 64 weights of row n and 64 of row n + 1 to one row of pairs of four R tiles.
QLORA_INLINE void decode_pair64(const uint8_t* bytes, int64_t row_bytes, const float* absmax, int64_t row_groups,
                                uint8_t* out) {
    const __m512i odd = _mm512_set1_epi32(16 << 16);
    const __m512i alternate = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                               6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
    const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + row_bytes));
    const __m512i words = _mm512_permutexvar_epi16(alternate, _mm512_inserti64x4(first, second, 1));
    store_four_nibbles(words, odd, two_tables(absmax[0], absmax[row_groups]), out, kTileBytes);
}

// The units of one chunk of a forward strip, in order. While products and units alternate, a copy of this struct is in
// registers, so that all functions that use it are inlined.
struct ForwardUnits {
    static constexpr bool kDecodesLeft = true;
    const uint8_t* bytes;
    const float* absmax;
    uint8_t* out;
    int64_t row_bytes, row_groups, stride;  // stride: bytes between the same tile of consecutive steps
    int64_t left;                           // units that remain to decode
    int64_t row, rows, valid_rows;          // rows beyond valid_rows repeat the last one; their results are not stored
    int64_t wide;                           // units of 128, which precede those of a last 64

    // Rows [n0, n0 + n_rows) of W, of which n_valid exist; `length` weights from k0 on, a multiple of 64. absmax: of
    // the strip's groups, in row order.
    ForwardUnits(const NF4Weight& w, const float* strip_absmax, int64_t n0, int64_t n_rows, int64_t n_valid, int64_t k0,
                 int64_t length, uint8_t* to)
        : bytes(w.packed + (n0 * w.K + k0) / 2),
          absmax(strip_absmax + k0 / kGroup64),
          out(to),
          row_bytes(w.K / 2),
          row_groups(w.K / kGroup64),
          stride(n_rows * kTileRowBytes),
          left((length + kGroup128 - 1) / kGroup128 * n_rows),
          row(0),
          rows(n_rows),
          valid_rows(n_valid),
          wide(length / kGroup128 * n_rows) {}

    // prefetch_distance: distance in bytes from this unit's bytes to those that are prefetched into L1.
    QLORA_INLINE void decode_next(ForwardUnits& u, int64_t prefetch_distance) {
        if (u.left <= 0) return;
        if (u.wide > 0) {
            _mm_prefetch(u.bytes + prefetch_distance, _MM_HINT_T0);
            decode_row128(u.bytes, u.absmax, u.out, u.stride);
        } else {
            decode_row64(u.bytes, u.absmax, u.out, u.stride);
        }
        --u.left;
        --u.wide;
        ++u.row;
        if (u.row < u.valid_rows) u.bytes += u.row_bytes, u.absmax += u.row_groups;
        u.out += kTileRowBytes;
        if (u.row == u.rows) {
            u.bytes += kGroup128 / 2 - (u.valid_rows - 1) * u.row_bytes;
            u.absmax += 2 - (u.valid_rows - 1) * u.row_groups;
            u.out += 3 * u.stride;
            u.row = 0;
        }
    }
};

// The units of one chunk of a grad_x strip: 64 columns of W, pairs of rows.
struct GradXUnits {
    static constexpr bool kDecodesLeft = false;
    const uint8_t* bytes;
    const float* absmax;
    uint8_t* out;
    int64_t row_bytes, row_groups, left, row;

    // Columns [k0, k0 + 64) and rows [n0, n0 + length), which all exist, to tiles [steps][4]. absmax: of all groups.
    GradXUnits(const NF4Weight& w, const float* all_absmax, int64_t k0, int64_t n0, int64_t length, uint8_t* to)
        : bytes(w.packed + (n0 * w.K + k0) / 2),
          absmax(all_absmax + (n0 * w.K + k0) / kGroup64),
          out(to),
          row_bytes(w.K / 2),
          row_groups(w.K / kGroup64),
          left(length / 2),
          row(0) {}

    QLORA_INLINE void decode_next(GradXUnits& u, int64_t prefetch_distance) {
        if (u.left <= 0) return;
        _mm_prefetch(u.bytes + prefetch_distance, _MM_HINT_T0);
        _mm_prefetch(u.bytes + u.row_bytes + prefetch_distance, _MM_HINT_T0);
        decode_pair64(u.bytes, u.row_bytes, u.absmax, u.row_groups, u.out);
        --u.left;
        u.bytes += 2 * u.row_bytes;
        u.absmax += 2 * u.row_groups;
        u.out += kTileRowBytes;
        if (++u.row == kTileRows) {
            u.row = 0;
            u.out += 3 * kTileBytes;
        }
    }
};

// Forward, any weight: decodes `length` weights from k0 on, with zeros beyond K, of rows [n0, n0 + n_rows).
static inline void decode_strip(const NF4Weight& w, int64_t n0, int64_t n_rows, int64_t k0, int64_t length,
                                uint8_t* out) {
    alignas(64) Bf16 row[kGroup128];
    const int64_t stride = n_rows * kTileRowBytes;
    for (int64_t r = 0; r < n_rows; ++r) {
        const int64_t n = std::min(n0 + r, w.N - 1);
        for (int64_t k = 0; k < length; k += kGroup128) {
            const int64_t padded = std::min(kGroup128, length - k), count = std::min(padded, w.K - k0 - k);
            if (count > 0) decode_range<RoundForDot>(w, n * w.K + k0 + k, n * w.K + k0 + k + count, row);
            zero_row(row + std::max<int64_t>(count, 0), padded - std::max<int64_t>(count, 0));
            pack_left_nibble_order(row, padded, out + k / kStep * stride + r * kTileRowBytes, stride);
        }
    }
}

// grad_x, any weight: decodes columns [k0, k0 + 64) of rows [n0, n0 + length), with zeros outside the weight.
static inline void decode_columns(const NF4Weight& w, int64_t k0, int64_t n0, int64_t length, uint8_t* out) {
    const int64_t columns = std::min(kGroup64, w.K - k0);
    alignas(64) Bf16 rows[2][kGroup64] = {};
    for (int64_t p = 0; p < length / 2; ++p) {
        for (int i = 0; i < 2; ++i) {
            const int64_t n = n0 + 2 * p + i, begin = n * w.K + k0;
            if (n < w.N) {
                decode_range<RoundForDot>(w, begin, begin + columns, rows[i]);
            } else {
                zero_row(rows[i], columns);
            }
        }
        pack_pairs_nibble_order(rows[0], rows[1], out + p / kTileRows * 4 * kTileBytes + p % kTileRows * kTileRowBytes);
    }
}

}  // namespace qlora::QLORA_ISA
