// Decodes packed indices to numbers.
//
// All weights of a block share one absmax, so that a block has only sixteen different values. code[q] * absmax is
// computed and rounded once per block into a table of sixteen, and each weight is a table lookup without arithmetic.
// The result equals the dequantized weight bit for bit in any element type, at the cost of a copy.
#pragma once

#include "block_absmax.h"
#include "dynamic_map.h"
#include "simd.h"

namespace qlora::QLORA_ISA {

// out[i] = block_absmax(w, block + i), i < n. Decoding one absmax at a time costs more than its block's 64 FMAs, so a
// range of blocks is decoded at once.
static inline void decode_absmax(const NF4Weight& w, int64_t block, int64_t n, float* out) {
    if (w.absmax) {
        memcpy(out, w.absmax + block, static_cast<size_t>(n) * sizeof(float));
        return;
    }
    for (int64_t i = 0; i < n;) {
        const int64_t group = (block + i) / kNestedBlocksize;
        const int64_t left = (group + 1) * kNestedBlocksize - (block + i);
        const int64_t max_count = left < kPiece ? left : kPiece;
        const int64_t count = n - i < max_count ? n - i : max_count;
        const uint8_t* q = w.absmax_q + block + i;
        if (count == kPiece) {
            decode_piece<true>(q, w.absmax_scale[group], out + i);
        } else {
            alignas(64) uint8_t indices[kPiece] = {};
            alignas(64) float values[kPiece];
            memcpy(indices, q, static_cast<size_t>(count));
            decode_piece<true>(indices, w.absmax_scale[group], values);
            memcpy(out + i, values, static_cast<size_t>(count) * sizeof(float));
        }
        i += count;
    }
    const float offset = *w.absmax_offset;
    for (int64_t i = 0; i < n; ++i) out[i] += offset;
}

// Makes a block's table. RoundTo: values rounded to T and stored as T.
template <class T>
struct RoundTo {
    using Elem = T;
    static Code16<T> code(float absmax) { return code16(scaled_code(absmax), static_cast<T*>(nullptr)); }
};

// Values rounded to T and stored as float, for kernels that compute in fp32 for every dtype of x.
template <class T>
struct RoundWidened {
    using Elem = float;
    static Code16<float> code(float absmax) { return widen(scaled_code(absmax), static_cast<T*>(nullptr)); }
};

#ifdef __AVX512BF16__
struct RoundForDot {
    using Elem = Bf16;
    static Code16<Bf16> code(float absmax) { return code16_fast(scaled_code(absmax)); }
};
#endif

// dst[i] = value of element begin + i, for elements of a single block.
template <class E>
static inline void decode_run(const Code16<E>& code, const uint8_t* packed, int64_t begin, int64_t end, E* dst) {
    alignas(64) E values[32];
    if (begin & 1) {
        const uint8_t pair[16] = {packed[begin >> 1]};
        lookup32(code, pair, values);
        *dst++ = values[1];
        ++begin;
    }
    const uint8_t* bytes = packed + (begin >> 1);
    int64_t left = end - begin;
    for (; left >= 32; left -= 32, bytes += 16, dst += 32) lookup32(code, bytes, dst);
    if (left > 0) {
        uint8_t tail[16] = {};
        memcpy(tail, bytes, static_cast<size_t>((left + 1) >> 1));
        lookup32(code, tail, values);
        memcpy(dst, values, static_cast<size_t>(left) * sizeof(E));
    }
}

// Prefetches the bytes of `count` elements from `begin` on, as far as they exist.
static inline void prefetch_range(const NF4Weight& w, int64_t begin, int64_t count) {
    if (begin + count > w.N * w.K) return;
    const uint8_t* last = w.packed + ((begin + count - 1) >> 1);
    for (const uint8_t* line = w.packed + (begin >> 1); line < last; line += 64) __builtin_prefetch(line);
    __builtin_prefetch(last);
}

// dst[i] = value of the flat element begin + i; the range may start and end anywhere.
template <class Rounding>
static inline void decode_range(const NF4Weight& w, int64_t begin, int64_t end, typename Rounding::Elem* dst) {
    constexpr int64_t kFew = 8;  // up to this number, decoding one absmax at a time is faster
    const int64_t last = (end - 1) >> w.block_shift;
    for (int64_t block = begin >> w.block_shift; begin < end; block += kPiece) {
        const int64_t count = last + 1 - block < kPiece ? last + 1 - block : kPiece;
        float absmax[kPiece];
        if (count > kFew) {
            decode_absmax(w, block, count, absmax);
        } else {
            for (int64_t i = 0; i < count; ++i) absmax[i] = block_absmax(w, block + i);
        }
        for (int64_t i = 0; i < count; ++i) {
            const int64_t block_end = (block + i + 1) << w.block_shift;
            const int64_t stop = block_end < end ? block_end : end;
            decode_run(Rounding::code(absmax[i]), w.packed, begin, stop, dst);
            dst += stop - begin;
            begin = stop;
        }
    }
}

}  // namespace qlora::QLORA_ISA
