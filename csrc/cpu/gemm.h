// The matrix product that every linear op is made of: C[M, N] = start + A[M, L] * B[L, N] with fp32 accumulators.
//
// A is packed once per call into tiles of up to kMaxRows rows, [L][rows]. B is never stored: each task owns a group of
// column strips, decodes a panel [steps][kColumns] of them into its L2, and runs every tile of A over it, so that a
// weight is decoded once per call however large M is. A tile's accumulators live in registers for a whole panel:
//
//     for each panel (a piece of L, a group of strips)            decode: fill(...)
//         for each tile of A, for each strip of the group         rows x kColumns accumulators, kept over `steps`
//             c += a[step][row] * b[step][column]
//
// One step is one element of L, or a pair of them for vdpbf16ps (kPair = 2), where a and b hold 32-bit pairs. L is
// padded with zeros to whole steps, strips to whole columns and the last tile to whole rows.
//
// The order of additions for one element of C depends only on the shapes: any number of threads gives the same bits.
#pragma once

#include "decode.h"
#include "qlora/parallel.h"
#include "qlora/workspace.h"
#include "simd.h"

namespace qlora::QLORA_ISA {

// fp32 operands, fused multiply-add.
struct FloatMac {
    using Elem = float;
    static constexpr int kPair = 1;
    static constexpr int64_t kChain = 32;
    static F32 broadcast(const float* a) { return set1(*a); }
    static F32 load_b(const float* b) { return load(b); }
    static F32 mac(F32 acc, F32 a, F32 b) { return fma(a, b, acc); }
};

#ifdef __AVX512BF16__
// bf16 operands in pairs along L, two exact products and fp32 sums per lane.
struct Bf16Mac {
    using Elem = Bf16;
    static constexpr int kPair = 2;
    static constexpr int64_t kChain = 1 << 14;  // far below the rounding of bf16 operands
    static __m512i broadcast(const Bf16* a) {
        int pair;
        memcpy(&pair, a, sizeof pair);
        return _mm512_set1_epi32(pair);
    }
    static __m512i load_b(const Bf16* b) { return _mm512_loadu_si512(b); }
    static F32 mac(F32 acc, __m512i a, __m512i b) {
        return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
    }
};
#endif

// Rows of accumulators: 2 * kMaxRows registers of C, 2 of B and 1 of A have to fit the register file.
#if defined(__AVX512F__)
inline constexpr int kMaxRows = 12;
#elif defined(__AVX2__)
inline constexpr int kMaxRows = 6;
#else
inline constexpr int kMaxRows = 4;
#endif

// c[rows][kVectors * kLanes] += a[steps][rows] * b[steps][kVectors * kLanes]
//
// Sums run in chains of kChain steps that are then added to c: the rounding error of a long sum grows with the length
// of its chains.
template <class Mac, int kRows, int kVectors>
static void tile_kernel(const typename Mac::Elem* a, const typename Mac::Elem* b, int64_t steps, float* c) {
    while (steps > 0) {
        const int64_t chain = steps < Mac::kChain ? steps : Mac::kChain;
        F32 acc[kRows][kVectors];
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
            for (int j = 0; j < kVectors; ++j) acc[i][j] = zero();
        }
        for (int64_t s = 0; s < chain; ++s) {
            decltype(Mac::load_b(b)) vb[kVectors];
#pragma GCC unroll 2
            for (int j = 0; j < kVectors; ++j) vb[j] = Mac::load_b(b + j * kLanes * Mac::kPair);
#pragma GCC unroll 16
            for (int i = 0; i < kRows; ++i) {
                const auto va = Mac::broadcast(a + i * Mac::kPair);
#pragma GCC unroll 2
                for (int j = 0; j < kVectors; ++j) acc[i][j] = Mac::mac(acc[i][j], va, vb[j]);
            }
            a += kRows * Mac::kPair;
            b += kVectors * kLanes * Mac::kPair;
        }
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
            for (int j = 0; j < kVectors; ++j) {
                float* sum = c + (i * kVectors + j) * kLanes;
                store(sum, add(load(sum), acc[i][j]));
            }
        }
        // Without it the compiler keeps the sums of the next chain on the stack, a second copy of c.
        asm volatile("" ::: "memory");
        steps -= chain;
    }
}

template <class Mac>
using TileKernel = void (*)(const typename Mac::Elem*, const typename Mac::Elem*, int64_t, float*);

template <class Mac, int kVectors, int kRows = kMaxRows>
static TileKernel<Mac> tile_kernel_for(int rows) {
    if constexpr (kRows > 1) {
        if (rows < kRows) return tile_kernel_for<Mac, kVectors, kRows - 1>(rows);
    }
    return tile_kernel<Mac, kRows, kVectors>;
}

// How M rows are cut: equal tiles, so that no tile is left with too few accumulators to hide the multiply's latency.
struct Tiling {
    int64_t M;
    int64_t count;
    int rows;

    int64_t begin(int64_t tile) const { return tile * rows; }
    int valid(int64_t tile) const { return static_cast<int>(M - begin(tile) < rows ? M - begin(tile) : rows); }
};

static inline Tiling tiling_of(int64_t M) {
    const int64_t count = (M + kMaxRows - 1) / kMaxRows;
    const int rows = static_cast<int>((M + count - 1) / count);
    return {M, (M + rows - 1) / rows, rows};
}

// A packed operand: tile t at data + t * tile_size(), [steps][rows][kPair].
template <class Mac>
struct Packed {
    using Elem = typename Mac::Elem;
    Elem* data;
    int64_t steps;
    Tiling tiling;

    int64_t tile_size() const { return steps * tiling.rows * Mac::kPair; }
    Elem* tile(int64_t t) const { return data + t * tile_size(); }
};

template <class Mac>
static inline int64_t steps_of(int64_t length) {
    return (length + Mac::kPair - 1) / Mac::kPair;
}

template <class Mac>
static Packed<Mac> packed_operand(Slot slot, int64_t M, int64_t length) {
    Packed<Mac> packed{nullptr, steps_of<Mac>(length), tiling_of(M)};
    const size_t elements = static_cast<size_t>(packed.tile_size() * packed.tiling.count);
    packed.data = static_cast<typename Mac::Elem*>(workspace(slot, elements * sizeof(typename Mac::Elem)));
    return packed;
}

// One task's share: the strips [strip0, strip1) for the tiles [tile0, tile1).
struct Share {
    int64_t strip0, strip1, tile0, tile1;
};

struct Plan {
    int64_t strips, group, tile_step, tasks, tile_tasks, panel_steps;

    Share share(int64_t task, int64_t tiles) const {
        const int64_t s = task / tile_tasks * group;
        const int64_t t = task % tile_tasks * tile_step;
        return {s, s + group < strips ? s + group : strips, t, t + tile_step < tiles ? t + tile_step : tiles};
    }
};

// Panels of at most kPanelBytes leave half of a 1 MiB L2 to the tiles of A that stream past them. M is split only where
// there are too few strips to keep all threads busy, since each part decodes its panel again.
inline constexpr int64_t kPanelBytes = 512 << 10;
inline constexpr int64_t kMaxGroup = 4;

template <class Mac>
static inline Plan plan_of(int64_t columns, int64_t steps, int64_t tiles, int strip_columns) {
    Plan plan;
    const int64_t threads = num_threads();
    plan.strips = (columns + strip_columns - 1) / strip_columns;
    plan.group = plan.strips / (4 * threads);
    plan.group = plan.group < 1 ? 1 : plan.group > kMaxGroup ? kMaxGroup : plan.group;
    const int64_t groups = (plan.strips + plan.group - 1) / plan.group;
    plan.tile_tasks = groups >= threads ? 1 : (threads + groups - 1) / groups;
    if (plan.tile_tasks > tiles) plan.tile_tasks = tiles;
    plan.tile_step = (tiles + plan.tile_tasks - 1) / plan.tile_tasks;
    plan.tile_tasks = (tiles + plan.tile_step - 1) / plan.tile_step;
    plan.tasks = groups * plan.tile_tasks;
    const int64_t step_bytes =
        plan.group * strip_columns * Mac::kPair * static_cast<int64_t>(sizeof(typename Mac::Elem));
    const int64_t pieces = (steps * step_bytes + kPanelBytes - 1) / kPanelBytes;
    plan.panel_steps = (steps + pieces - 1) / pieces;
    return plan;
}

// fill(column0, columns, step0, step1, panel): write the strips of [column0, column0 + columns), zero-padded, each
//     [step1 - step0][strip width][kPair], one after the other.
// start(tile, column0, columns, c): the accumulators' first values, c[rows][strip width].
// finish(tile, column0, columns, c): take the result away.
template <class Mac, int kVectors, class Fill, class Start, class Finish>
static void panel_gemm(const Packed<Mac>& a, int64_t columns, const Fill& fill, const Start& start,
                       const Finish& finish) {
    using Elem = typename Mac::Elem;
    constexpr int kColumns = kVectors * kLanes;
    const Tiling tiling = a.tiling;
    const Plan plan = plan_of<Mac>(columns, a.steps, tiling.count, kColumns);
    const TileKernel<Mac> kernel = tile_kernel_for<Mac, kVectors>(tiling.rows);
    const int64_t tile_floats = tiling.rows * kColumns;
    const bool single_panel = plan.panel_steps >= a.steps;

    parallel_tasks(plan.tasks, [&](int64_t task) {
        const Share share = plan.share(task, tiling.count);
        const int64_t group = share.strip1 - share.strip0;
        const int64_t column0 = share.strip0 * kColumns;
        const int64_t column1 = share.strip1 * kColumns < columns ? share.strip1 * kColumns : columns;
        const int64_t strip_step = plan.panel_steps * kColumns * Mac::kPair;
        Elem* panel =
            static_cast<Elem*>(workspace(Slot::kPanel, static_cast<size_t>(group * strip_step) * sizeof(Elem)));
        const int64_t held = single_panel ? 1 : (share.tile1 - share.tile0) * group;
        float* partial =
            static_cast<float*>(workspace(Slot::kPartial, static_cast<size_t>(held * tile_floats) * sizeof(float)));

        for (int64_t step0 = 0; step0 < a.steps; step0 += plan.panel_steps) {
            const int64_t step1 = step0 + plan.panel_steps < a.steps ? step0 + plan.panel_steps : a.steps;
            fill(column0, column1 - column0, step0, step1, panel);
            for (int64_t t = share.tile0; t < share.tile1; ++t) {
                const Elem* a_tile = a.tile(t) + step0 * tiling.rows * Mac::kPair;
                for (int64_t g = 0; g < group; ++g) {
                    const int64_t c0 = column0 + g * kColumns;
                    const int64_t width = column1 - c0 < kColumns ? column1 - c0 : kColumns;
                    float* c = single_panel ? partial : partial + ((t - share.tile0) * group + g) * tile_floats;
                    if (step0 == 0) start(t, c0, width, c);
                    kernel(a_tile, panel + g * (step1 - step0) * kColumns * Mac::kPair, step1 - step0, c);
                    if (step1 == a.steps) finish(t, c0, width, c);
                }
            }
        }
    });
}

static inline void clear(float* c, int64_t floats) {
    for (int64_t i = 0; i < floats; i += kLanes) store(c + i, zero());
}

}  // namespace qlora::QLORA_ISA
