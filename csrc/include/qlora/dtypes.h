// Element types of the kernels: 16-bit floats are stored as their bits; conversions are exact or round to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

#include "qlora/nf4_weight.h"

namespace qlora {

struct Bf16 {
    uint16_t bits;
};

struct Fp16 {
    uint16_t bits;
};

// static, not inline: kernels are compiled once per instruction set, and a shared definition could be the AVX-512 one.
static inline uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static inline float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float to_float(float value) { return value; }

static inline float to_float(Bf16 value) { return bits_float(static_cast<uint32_t>(value.bits) << 16); }

static inline float to_float(Fp16 value) {
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
    const uint32_t magnitude = value.bits & 0x7fff;
    if (magnitude >= 0x7c00) return bits_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    if (magnitude >= 0x0400) return bits_float(sign | ((magnitude << 13) + (112u << 23)));
    // Subnormal: magnitude * 2^-24 is exact in fp32.
    return bits_float(sign | float_bits(static_cast<float>(magnitude) * 0x1p-24f));
}

static inline void convert(float value, float& out) { out = value; }

static inline void convert(float value, Bf16& out) {
    const uint32_t bits = float_bits(value);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    out.bits = static_cast<uint16_t>((is_nan ? bits | 0x400000 : bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static inline void convert(float value, Fp16& out) {
    const uint32_t bits = float_bits(value);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000);
    const uint32_t magnitude = bits & 0x7fffffff;
    uint32_t rounded;
    if (magnitude > 0x7f800000) {
        rounded = 0x7e00;
    } else if (magnitude >= 0x477ff000) {  // 65520 and above round to infinity
        rounded = 0x7c00;
    } else if (magnitude >= 0x38800000) {
        rounded = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
    } else {
        // Subnormal result: adding 0.5 makes the fp32 addition round to multiples of 2^-24, fp16's fixed step.
        rounded = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
    }
    out.bits = static_cast<uint16_t>(sign | rounded);
}

template <class T>
static inline T from_float(float value) {
    T out;
    convert(value, out);
    return out;
}

}  // namespace qlora
