// The matrix product that all linear ops use, with fp32 accumulators:
//
//     C[M, N] = A[M, L] B[L, N]        C[m][n] = sum_l A[m][l] * B[l][n]
//
// A is x or grad_y and is read in place, by broadcasts of one element or pair. B is the decoded weight. It is never
// stored as a whole: each task owns a group of column strips of B, decodes one panel of them at a time into its L2
// cache, and multiplies every tile of A with the panel. Each weight is therefore decoded once per call, for any M.
//
//     for each panel (a range of L, a group of strips)            fill(range, panel): decode
//         for each tile of A (up to kMaxRows rows)
//             for each strip of the group (kColumns columns)      multiply: accumulators stay in registers
//                 for each step of the panel: c[row][column] += a[row][step] * b[step][column]
//                 after the last panel                            finish(tile, column0, columns, c): store
//
// One step is one element of L, or a pair of elements for vdpbf16ps (kPair = 2), for which a and b hold 32-bit pairs. L
// is padded with zeros to whole steps, N to whole strips.
//
// The order of additions for an element of C depends only on the shapes, so that any number of threads gives the same
// bits.
#pragma once

#include <algorithm>
#include <type_traits>

#include "array.h"
#include "decode.h"
#include "qlora/parallel.h"
#include "qlora/workspace.h"
#include "simd.h"

namespace qlora::QLORA_ISA {

// The multiply-add of fp32 operands: acc[lane] += a * b[lane].
struct Fp32Fma {
    using Elem = float;
    static constexpr int kPair = 1;
    static constexpr int64_t kChain = 32;        // steps whose products are summed before they are added to c
    static constexpr bool kTails = false;        // whether a low-rank product is the tail of a chain (LowRankTerm)
    static constexpr bool kRoundsTiles = false;  // whether finished sums may be stored without a second pass (StripEnd)
    static F32 broadcast(const float* a) { return set1(*a); }
    static F32 load_b(const float* b) { return load(b); }
    static F32 mac(F32 acc, F32 a, F32 b) { return fma(a, b, acc); }
};

#ifdef __AVX512BF16__
// The multiply-add of bf16 operands in pairs along L: acc[lane] += a[0] * b[lane][0] + a[1] * b[lane][1], with exact
// products and fp32 sums.
struct Bf16Dot {
    using Elem = Bf16;
    static constexpr int kPair = 2;
    static constexpr int64_t kChain = 1 << 14;  // its rounding error is far below that of bf16 operands
    static constexpr bool kTails = true;
    static constexpr bool kRoundsTiles = true;
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

// Rows of accumulators: 2 * kMaxRows registers of C, 2 of B and 1 of A must fit the register file.
#if defined(__AVX512F__) || defined(QLORA_NEON)
inline constexpr int kMaxRows = 12;
#elif defined(__AVX2__)
inline constexpr int kMaxRows = 6;
#else
inline constexpr int kMaxRows = 4;
#endif

// The end of a strip, or of one of its tiles: a tail of more steps, whose rows of a lie elsewhere, and the rows of the
// result to which the tile kernel rounds the finished sums. Without such rows, the sums stay in c.
template <class Mac>
struct StripEnd {
    using Elem = typename Mac::Elem;
    const Elem* tail_a = nullptr;  // rows `tail_stride` elements apart, steps kPair elements apart
    int64_t tail_stride = 0;
    const Elem* tail_b = nullptr;
    int64_t tail_steps = 0;
    Elem* out = nullptr;  // rows of kColumns elements, `out_stride` elements apart
    int64_t out_stride = 0;

    StripEnd from_row(int64_t row) const {
        return {tail_a + row * tail_stride, tail_stride, tail_b, tail_steps, out + row * out_stride, out_stride};
    }
};

// acc[rows][kVectors] += a[rows][steps] * b[steps][kVectors * kLanes]; the rows of a are `stride` elements apart, its
// steps `step`.
template <class Mac, int kRows, int kVectors>
__attribute__((always_inline)) static inline void accumulate(F32 (&acc)[kRows][kVectors], const typename Mac::Elem* a,
                                                             int64_t stride, int64_t step, const typename Mac::Elem* b,
                                                             int64_t steps) {
    // Every third row has a pointer; the others are addressed by offsets of `stride` and 2 * `stride`. This keeps the
    // addresses of twelve rows in the available registers.
    constexpr int kPointers = (kRows + 2) / 3;
    const typename Mac::Elem* rows[kPointers];
#pragma GCC unroll 4
    for (int i = 0; i < kPointers; ++i) rows[i] = a + 3 * i * stride;
    for (int64_t s = 0; s < steps; ++s) {
        decltype(Mac::load_b(b)) vb[kVectors];
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) vb[j] = Mac::load_b(b + j * kLanes * Mac::kPair);
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
            const auto va = Mac::broadcast(rows[i / 3] + i % 3 * stride);
#pragma GCC unroll 2
            for (int j = 0; j < kVectors; ++j) acc[i][j] = Mac::mac(acc[i][j], va, vb[j]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kPointers; ++i) rows[i] += step;
        b += kVectors * kLanes * Mac::kPair;
    }
}

// c[rows][kVectors * kLanes] = a[rows][steps] * b[steps][kVectors * kLanes] + tail, or += if `adds`. The finished sums
// are rounded to the rows of `end` instead if it has any.
//
// Sums run in chains of kChain steps, which are then added to c, because the rounding error of a sum grows with the
// length of its chains. The tail continues the last chain.
template <class Mac, int kRows, int kVectors>
static void tile_kernel(const typename Mac::Elem* a, int64_t stride, int64_t step, const typename Mac::Elem* b,
                        int64_t steps, const StripEnd<Mac>& end, bool adds, float* c) {
    while (steps > 0) {
        const int64_t chain = steps < Mac::kChain ? steps : Mac::kChain;
        F32 acc[kRows][kVectors];
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
            for (int j = 0; j < kVectors; ++j) acc[i][j] = zero();
        }
        accumulate<Mac, kRows, kVectors>(acc, a, stride, step, b, chain);
        a += chain * step;
        b += chain * kVectors * kLanes * Mac::kPair;
        steps -= chain;
        if (steps == 0 && end.tail_steps > 0) {
            accumulate<Mac, kRows, kVectors>(acc, end.tail_a, end.tail_stride, Mac::kPair, end.tail_b, end.tail_steps);
        }
        if constexpr (Mac::kRoundsTiles && kVectors == 2) {
            if (steps == 0 && end.out) {
                typename Mac::Elem* row = end.out;
#pragma GCC unroll 16
                for (int i = 0; i < kRows; ++i, row += end.out_stride) {
                    const float* sum = c + i * kVectors * kLanes;
                    store_sums(row, adds ? add(load(sum), acc[i][0]) : acc[i][0],
                               adds ? add(load(sum + kLanes), acc[i][1]) : acc[i][1]);
                }
                return;
            }
        }
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
            for (int j = 0; j < kVectors; ++j) {
                float* sum = c + (i * kVectors + j) * kLanes;
                store(sum, adds ? add(load(sum), acc[i][j]) : acc[i][j]);
            }
        }
        // Without this barrier, the compiler keeps the sums of the next chain on the stack, as a second copy of c.
        asm volatile("" ::: "memory");
        adds = true;
    }
}

// tile_kernel for a number of rows that is known only at run time.
template <class Mac>
using TileKernel = void (*)(const typename Mac::Elem*, int64_t, int64_t, const typename Mac::Elem*, int64_t,
                            const StripEnd<Mac>&, bool, float*);

template <class Mac, int kVectors, int kRows = kMaxRows>
static TileKernel<Mac> tile_kernel_for(int rows) {
    if constexpr (kRows > 1) {
        if (rows < kRows) return tile_kernel_for<Mac, kVectors, kRows - 1>(rows);
    }
    return tile_kernel<Mac, kRows, kVectors>;
}

// Splits M rows into tiles of at most `max_rows` rows, as evenly as possible, so that every tile has enough
// accumulators to hide the latency of the multiply.
struct Tiling {
    int64_t M = 0, count = 0;
    int64_t fewest = 0, longer = 0;  // rows of the last tiles; number of tiles in front of them with one row more

    Tiling() {}
    Tiling(int64_t rows, int max_rows) : M(rows), count((rows + max_rows - 1) / max_rows) {
        if (count > 0) fewest = M / count, longer = M % count;
    }
    // Without a division, because every tile of every strip asks for them.
    int64_t begin(int64_t tile) const { return tile * fewest + std::min(tile, longer); }
    int size(int64_t tile) const { return static_cast<int>(fewest + (tile < longer ? 1 : 0)); }
};

// The number of steps of a contraction of `length` elements.
template <class Mac>
static inline int64_t steps_of(int64_t length) {
    return (length + Mac::kPair - 1) / Mac::kPair;
}

// The operand A[M, L]: rows `stride` elements apart, each of whole steps that are `step` elements apart.
template <class Mac>
struct LhsView {
    using Elem = typename Mac::Elem;
    const Elem* data;
    int64_t stride, step, steps;
    Tiling tiling;

    // c = the steps [step0, step0 + count) of tile t times b[count], one strip of a panel, and the tile's end; or += if
    // `adds`.
    template <int kVectors>
    void multiply(int64_t t, int64_t step0, const Elem* b, int64_t count, const StripEnd<Mac>& end, bool adds,
                  float* c) const {
        const Elem* tile = data + tiling.begin(t) * stride + step0 * step;
        tile_kernel_for<Mac, kVectors>(tiling.size(t))(tile, stride, step, b, count, end, adds, c);
    }
};

// Several operands with the same rows as one: the steps of each follow those of the operand before it.
template <class Mac>
struct JoinedLhs {
    using Elem = typename Mac::Elem;
    const Array<LhsView<Mac>>& parts;
    int64_t steps;
    Tiling tiling;

    explicit JoinedLhs(const Array<LhsView<Mac>>& operands) : parts(operands), steps(0), tiling(parts[0].tiling) {
        for (const LhsView<Mac>& part : parts) steps += part.steps;
    }

    // As LhsView::multiply, over the steps of all parts.
    template <int kVectors>
    void multiply(int64_t t, int64_t step0, const Elem* b, int64_t count, const StripEnd<Mac>& end, bool adds,
                  float* c) const {
        int64_t first = 0;
        for (const LhsView<Mac>& part : parts) {
            const int64_t from = std::max(step0, first), to = std::min(step0 + count, first + part.steps);
            if (from < to) {
                part.template multiply<kVectors>(t, from - first, b + (from - step0) * kVectors * kLanes * Mac::kPair,
                                                 to - from, to == step0 + count ? end : StripEnd<Mac>(), adds, c);
                adds = true;
            }
            first += part.steps;
        }
    }
};

// Strips of panel_gemm that have no tail and stay in c.
struct NoEnds {};

static inline void clear(float* c, int64_t floats) {
    for (int64_t i = 0; i < floats; i += kLanes) store(c + i, zero());
}

// A panel of B: its columns [column0, column0 + columns) and its steps [step0, step1) of the contraction.
struct PanelRange {
    int64_t column0, columns, step0, step1;
};

// The part of C that one task computes: the strips [strip0, strip1) of the tiles [tile0, tile1).
struct TaskRange {
    int64_t strip0, strip1, tile0, tile1;
};

// With 4 strips per group, 3 of 4 reads of an A tile hit L1. Panels of at most kPanelBytes leave half of a 1 MiB L2 to
// the tiles of A that are streamed.
inline constexpr int64_t kMaxGroup = 4;
inline constexpr int64_t kPanelBytes = 512 << 10;

// kStrips: threads take strips of C, for wide B. kTiles: threads take tiles of C, for a B of few columns, which is
// small enough that every thread decodes all of it.
enum class Division { kStrips, kTiles };

// The division of C into tasks. Groups of strips become smaller towards the end, so that all threads finish together. M
// is divided only if there are fewer groups than threads, because every task decodes the panels of its strips itself.
// Neither changes the order of additions.
struct PanelSchedule {
    Division division;
    int64_t strips, tiles, threads, tile_tasks, tasks;

    PanelSchedule(Division by, int64_t all_strips, int64_t all_tiles)
        : division(by), strips(all_strips), tiles(all_tiles), threads(num_threads()) {
        int64_t groups = 0;
        for (int64_t strip = 0; strip < strips; strip += group(strip)) ++groups;
        tile_tasks = division == Division::kTiles ? threads : groups >= threads ? 1 : (threads + groups - 1) / groups;
        tile_tasks = std::min(tile_tasks, tiles);
        tasks = groups * tile_tasks;
    }

    // Number of strips in the group that starts at `strip`.
    int64_t group(int64_t strip) const {
        const int64_t left = strips - strip;
        return std::clamp<int64_t>(division == Division::kTiles ? left : left / (2 * threads), 1, kMaxGroup);
    }

    TaskRange range(int64_t task) const {
        int64_t strip = 0;
        for (int64_t i = task / tile_tasks; i > 0; --i) strip += group(strip);
        const int64_t part = task % tile_tasks;
        return {strip, strip + group(strip), part * tiles / tile_tasks, (part + 1) * tiles / tile_tasks};
    }
};

// Computes C[M, columns] from A = a, an LhsView or JoinedLhs, and the panels of B.
//
// fill(range, panel): writes the panel `range` of B as strips [step1 - step0][kColumns][kPair], one after the other,
// with zeros beyond the last column and beyond L.
// finish(tile, column0, columns, c): stores the finished accumulators c[rows][kColumns] of a tile; it may change c.
// end_of(column0, columns): returns the StripEnd of a strip, with row 0 of a and of the result; NoEnds for none. Tiles
// whose end has rows of the result are stored by the tile kernel instead of `finish`.
template <class Mac, int kVectors, class Lhs, class Fill, class Finish, class EndOf = NoEnds>
static void panel_gemm(const Lhs& a, int64_t columns, const Fill& fill, const Finish& finish, const EndOf& end_of = {},
                       Division division = Division::kStrips) {
    using Elem = typename Mac::Elem;
    constexpr int kColumns = kVectors * kLanes;
    constexpr int64_t kStepElements = kColumns * Mac::kPair;
    constexpr int64_t kMaxSteps = kPanelBytes / (kMaxGroup * kStepElements * static_cast<int64_t>(sizeof(Elem)));
    constexpr int64_t kTileFloats = kMaxRows * kColumns;
    const PanelSchedule schedule(division, (columns + kColumns - 1) / kColumns, a.tiling.count);
    const int64_t panels = (a.steps + kMaxSteps - 1) / kMaxSteps;
    const int64_t panel_steps = (a.steps + panels - 1) / panels;

    parallel_tasks(schedule.tasks, [&](int64_t task) {
        const TaskRange range = schedule.range(task);
        const int64_t group = range.strip1 - range.strip0;
        const int64_t column0 = range.strip0 * kColumns;
        const int64_t column1 = std::min(range.strip1 * kColumns, columns);
        Elem* panel = static_cast<Elem*>(
            workspace(Slot::kPanel, static_cast<size_t>(group * panel_steps * kStepElements) * sizeof(Elem)));
        const int64_t partial_tiles = panels == 1 ? 1 : (range.tile1 - range.tile0) * group;
        float* partial = static_cast<float*>(
            workspace(Slot::kPartial, static_cast<size_t>(partial_tiles * kTileFloats) * sizeof(float)));

        for (int64_t step0 = 0; step0 < a.steps; step0 += panel_steps) {
            const int64_t step1 = std::min(step0 + panel_steps, a.steps);
            fill(PanelRange{column0, column1 - column0, step0, step1}, panel);
            const bool ends = step1 == a.steps;
            StripEnd<Mac> strip_ends[kMaxGroup];
            if constexpr (!std::is_same_v<EndOf, NoEnds>) {
                for (int64_t g = 0; ends && g < group; ++g) {
                    const int64_t c0 = column0 + g * kColumns;
                    strip_ends[g] = end_of(c0, std::min<int64_t>(column1 - c0, kColumns));
                }
            }
            for (int64_t t = range.tile0; t < range.tile1; ++t) {
                for (int64_t g = 0; g < group; ++g) {
                    float* c = panels == 1 ? partial : partial + ((t - range.tile0) * group + g) * kTileFloats;
                    a.template multiply<kVectors>(t, step0, panel + g * (step1 - step0) * kStepElements, step1 - step0,
                                                  strip_ends[g].from_row(a.tiling.begin(t)), step0 > 0, c);
                    const int64_t c0 = column0 + g * kColumns;
                    if (ends && !strip_ends[g].out) finish(t, c0, std::min<int64_t>(column1 - c0, kColumns), c);
                }
            }
        }
    });
}

}  // namespace qlora::QLORA_ISA
