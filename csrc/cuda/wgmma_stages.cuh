// The stages of linear_nf4_wgmma in shared memory: how large they are, what lies between them, and the TMA copies and
// barriers that fill them.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "launchers.h"
#include "qlora/nf4.cuh"
#include "qlora/ptx_sm90.cuh"

namespace qlora {

constexpr int kWgmmaWarps = 8;  // that multiply: two warpgroups
constexpr int kWgmmaThreads = kWgmmaWarps * 32;
constexpr int kWgmmaRows = 128;   // of w in a thread block, 64 a warpgroup
constexpr int kWgmmaBlockK = 64;  // of a stage
constexpr int kWgmmaStages = 4;
constexpr int kAhead = 2;  // stages that are fetched before they are used; the others are free for slower warps
static_assert(kAhead + 2 <= kWgmmaStages);
constexpr int kBlockKShift = 6;
static_assert(1 << kBlockKShift == kWgmmaBlockK);
constexpr int kRowBytes = kWgmmaBlockK / 2;   // of a row of w in a stage
constexpr int kColumnBytes = kWgmmaRows / 2;  // the same where transposed: 64 rows of 128 columns
static_assert(kWgmmaRows * kRowBytes == kWgmmaBlockK * kColumnBytes);
constexpr int kPitch = kWgmmaRows + 4;  // floats of a row of sums, so that a warp's stores have no bank conflict
constexpr unsigned kWholeWarp = 0xFFFFFFFFu;

struct WgmmaProblem : LinearNF4GemmArgs {
    CUtensorMap x_map, packed_map, left_map;
    int N, K;
    int gemm_k, gemm_n;   // K and N; N and K where transposed
    int steps_per_split;  // of kWgmmaBlockK
};

// A line of the table, one for each value of a byte. pair: its two codes in fp32, once for each of 16 lanes, so that a
// half-warp, which loads 8 bytes a lane, has no bank conflict. Lines are 256 bytes apart, which makes an offset one
// instruction; what lies between them holds barriers.
struct WgmmaLine {
    float2 pair[16];
    uint64_t barrier[16];
};

// The tiles are written by TMA: x by 16-byte chunks c at c ^ (row % 8), packed rows of 32 bytes at
// c ^ (row / 4 % 2), those of 64 bytes at c ^ (row / 2 % 4).
template <int M_TILE>
struct alignas(1024) WgmmaShared {
    uint16_t x[kWgmmaStages][M_TILE][kWgmmaBlockK];
    uint8_t packed[kWgmmaStages][kWgmmaRows * kRowBytes];
    WgmmaLine line[256];
    AbsmaxTable absmax;

    __device__ __forceinline__ uint64_t* full(int stage) { return &line[0].barrier[stage]; }
    __device__ __forceinline__ uint64_t* empty(int stage) { return &line[1].barrier[stage]; }
    __device__ __forceinline__ uint64_t* lora_full(int i) { return &line[2].barrier[i]; }
};

// The stage in whose x a step of LoRA has its tile of lora_left: one that is fetched into only after LoRA's product.
__device__ __forceinline__ int left_stage(int step) { return kAhead + step % 2; }

// Lane l computes one entry of the table; then the warp writes four lines at a time.
__device__ __forceinline__ void fill_lines(WgmmaLine (&line)[256], int warp, int lane) {
    const int byte = warp * 32 + lane;
    const float high = nf4_code(byte >> 4), low = nf4_code(byte & 15);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const int from = i * 4 + lane / 8;
        const float first = __shfl_sync(kWholeWarp, high, from), second = __shfl_sync(kWholeWarp, low, from);
        reinterpret_cast<float4*>(line[warp * 32 + from].pair)[lane % 8] = make_float4(first, second, first, second);
    }
}

// Issues the TMA copies of a thread block. One thread.
template <int M_TILE, bool TRANSPOSED>
class TileCopies {
  public:
    __device__ __forceinline__ TileCopies(const WgmmaProblem& p, WgmmaShared<M_TILE>& shared)
        : p_(p), shared_(shared) {}

    __device__ __forceinline__ void make_barriers() const {
        for (int stage = 0; stage < kWgmmaStages; stage++) {
            ptx::barrier_init(shared_.full(stage), 1);
            ptx::barrier_init(shared_.empty(stage), kWgmmaWarps);
        }
        for (int i = 0; i < 2; i++) ptx::barrier_init(shared_.lora_full(i), 1);
        ptx::barrier_fence();
    }

    // x and packed weights of a step, once all warps have left what its stage held.
    __device__ __forceinline__ void fetch(int step) const {
        const int stage = step % kWgmmaStages;
        const int k0 = (int(blockIdx.z) * p_.steps_per_split + step) * kWgmmaBlockK;
        if (step >= kWgmmaStages) ptx::barrier_wait(shared_.empty(stage), (unsigned(step) / kWgmmaStages - 1) % 2);
        uint64_t* const full = shared_.full(stage);
        ptx::barrier_arrive_expecting(full, sizeof shared_.x[0] + sizeof shared_.packed[0]);
        const int n0 = int(blockIdx.x) * kWgmmaRows;
        ptx::copy_tile(shared_.packed[stage], &p_.packed_map, (TRANSPOSED ? n0 : k0) / 2, TRANSPOSED ? k0 : n0, full);
        ptx::copy_tile(shared_.x[stage], &p_.x_map, k0, int(blockIdx.y) * M_TILE, full);
    }

    // Columns 64 step to 64 step + 63 of lora_left, zeros past the end.
    __device__ __forceinline__ void fetch_left(int step) const {
        uint64_t* const full = shared_.lora_full(step % 2);
        ptx::barrier_arrive_expecting(full, sizeof shared_.x[0]);
        ptx::copy_tile(shared_.x[left_stage(step)], &p_.left_map, step * kWgmmaBlockK, int(blockIdx.y) * M_TILE, full);
    }

  private:
    const WgmmaProblem& p_;
    WgmmaShared<M_TILE>& shared_;
};

}  // namespace qlora
