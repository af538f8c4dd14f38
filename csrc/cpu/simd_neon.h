// NEON (Advanced SIMD), which every AArch64 CPU has. simd.h describes the operations.
#pragma once

#include <arm_neon.h>

#include "qlora/nf4_code.h"

namespace qlora::QLORA_ISA {

using F32 = float32x4_t;
inline constexpr int kLanes = 4;
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));

static inline F32 zero() { return vdupq_n_f32(0.0f); }
static inline F32 set1(float x) { return vdupq_n_f32(x); }
static inline F32 add(F32 a, F32 b) { return vaddq_f32(a, b); }
static inline F32 mul(F32 a, F32 b) { return vmulq_f32(a, b); }
static inline F32 fma(F32 a, F32 b, F32 c) { return vfmaq_f32(c, a, b); }
// max(|a|, |b|) for non-negative a, compared as integers, so that inf and NaN are kept.
static inline F32 max_magnitude(F32 a, F32 b) {
    const uint32x4_t magnitude = vandq_u32(vreinterpretq_u32_f32(b), vdupq_n_u32(0x7fffffff));
    return vreinterpretq_f32_u32(vmaxq_u32(vreinterpretq_u32_f32(a), magnitude));
}
static inline float hsum(F32 a) { return vaddvq_f32(a); }
// sums[0..3] += hsum of a, b, c, d.
static inline void add_hsums(F32 a, F32 b, F32 c, F32 d, float* sums) {
    vst1q_f32(sums, vaddq_f32(vld1q_f32(sums), vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d))));
}
// v limited to [-limit, limit]; -limit for NaN.
static inline F32 clamp(F32 v, float limit) { return vminq_f32(vmaxnmq_f32(v, set1(-limit)), set1(limit)); }
static inline bool any_above(F32 v, float limit) { return vmaxvq_u32(vcgtq_f32(v, set1(limit))) != 0; }

static inline uint16x4_t low_words(I32 v) { return vmovn_u32(reinterpret_cast<uint32x4_t>(v)); }

static inline void store_bytes(uint8_t* p, I32 v) {
    const uint16x4_t words = low_words(v);
    const uint32_t bytes = vget_lane_u32(vreinterpret_u32_u8(vmovn_u16(vcombine_u16(words, words))), 0);
    memcpy(p, &bytes, sizeof bytes);
}
static inline void store_bytes(uint8_t* p, const I32 (&v)[4]) {
    const uint8x8_t first = vmovn_u16(vcombine_u16(low_words(v[0]), low_words(v[1])));
    const uint8x8_t second = vmovn_u16(vcombine_u16(low_words(v[2]), low_words(v[3])));
    vst1q_u8(p, vcombine_u8(first, second));
}

static inline F32 keep(F32 v, uint32_t bits) {
    const uint32x4_t lane = {1, 2, 4, 8};
    const uint32x4_t kept = vtstq_u32(vdupq_n_u32(bits), lane);
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), kept));
}

// The byte offsets of entry index[lane] in a table of dwords, for vqtbl.
static inline uint8x16_t dword_bytes(uint32x4_t index) {
    return vreinterpretq_u8_u32(vmlaq_n_u32(vdupq_n_u32(0x03020100), index, 0x04040404));
}

static inline uint16x4_t load_words(const void* p) { return vld1_u16(static_cast<const uint16_t*>(p)); }

static inline F32 load(const float* p) { return vld1q_f32(p); }
static inline F32 load(const Bf16* p) { return vreinterpretq_f32_u32(vshll_n_u16(load_words(p), 16)); }
static inline F32 load(const Fp16* p) { return vcvt_f32_f16(vreinterpret_f16_u16(load_words(p))); }

// Rounds to nearest even and keeps subnormals.
static inline uint16x4_t round_bf16(F32 v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x400000));
    return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16);
}

static inline uint16x4_t round_fp16(F32 v) { return vreinterpret_u16_f16(vcvt_f16_f32(v)); }

static inline void store(float* p, F32 v) { vst1q_f32(p, v); }
static inline void store(Bf16* p, F32 v) { vst1_u16(&p->bits, round_bf16(v)); }
static inline void store(Fp16* p, F32 v) { vst1_u16(&p->bits, round_fp16(v)); }

inline constexpr int kTranspose = 4;

static inline void transpose_tile(const uint32_t* src, int64_t ld, int rows, uint32_t* dst, int64_t dst_ld) {
    if (rows < kTranspose) {
        for (int r = 0; r < rows; ++r) {
            for (int c = 0; c < kTranspose; ++c) dst[c * dst_ld + r] = src[r * ld + c];
        }
        return;
    }
    const uint32x4x2_t top = vtrnq_u32(vld1q_u32(src), vld1q_u32(src + ld));
    const uint32x4x2_t bottom = vtrnq_u32(vld1q_u32(src + 2 * ld), vld1q_u32(src + 3 * ld));
#pragma GCC unroll 2
    for (int c = 0; c < 2; ++c) {
        const uint64x2_t upper = vreinterpretq_u64_u32(top.val[c]), lower = vreinterpretq_u64_u32(bottom.val[c]);
        vst1q_u32(dst + c * dst_ld, vreinterpretq_u32_u64(vtrn1q_u64(upper, lower)));
        vst1q_u32(dst + (c + 2) * dst_ld, vreinterpretq_u32_u64(vtrn2q_u64(upper, lower)));
    }
}

// Sixteen values of one block as planes of bytes, the least significant first; vqtbl1q looks up sixteen bytes at a
// time.
template <class E>
struct Code16 {
    uint8x16_t plane[sizeof(E)];
};

struct Scaled {
    F32 values[4];
};

static inline Scaled scaled_code(float absmax) {
    Scaled scaled;
    for (int i = 0; i < 4; ++i) scaled.values[i] = vmulq_n_f32(vld1q_f32(kCode + 4 * i), absmax);
    return scaled;
}

static inline Code16<float> code16(const Scaled& v, float*) {
    const auto quarter = [&](int i) { return vreinterpretq_u8_f32(v.values[i]); };
    const uint8x16_t even_low = vuzp1q_u8(quarter(0), quarter(1)), even_high = vuzp1q_u8(quarter(2), quarter(3));
    const uint8x16_t odd_low = vuzp2q_u8(quarter(0), quarter(1)), odd_high = vuzp2q_u8(quarter(2), quarter(3));
    return {{vuzp1q_u8(even_low, even_high), vuzp1q_u8(odd_low, odd_high), vuzp2q_u8(even_low, even_high),
             vuzp2q_u8(odd_low, odd_high)}};
}

template <class E, class Round>
static inline Code16<E> word_planes(const Scaled& v, const Round& round) {
    const auto half = [&](int i) {
        return vreinterpretq_u8_u16(vcombine_u16(round(v.values[i]), round(v.values[i + 1])));
    };
    return {{vuzp1q_u8(half(0), half(2)), vuzp2q_u8(half(0), half(2))}};
}

static inline Code16<Bf16> code16(const Scaled& v, Bf16*) { return word_planes<Bf16>(v, round_bf16); }
static inline Code16<Fp16> code16(const Scaled& v, Fp16*) { return word_planes<Fp16>(v, round_fp16); }

// The values that lookup() would store, as floats.
static inline Code16<float> widen(const Scaled& v, float*) { return code16(v, static_cast<float*>(nullptr)); }
static inline Code16<float> widen(Scaled v, Bf16*) {
    for (F32& quarter : v.values) quarter = vreinterpretq_f32_u32(vshll_n_u16(round_bf16(quarter), 16));
    return code16(v, static_cast<float*>(nullptr));
}
static inline Code16<float> widen(Scaled v, Fp16*) {
    for (F32& quarter : v.values) quarter = vcvt_f32_f16(vcvt_f16_f32(quarter));
    return code16(v, static_cast<float*>(nullptr));
}

// The sixteen values of the indices in `index`, in order.
template <class E>
static inline void lookup16(const Code16<E>& code, uint8x16_t index, E* dst) {
    if constexpr (sizeof(E) == 2) {
        const uint8x16_t low = vqtbl1q_u8(code.plane[0], index), high = vqtbl1q_u8(code.plane[1], index);
        vst1q_u8(reinterpret_cast<uint8_t*>(dst), vzip1q_u8(low, high));
        vst1q_u8(reinterpret_cast<uint8_t*>(dst + 8), vzip2q_u8(low, high));
    } else {
        const uint8x16_t byte0 = vqtbl1q_u8(code.plane[0], index), byte1 = vqtbl1q_u8(code.plane[1], index);
        const uint8x16_t byte2 = vqtbl1q_u8(code.plane[2], index), byte3 = vqtbl1q_u8(code.plane[3], index);
        const auto store_floats = [&](float* out, uint8x16_t low, uint8x16_t high) {
            const uint16x8_t a = vreinterpretq_u16_u8(low), b = vreinterpretq_u16_u8(high);
            vst1q_f32(out, vreinterpretq_f32_u16(vzip1q_u16(a, b)));
            vst1q_f32(out + 4, vreinterpretq_f32_u16(vzip2q_u16(a, b)));
        };
        store_floats(dst, vzip1q_u8(byte0, byte1), vzip1q_u8(byte2, byte3));
        store_floats(dst + 8, vzip2q_u8(byte0, byte1), vzip2q_u8(byte2, byte3));
    }
}

// Looks up the thirty-two values of sixteen bytes.
template <class E>
static inline void lookup32(const Code16<E>& code, const uint8_t* bytes, E* dst) {
    const uint8x16_t source = vld1q_u8(bytes);
    const uint8x16_t high = vshrq_n_u8(source, 4), low = vandq_u8(source, vdupq_n_u8(0xf));
    lookup16(code, vzip1q_u8(high, low), dst);
    lookup16(code, vzip2q_u8(high, low), dst + 16);
}

// Looks up the four values of the high nibbles and the four of the low nibbles of four bytes.
static inline void lookup_even_odd(const Code16<float>& code, const uint8_t* bytes, F32& even, F32& odd) {
    uint32_t word;
    memcpy(&word, bytes, sizeof word);
    // The first four bytes become the high nibbles and the next four the low ones; the rest is not used.
    const int8x16_t shift = {-4, -4, -4, -4, 0, 0, 0, 0, -4, -4, -4, -4, 0, 0, 0, 0};
    const uint8x16_t copies = vreinterpretq_u8_u32(vdupq_n_u32(word));
    const uint8x16_t index = vandq_u8(vshlq_u8(copies, shift), vdupq_n_u8(0xf));
    const uint8x16_t low = vzip1q_u8(vqtbl1q_u8(code.plane[0], index), vqtbl1q_u8(code.plane[1], index));
    const uint8x16_t high = vzip1q_u8(vqtbl1q_u8(code.plane[2], index), vqtbl1q_u8(code.plane[3], index));
    even = vreinterpretq_f32_u16(vzip1q_u16(vreinterpretq_u16_u8(low), vreinterpretq_u16_u8(high)));
    odd = vreinterpretq_f32_u16(vzip2q_u16(vreinterpretq_u16_u8(low), vreinterpretq_u16_u8(high)));
}

}  // namespace qlora::QLORA_ISA
