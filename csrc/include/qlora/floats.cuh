// The three element types in device code: exact conversion to fp32, conversion back with one rounding, vectors of
// eight.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "qlora/nf4_weight.h"

namespace qlora {

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }

// Rounds to nearest, ties to even.
template <typename T>
__device__ __forceinline__ T round_to(float value);
template <>
__device__ __forceinline__ float round_to<float>(float value) {
    return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 round_to<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half round_to<__half>(float value) {
    return __float2half_rn(value);
}

// Two 16-bit elements in a word, the first in its low half.
template <typename T>
__device__ __forceinline__ uint32_t pack_pair(float first, float second);
template <>
__device__ __forceinline__ uint32_t pack_pair<__nv_bfloat16>(float first, float second) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
template <>
__device__ __forceinline__ uint32_t pack_pair<__half>(float first, float second) {
    const __half2 pair = __floats2half2_rn(first, second);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

template <typename T>
__device__ __forceinline__ float2 unpack_pair(uint32_t word);
template <>
__device__ __forceinline__ float2 unpack_pair<__nv_bfloat16>(uint32_t word) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u));
}
template <>
__device__ __forceinline__ float2 unpack_pair<__half>(uint32_t word) {
    return __half22float2(*reinterpret_cast<const __half2*>(&word));
}

// Eight elements at a 16-byte aligned address; if !valid, the address is not read and the elements are zero.
template <typename T>
__device__ __forceinline__ void load8_or_zeros(float (&to)[8], const T* from, bool valid) {
    const uint4 words = valid ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 pair = unpack_pair<T>(word[i]);
        to[2 * i] = pair.x;
        to[2 * i + 1] = pair.y;
    }
}
template <>
__device__ __forceinline__ void load8_or_zeros<float>(float (&to)[8], const float* from, bool valid) {
    float4 low = make_float4(0, 0, 0, 0), high = low;
    if (valid) low = reinterpret_cast<const float4*>(from)[0], high = reinterpret_cast<const float4*>(from)[1];
    to[0] = low.x, to[1] = low.y, to[2] = low.z, to[3] = low.w;
    to[4] = high.x, to[5] = high.y, to[6] = high.z, to[7] = high.w;
}
template <typename T>
__device__ __forceinline__ void load8(float (&to)[8], const T* from) {
    load8_or_zeros(to, from, true);
}
template <typename T>
__device__ __forceinline__ void store8(T* to, const float (&from)[8]) {
    *reinterpret_cast<uint4*>(to) = make_uint4(pack_pair<T>(from[0], from[1]), pack_pair<T>(from[2], from[3]),
                                               pack_pair<T>(from[4], from[5]), pack_pair<T>(from[6], from[7]));
}
template <>
__device__ __forceinline__ void store8<float>(float* to, const float (&from)[8]) {
    reinterpret_cast<float4*>(to)[0] = make_float4(from[0], from[1], from[2], from[3]);
    reinterpret_cast<float4*>(to)[1] = make_float4(from[4], from[5], from[6], from[7]);
}

// An element of a tensor whose dtype is known at run time, such as a bias or LoRA factor.
__device__ __forceinline__ float load_any(const AnyFloat& tensor, int64_t index) {
    if (tensor.dtype == DType::kFloat32) return static_cast<const float*>(tensor.data)[index];
    if (tensor.dtype == DType::kBfloat16) return to_float(static_cast<const __nv_bfloat16*>(tensor.data)[index]);
    return to_float(static_cast<const __half*>(tensor.data)[index]);
}

__host__ __device__ inline bool is_aligned(const void* pointer, int bytes) {
    return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

// On the host: returns run(static_cast<T*>(nullptr)) with T the element type of a 16-bit `dtype`, otherwise an error.
template <class Run>
cudaError_t with_16_bit_type(DType dtype, const Run& run) {
    if (dtype == DType::kBfloat16) return run(static_cast<__nv_bfloat16*>(nullptr));
    if (dtype == DType::kFloat16) return run(static_cast<__half*>(nullptr));
    return cudaErrorInvalidValue;
}

// The same for all three element types.
template <class Run>
cudaError_t with_float_type(DType dtype, const Run& run) {
    if (dtype == DType::kFloat32) return run(static_cast<float*>(nullptr));
    return with_16_bit_type(dtype, run);
}

}  // namespace qlora
