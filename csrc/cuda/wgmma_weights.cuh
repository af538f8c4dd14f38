// How a warp of linear_nf4_wgmma decodes packed weights in registers into left operands of wgmma: 16 rows of the output
// by 64 of the contraction, which are rows of w by its columns (forward) or columns of w by its rows (grad_x).
//
// Thread (g = lane / 4, t = lane % 4) has two outputs of its warp's 16, and in each step of 16 along k four pairs:
//
//     k of the step    2 t, 2 t + 1        2 t + 8, 2 t + 9
//     first output     a[0]                a[2]
//     second output    a[1]                a[3]
//
// A byte becomes two codes by one lookup: a byte permutation puts it into bits 8 to 15 of the offset of its line, the
// lane's copy of the entry into bits 3 to 6.
#pragma once

#include <cstdint>

#include "qlora/floats.cuh"
#include "qlora/nf4.cuh"
#include "wgmma_stages.cuh"

namespace qlora {

// The codes of one byte of a word, chosen by a selector that is kept in a register.
class PairLookup {
  public:
    __device__ __forceinline__ PairLookup(const WgmmaLine (&line)[256], int lane, int byte)
        : table_(reinterpret_cast<const char*>(line)),
          column_(lane % 16 * sizeof(float2)),
          selector_(0x5504 | byte << 4) {}

    __device__ __forceinline__ float2 operator()(uint32_t word) const {
        return *reinterpret_cast<const float2*>(table_ + __byte_perm(word, column_, selector_));
    }

  private:
    const char* table_;
    uint32_t column_, selector_;
};

// y = x w^T. The thread's outputs are rows g and g + 8 of the warp's; it needs byte t of both words of eight bytes:
//
//     word             0                       1
//     byte             0    1    2    3        0    1      2      3
//     k of the step    0 1  2 3  4 5  6 7      8 9  10 11  12 13  14 15
//     thread t         0    1    2    3        0    1      2      3
class RowWeights {
  public:
    static constexpr bool kTransposed = false;
    static __device__ __forceinline__ int output(int warp, int lane, int i) { return warp * 16 + lane / 4 + 8 * i; }

    __device__ __forceinline__ RowWeights(const WgmmaProblem& p, const AbsmaxTable& table, int first_step, int steps,
                                          int warp, int lane)
        : constants_(p.weight), table_(table), shift_(p.weight.block_shift - kBlockKShift), steps_(steps) {
        t_ = lane % 4;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int n = min(int(blockIdx.x) * kWgmmaRows + output(warp, lane, i), p.N - 1);
            first_block_[i] = n * uint32_t(p.K / kWgmmaBlockK) + first_step;
        }
        const int row = warp * 16 + lane / 4;
        piece_ = row * kRowBytes + (row / 4 % 2) * 16;
        load(0);
    }

    // Lane t has the constants of step t of each group, loaded a group before they are decoded. Steps past the end have
    // an absmax of zero.
    __device__ __forceinline__ void begin_group(int step) {
        const bool exists = step + t_ < steps_;
        const float first = constants_.decode(table_, raw_[0]), second = constants_.decode(table_, raw_[1]);
        absmax_[0] = exists ? first : 0.0f, absmax_[1] = exists ? second : 0.0f;
        if (step + kWgmmaStages < steps_) load(step + kWgmmaStages);
    }
    __device__ __forceinline__ void begin_stage(int, int stage) {
        scale_[0] = __shfl_sync(kWholeWarp, absmax_[0], stage, 4);
        scale_[1] = __shfl_sync(kWholeWarp, absmax_[1], stage, 4);
    }

    // packed: 128 rows of 32 bytes, of which pieces of 16 bytes are exchanged.
    template <typename T>
    __device__ __forceinline__ void decode(uint32_t (&a)[4][4], const uint8_t* packed,
                                           const PairLookup& pair_of) const {
#pragma unroll
        for (int half = 0; half < 2; half++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint4 words = *reinterpret_cast<const uint4*>(packed + (piece_ ^ half * 16) + i * 8 * kRowBytes);
                const uint32_t word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float2 pair = pair_of(word[j]);
                    a[half * 2 + j / 2][j % 2 * 2 + i] =
                        pack_pair<T>(__fmul_rn(pair.x, scale_[i]), __fmul_rn(pair.y, scale_[i]));
                }
            }
        }
    }

    static __device__ __forceinline__ int byte_of_lane(int lane) { return lane % 4; }

  private:
    __device__ __forceinline__ void load(int step) {
#pragma unroll
        for (int i = 0; i < 2; i++) raw_[i] = constants_.load((first_block_[i] + min(step + t_, steps_ - 1)) >> shift_);
    }

    AbsmaxReader constants_;
    const AbsmaxTable& table_;
    int shift_, steps_, t_, piece_;
    uint32_t first_block_[2];
    RawAbsmax raw_[2];
    float absmax_[2], scale_[2];
};

// grad_x = grad_y w. The thread's outputs are columns 2 g and 2 g + 1 of the warp's 16, which one byte of a row of w
// holds; the pairs of an operand are from two neighbouring rows.
class ColumnWeights {
  public:
    static constexpr bool kTransposed = true;
    static __device__ __forceinline__ int output(int warp, int lane, int i) { return warp * 16 + lane / 4 * 2 + i; }

    __device__ __forceinline__ ColumnWeights(const WgmmaProblem& p, const AbsmaxTable& table, int first_step, int steps,
                                             int warp, int lane)
        : constants_(p.weight), table_(table), shift_(p.weight.block_shift - kBlockKShift), N_(p.N) {
        const int blocks_of_row = p.K / kWgmmaBlockK;
        blocks_of_row_ = blocks_of_row;
        block_ = min((int(blockIdx.x) * kWgmmaRows + warp * 16) / kWgmmaBlockK, blocks_of_row - 1);
        row_ = first_step * kWgmmaBlockK + lane;
        const int t = lane % 4;
        word_ = 2 * t * kColumnBytes + (warp / 2 ^ t) * 16 + warp % 2 * 8 + lane / 16 * 4;
        load(0);
    }

    __device__ __forceinline__ void begin_group(int) const {}
    // Lane l has the constants of rows l and l + 32 of a stage, loaded a stage before they are decoded. Rows past the
    // end have an absmax of zero.
    __device__ __forceinline__ void begin_stage(int step, int) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float absmax = constants_.decode(table_, raw_[i]);
            absmax_[i] = row_ + step * kWgmmaBlockK + 32 * i < N_ ? absmax : 0.0f;
        }
        load(step + 1);
    }

    // packed: 64 rows of 64 bytes, of which pieces of 16 bytes are exchanged.
    template <typename T>
    __device__ __forceinline__ void decode(uint32_t (&a)[4][4], const uint8_t* packed,
                                           const PairLookup& pair_of) const {
#pragma unroll
        for (int i = 0; i < 8; i++) {  // of eight rows: step i / 2, its half i % 2
            float value[2][2];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const uint32_t word = *reinterpret_cast<const uint32_t*>(packed + word_ + (i * 8 + j) * kColumnBytes);
                const float2 pair = pair_of(word);
                const float scale = __shfl_sync(kWholeWarp, absmax_[i / 4], i % 4 * 8 + threadIdx.x % 4 * 2 + j);
                value[0][j] = __fmul_rn(pair.x, scale), value[1][j] = __fmul_rn(pair.y, scale);
            }
            a[i / 2][i % 2 * 2] = pack_pair<T>(value[0][0], value[0][1]);
            a[i / 2][i % 2 * 2 + 1] = pack_pair<T>(value[1][0], value[1][1]);
        }
    }

    static __device__ __forceinline__ int byte_of_lane(int lane) { return lane / 4 % 4; }

  private:
    __device__ __forceinline__ void load(int step) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = min(row_ + step * kWgmmaBlockK + 32 * i, N_ - 1);
            raw_[i] = constants_.load((uint32_t(row) * uint32_t(blocks_of_row_) + block_) >> shift_);
        }
    }

    AbsmaxReader constants_;
    const AbsmaxTable& table_;
    int shift_, N_, blocks_of_row_, block_, row_, word_;
    RawAbsmax raw_[2];
    float absmax_[2];
};

}  // namespace qlora
