// PTX instructions of sm_90a: mbarriers, TMA copies of tiles, products of a warpgroup (wgmma). Each has the function
// that the host emulator runs instead (docs/gpu_less.md).
//
// Barriers and tiles are in shared memory (_sh). A phase of a barrier completes when the pending arrivals and the
// pending bytes are both zero; phases are told apart by their parity, which begins with 0.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "qlora/ptx.cuh"

namespace qlora::ptx {

// Start address, stride of 1024 bytes between groups of eight rows, all in units of 16 bytes; swizzle 1: 128 bytes.
constexpr __host__ __device__ uint64_t descriptor_of(uint32_t shared_address) {
    return uint64_t((shared_address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 |
           uint64_t(1) << 62;
}

#ifdef QLORA_CUDA_HOST

using cuda_host::Where;

// Makes a barrier whose phases take `arrivals` arrivals. One thread; then barrier_fence, then __syncthreads.
inline void barrier_init(uint64_t* barrier_sh, int arrivals, Where where = Where::current()) {
    cuda_host::mbarriers().init(barrier_sh, uint32_t(arrivals), where);
}
// Makes barriers that this thread has initialized visible to the asynchronous proxy.
inline void barrier_fence() { cuda_host::mbarriers().fence_init(); }
inline void barrier_arrive(uint64_t* barrier_sh, Where where = Where::current()) {
    cuda_host::mbarriers().arrive(barrier_sh, 1, where);
}
// Arrives, and adds `bytes` to the bytes for which the present phase waits.
inline void barrier_arrive_expecting(uint64_t* barrier_sh, uint32_t bytes, Where where = Where::current()) {
    cuda_host::mbarriers().expect(barrier_sh, bytes, where);
    cuda_host::mbarriers().arrive(barrier_sh, 1, where);
}
// Returns when the phase of this parity has completed.
inline void barrier_wait(uint64_t* barrier_sh, uint32_t parity, Where where = Where::current()) {
    cuda_host::mbarriers().wait(barrier_sh, parity, where);
}

// Copies the box of `map` whose first element is (row, column) to shared memory, where its bytes arrive at the barrier;
// elements outside the tensor are zero. One thread. to_sh: aligned as the map's swizzle demands, 1024 bytes for 128.
inline void copy_tile(void* to_sh, const CUtensorMap* map, int column, int row, uint64_t* barrier_sh,
                      Where where = Where::current()) {
    cuda_host::tensor_copies().issue(to_sh, map, {column, row}, barrier_sh, where);
}

// Makes what this thread has written to shared memory by ordinary stores visible to later wgmma and copies.
inline void proxy_fence() { cuda_host::async_proxy().fence(); }

// Orders this thread's accesses to registers before later wgmma of the warpgroup: before the first one, and whenever
// another instruction has changed a sum or an operand.
inline void wgmma_fence() { cuda_host::warpgroups().fence(); }
// Closes the group of wgmma issued since the last commit.
inline void wgmma_commit() { cuda_host::warpgroups().commit(); }
// Waits until at most the `groups` youngest groups are incomplete. Sums and a of a pending wgmma may not be touched.
template <int groups>
inline void wgmma_wait(Where where = Where::current()) {
    cuda_host::warpgroups().wait(groups, where);
}

// The operand b of wgmma: N rows of 64 elements (128 bytes) along k, stored by a TMA copy with a swizzle of 128 bytes
// at a multiple of 1024 bytes. Adding 2 to the result moves it by 16 elements along k.
inline uint64_t tile_descriptor(const void* tile_sh) {
    return descriptor_of(uint32_t(cuda_host::machine().shared_address(tile_sh, 1)));
}

// sum = a b (+ sum if accumulate) by the 128 threads of a warpgroup, asynchronously: a [64, 16] of T in registers, b
// [N, 16] in shared memory (tile_descriptor), fp32 sums. Warp w of the warpgroup has rows 16 w to 16 w + 15 of a in the
// layout of mma.m16n8k16, and the same rows of the sums: sum[4 j + i] is element i of n8 tile j.
template <typename T, int N>
inline void wgmma_m64k16(float (&sum)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate,
                         Where where = Where::current()) {
    using cuda_host::Element16;
    cuda_host::WgmmaShape shape;
    shape.n = N, shape.element = std::is_same_v<T, __half> ? Element16::kFp16 : Element16::kBf16;
    shape.accumulate = accumulate, shape.b = b;
    uint32_t* sums[N / 2];
    for (int i = 0; i < N / 2; i++) sums[i] = reinterpret_cast<uint32_t*>(&sum[i]);
    cuda_host::warpgroups().issue(shape, a, sums, where);
}

#else

__device__ __forceinline__ void barrier_init(uint64_t* barrier_sh, int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier_sh)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void barrier_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_arrive(uint64_t* barrier_sh) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier_sh)) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expecting(uint64_t* barrier_sh, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier_sh)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier_sh, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(barrier_sh)),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ void copy_tile(void* to_sh, const CUtensorMap* map, int column, int row,
                                          uint64_t* barrier_sh) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
            shared_address(to_sh)),
        "l"(map), "r"(shared_address(barrier_sh)), "r"(column), "r"(row)
        : "memory");
}

__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int groups>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(groups) : "memory");
}

__device__ __forceinline__ uint64_t tile_descriptor(const void* tile_sh) {
    return descriptor_of(shared_address(tile_sh));
}

#define QLORA_FLOATS_8(sum, i)                                                                              \
    "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), "+f"(sum[i + 5]), \
        "+f"(sum[i + 6]), "+f"(sum[i + 7])

template <typename T, int N>
__device__ __forceinline__ void wgmma_m64k16(float (&sum)[N / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    static_assert(N == 64 || N == 128 || N == 256);
    if constexpr (N == 64 && std::is_same_v<T, __half>) {
        asm volatile(
            "{ .reg .pred accumulate; setp.ne.b32 accumulate, %37, 0; "
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
            "}, {%32, %33, %34, %35}, %36, accumulate, 1, 1, 0; }"
            : QLORA_FLOATS_8(sum, 0), QLORA_FLOATS_8(sum, 8), QLORA_FLOATS_8(sum, 16), QLORA_FLOATS_8(sum, 24)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));
    } else if constexpr (N == 64) {
        asm volatile(
            "{ .reg .pred accumulate; setp.ne.b32 accumulate, %37, 0; "
            "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
            "}, {%32, %33, %34, %35}, %36, accumulate, 1, 1, 0; }"
            : QLORA_FLOATS_8(sum, 0), QLORA_FLOATS_8(sum, 8), QLORA_FLOATS_8(sum, 16), QLORA_FLOATS_8(sum, 24)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));
    } else if constexpr (N == 128 && std::is_same_v<T, __half>) {
        asm volatile(
            "{ .reg .pred accumulate; setp.ne.b32 accumulate, %69, 0; "
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
            "}, {%64, %65, %66, %67}, %68, accumulate, 1, 1, 0; }"
            : QLORA_FLOATS_8(sum, 0), QLORA_FLOATS_8(sum, 8), QLORA_FLOATS_8(sum, 16), QLORA_FLOATS_8(sum, 24),
              QLORA_FLOATS_8(sum, 32), QLORA_FLOATS_8(sum, 40), QLORA_FLOATS_8(sum, 48), QLORA_FLOATS_8(sum, 56)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));
    } else if constexpr (N == 128) {
        asm volatile(
            "{ .reg .pred accumulate; setp.ne.b32 accumulate, %69, 0; "
            "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
            "}, {%64, %65, %66, %67}, %68, accumulate, 1, 1, 0; }"
            : QLORA_FLOATS_8(sum, 0), QLORA_FLOATS_8(sum, 8), QLORA_FLOATS_8(sum, 16), QLORA_FLOATS_8(sum, 24),
              QLORA_FLOATS_8(sum, 32), QLORA_FLOATS_8(sum, 40), QLORA_FLOATS_8(sum, 48), QLORA_FLOATS_8(sum, 56)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));
    } else if constexpr (N == 256 && std::is_same_v<T, __half>) {
        asm volatile(
            "{ .reg .pred accumulate; setp.ne.b32 accumulate, %133, 0; "
            "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
            "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
            "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
            "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
            "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
            "}, {%128, %129, %130, %131}, %132, accumulate, 1, 1, 0; }"
            : QLORA_FLOATS_8(sum, 0), QLORA_FLOATS_8(sum, 8), QLORA_FLOATS_8(sum, 16), QLORA_FLOATS_8(sum, 24),
              QLORA_FLOATS_8(sum, 32), QLORA_FLOATS_8(sum, 40), QLORA_FLOATS_8(sum, 48), QLORA_FLOATS_8(sum, 56),
              QLORA_FLOATS_8(sum, 64), QLORA_FLOATS_8(sum, 72), QLORA_FLOATS_8(sum, 80), QLORA_FLOATS_8(sum, 88),
              QLORA_FLOATS_8(sum, 96), QLORA_FLOATS_8(sum, 104), QLORA_FLOATS_8(sum, 112), QLORA_FLOATS_8(sum, 120)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));
    } else if constexpr (N == 256) {
        asm volatile(
            "{ .reg .pred accumulate; setp.ne.b32 accumulate, %133, 0; "
            "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
            "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
            "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
            "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
            "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
            "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
            "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
            "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
            "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
            "}, {%128, %129, %130, %131}, %132, accumulate, 1, 1, 0; }"
            : QLORA_FLOATS_8(sum, 0), QLORA_FLOATS_8(sum, 8), QLORA_FLOATS_8(sum, 16), QLORA_FLOATS_8(sum, 24),
              QLORA_FLOATS_8(sum, 32), QLORA_FLOATS_8(sum, 40), QLORA_FLOATS_8(sum, 48), QLORA_FLOATS_8(sum, 56),
              QLORA_FLOATS_8(sum, 64), QLORA_FLOATS_8(sum, 72), QLORA_FLOATS_8(sum, 80), QLORA_FLOATS_8(sum, 88),
              QLORA_FLOATS_8(sum, 96), QLORA_FLOATS_8(sum, 104), QLORA_FLOATS_8(sum, 112), QLORA_FLOATS_8(sum, 120)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)));
    }
}
#undef QLORA_FLOATS_8

#endif

}  // namespace qlora::ptx
