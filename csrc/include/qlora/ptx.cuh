// All handwritten PTX instructions of the kernels, each with the function that the host emulator runs instead
// (docs/gpu_less.md). Those of sm_90a are in ptx_sm90.cuh; no other file contains inline assembly.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace qlora::ptx {

#ifdef QLORA_CUDA_HOST

// Copies `bytes` (4, 8 or 16) asynchronously from global to shared memory; writes zeros if !valid.
template <int bytes>
inline void cp_async(void* to_sh, const void* from_gl, bool valid) {
    cuda_host::cp_async(to_sh, from_gl, bytes, valid ? bytes : 0);
}
// Closes the group of copies issued since the last commit.
inline void cp_async_commit() { cuda_host::cp_async_commit(); }
// Waits until at most the `groups` youngest groups of this thread's copies are incomplete.
template <int groups>
inline void cp_async_wait() {
    cuda_host::cp_async_wait(groups);
}

// A policy for cache_hint operands: the L2 cache evicts lines that are read under it first. A hint changes no value.
inline uint64_t evict_first_policy() { return 0; }
// Copies 16 bytes of data that are read once, under `policy`, and fetches their 128-byte line into L2.
inline void cp_async_once(void* to_sh, const void* from_gl, [[maybe_unused]] uint64_t policy) {
    cuda_host::cp_async(to_sh, from_gl, 16, 16);
}

// Loads four 8x8 matrices of 16-bit elements; lane l gives the address of the 16-byte row l % 8 of matrix l / 8.
inline void ldmatrix_x4(uint32_t (&words)[4], const void* row_sh) {
    const cuda_host::Words4 loaded = cuda_host::ldmatrix(4, false, row_sh);
    for (int i = 0; i < 4; i++) words[i] = loaded.word[i];
}

// sum += a b on tensor cores: a [16, 16], b [16, 8] of T, fp32 sums.
template <typename T>
inline void mma_m16n8k16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const cuda_host::MmaOperands operands{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {sum[0], sum[1], sum[2], sum[3]}};
    const cuda_host::Floats4 result =
        std::is_same_v<T, __half> ? cuda_host::mma_m16n8k16_fp16(operands) : cuda_host::mma_m16n8k16_bf16(operands);
    for (int i = 0; i < 4; i++) sum[i] = result.value[i];
}
// The same for bf16 with a sum that begins at zero, which costs no register and no instruction.
inline void mma_m16n8k16_from_zero(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    for (float& each : sum) each = 0.0f;
    mma_m16n8k16<__nv_bfloat16>(sum, a, b);
}

// Ends the kernel with an error.
[[noreturn]] inline void trap() { cuda_host::machine().fail("trap"); }

#else

__device__ __forceinline__ uint32_t shared_address(const void* pointer_sh) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer_sh));
}

template <int bytes>
__device__ __forceinline__ void cp_async(void* to_sh, const void* from_gl, bool valid) {
    if constexpr (bytes == 16) {  // .cg bypasses L1: packed weights and activations are read once
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to_sh)), "l"(from_gl),
                     "r"(valid ? 16 : 0)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(to_sh)), "l"(from_gl),
                     "n"(bytes), "r"(valid ? bytes : 0)
                     : "memory");
    }
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int groups>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
}

__device__ __forceinline__ void trap() { asm volatile("trap;"); }

__device__ __forceinline__ uint64_t evict_first_policy() {
    uint64_t policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void cp_async_once(void* to_sh, const void* from_gl, uint64_t policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(to_sh)),
                 "l"(from_gl), "l"(policy)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&words)[4], const void* row_sh) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(row_sh))
                 : "memory");
}

template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, __half>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

__device__ __forceinline__ void mma_m16n8k16_from_zero(float (&sum)[4], const uint32_t (&a)[4],
                                                       const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %10, %10};"
        : "=f"(sum[0]), "=f"(sum[1]), "=f"(sum[2]), "=f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.0f));
}

#endif

}  // namespace qlora::ptx
