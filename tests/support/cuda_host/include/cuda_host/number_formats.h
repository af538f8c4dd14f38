// 16-bit floats as bits, through CUDA's own host conversions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cstdint>

namespace cuda_host {

inline float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }
inline float fp16_to_float(uint16_t bits) {
    __half_raw raw;
    raw.x = bits;
    return __half2float(__half(raw));
}
inline uint16_t float_to_bf16(float value) { return __nv_bfloat16_raw(__float2bfloat16_rn(value)).x; }
inline uint16_t float_to_fp16(float value) { return __half_raw(__float2half_rn(value)).x; }

}  // namespace cuda_host
