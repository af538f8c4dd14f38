// The tile product and its schedule.
//
// A strip is 32 rows of W in the forward product (64 if there is one tile of tokens) or 64 columns of W in grad_x. A
// chunk is 256 elements of the contraction: 16 KiB of decoded strip. Two such buffers alternate in L1: one is
// multiplied while the other is filled. All blocks of 32 tokens are multiplied with a decoded chunk and are loaded with
// a hint not to stay in L1. Accumulators stay in their tiles if there is one block of tokens or one chunk; otherwise
// they are kept as fp32 tiles in memory. Two schedules keep all of this within L2:
//
//     resident   for tokens whose tiles fit kResidentBytes: strips are processed one after the other, each over the
//                whole contraction. The next tokens decode W again.
//     grouped    as many strips at a time as kAccumulatorBytes of accumulators allow, chunk by chunk, so that W is
//                read in long runs. It is used if the rows of the tokens are too long to be resident, and for grad_x,
//                whose strips read half a cache line of every row of W.
//
// With many tokens, the threads divide them: each thread packs its own tokens and multiplies them with all of W. With
// few tokens, all threads pack, then they divide the strips. The order of additions depends only on the shapes, so that
// every schedule and any number of threads gives the same bits.
#pragma once

#include <algorithm>
#include <utility>

#include "decode.h"

namespace qlora::QLORA_ISA {

inline constexpr int64_t kBlockTokens = 32;
inline constexpr int64_t kStripTiles = 4;     // maximum number of tiles of a decoded strip in one step
inline constexpr int64_t kChunk = 256;        // a multiple of 128
inline constexpr int64_t kSingleChunk = 640;  // a contraction up to this length is one chunk
inline constexpr int64_t kResidentBytes = 1 << 20;
inline constexpr int64_t kFewestResident = 64;  // with fewer resident tokens, W would be decoded too often
inline constexpr int64_t kMostTokens = 512;     // tokens of a task in the grouped schedule
inline constexpr int64_t kAccumulatorBytes = 1 << 20;
inline constexpr int64_t kTokensOfOneThread = 128;  // from this number on, a thread multiplies its tokens with all of W

// The tiles of M tokens: [blocks][steps][2], the last block [steps][1] if it has 16 tokens or fewer.
struct TokenTiles {
    uint8_t* data;
    int64_t M, steps;

    int64_t tiles() const { return (M + kTileRows - 1) / kTileRows; }
    int64_t blocks() const { return (M + kBlockTokens - 1) / kBlockTokens; }
    int tiles_in(int64_t block) const { return M - block * kBlockTokens > kTileRows ? 2 : 1; }
    uint8_t* at(int64_t block, int64_t step) const {
        return data + (block * steps * 2 + step * tiles_in(block)) * kTileBytes;
    }
    uint8_t* tile(int64_t t) const { return at(t / 2, 0) + t % 2 * kTileBytes; }
    int64_t step_bytes(int64_t t) const { return tiles_in(t / 2) * kTileBytes; }
    size_t bytes() const { return static_cast<size_t>(blocks() * steps * 2 * kTileBytes); }
};

// ---- Tile products ------------------------------------------------------------------------------------------------

// The initial values of accumulators, and where they are kept.
enum class Sums { kZero, kMemory, kTiles };

template <int kFirst, int kCount, class Body>
QLORA_INLINE void for_tiles(const Body& body) {
    [&]<int... i>(std::integer_sequence<int, i...>) {
        (body(std::integral_constant<int, kFirst + i>()), ...);
    }(std::make_integer_sequence<int, kCount>());
}

template <int kCount, class Units>
QLORA_INLINE void decode_units(Units& units, int64_t prefetch_distance) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; ++i) Units::decode_next(units, prefetch_distance);
}

// The number of the `kUnits` units of a step that follow product `i` of `kProducts`.
template <int kUnits, int kProducts>
constexpr int units_after(int i) {
    return (kUnits * (i + 1) + kProducts - 1) / kProducts - (kUnits * i + kProducts - 1) / kProducts;
}

// sums[kL][kR] (+)= left[steps][kL] * right[steps][kR], with kUnits units of decoding in each step.
template <int kL, int kR, int kUnits, class Units>
QLORA_INLINE void multiply_tiles(const uint8_t* left, int64_t left_step, const uint8_t* right, int64_t right_step,
                                 int64_t steps, float* sums, Sums begin, Sums end, Units& units,
                                 int64_t prefetch_distance) {
    constexpr int kProducts = kL * kR;
    static_assert(kProducts <= 4 && (kL <= 1 || kR <= 1 || kProducts == 4));
    if (begin == Sums::kZero) {
        for_tiles<0, kProducts>([](auto t) { zero_tile<t.value>(); });
    } else if (begin == Sums::kMemory) {
        for_tiles<0, kProducts>([&](auto t) { load_tile<t.value>(sums + t.value * kTileFloats); });
    }
    // The tokens are streamed, so that they do not evict the decoded strip from L1.
    const auto load_left = [&](auto t, int i) {
        const uint8_t* p = left + i * kTileBytes;
        Units::kDecodesLeft ? load_tile<t.value>(p) : load_tile_streaming<t.value>(p);
    };
    const auto load_right = [&](auto t, int i) {
        const uint8_t* p = right + i * kTileBytes;
        Units::kDecodesLeft ? load_tile_streaming<t.value>(p) : load_tile<t.value>(p);
    };
    for (int64_t s = 0; s < steps; ++s, left += left_step, right += right_step) {
        if constexpr (kL == 2 && kR == 2) {
            load_left(std::integral_constant<int, 4>(), 0);
            load_right(std::integral_constant<int, 6>(), 0);
            tile_dot<0, 4, 6>();
            decode_units<units_after<kUnits, 4>(0)>(units, prefetch_distance);
            load_right(std::integral_constant<int, 7>(), 1);
            tile_dot<1, 4, 7>();
            decode_units<units_after<kUnits, 4>(1)>(units, prefetch_distance);
            load_left(std::integral_constant<int, 5>(), 1);
            tile_dot<2, 5, 6>();
            decode_units<units_after<kUnits, 4>(2)>(units, prefetch_distance);
            tile_dot<3, 5, 7>();
            decode_units<units_after<kUnits, 4>(3)>(units, prefetch_distance);
        } else if constexpr (kR == 1) {
            load_right(std::integral_constant<int, 7>(), 0);
            for_tiles<0, kL>([&](auto i) {
                constexpr int kOperand = 4 + i.value % 3;
                load_left(std::integral_constant<int, kOperand>(), i.value);
                tile_dot<i.value, kOperand, 7>();
                decode_units<units_after<kUnits, kProducts>(i.value)>(units, prefetch_distance);
            });
        } else {
            load_left(std::integral_constant<int, 7>(), 0);
            for_tiles<0, kR>([&](auto j) {
                constexpr int kOperand = 4 + j.value % 3;
                load_right(std::integral_constant<int, kOperand>(), j.value);
                tile_dot<j.value, 7, kOperand>();
                decode_units<units_after<kUnits, kProducts>(j.value)>(units, prefetch_distance);
            });
        }
    }
    if (end == Sums::kTiles) return;
    for_tiles<0, kProducts>([&](auto t) { store_tile<t.value>(sums + t.value * kTileFloats); });
}

// multiply_tiles with `per_step` units of decoding in each step: 0, 1, 2, 4, 8 or 16.
template <int kL, int kR, class Units>
static void multiply(int per_step, const uint8_t* left, int64_t left_step, const uint8_t* right, int64_t right_step,
                     int64_t steps, float* sums, Sums begin, Sums end, Units& units, int64_t prefetch_distance) {
    Units u = units;  // a local copy can be kept in registers
    const auto run = [&](auto count) __attribute__((always_inline)) {
        multiply_tiles<kL, kR, decltype(count)::value>(left, left_step, right, right_step, steps, sums, begin, end, u,
                                                       prefetch_distance);
    };
    switch (u.left > 0 ? per_step : 0) {
        case 0:
            run(std::integral_constant<int, 0>());
            break;
        case 1:
            run(std::integral_constant<int, 1>());
            break;
        case 2:
            run(std::integral_constant<int, 2>());
            break;
        case 4:
            run(std::integral_constant<int, 4>());
            break;
        case 8:
            run(std::integral_constant<int, 8>());
            break;
        default:
            run(std::integral_constant<int, 16>());
    }
    units = u;
}

// The units of a product without decoding, for operands that are already packed.
struct NoUnits {
    static constexpr bool kDecodesLeft = true;
    int64_t left = 0;
    QLORA_INLINE void decode_next(NoUnits&, int64_t) {}
};

// ---- Schedule -----------------------------------------------------------------------------------------------------

// The strips [strip0, strip1) and the blocks of tokens [block0, block1), `group` strips at a time.
struct Task {
    int64_t strip0, strip1, block0, block1, group;
};

// The properties of a product that determine its schedule.
struct ProductShape {
    int64_t strips, blocks;
    int64_t token_bytes;  // of one token's packed row
    int64_t strip_sums;   // bytes of accumulators for one strip and one block
    int64_t least_group;  // number of strips that share cache lines of W
    bool one_by_one;      // whether each strip may run over the whole contraction
};

struct Schedule {
    ProductShape shape;
    int64_t by_strips, by_blocks, group;

    Schedule(const ProductShape& s, int64_t threads, int64_t resident_bytes, int64_t most_tokens)
        : shape(s), group(s.least_group) {
        const int64_t resident = resident_bytes / (kBlockTokens * s.token_bytes);  // blocks
        const bool enough = s.blocks <= resident || resident * kBlockTokens >= kFewestResident;
        if (s.one_by_one && resident > 0 && enough) {
            by_blocks = (s.blocks + resident - 1) / resident;
        } else {
            by_blocks = (s.blocks * kBlockTokens + most_tokens - 1) / most_tokens;
            const int64_t blocks = (s.blocks + by_blocks - 1) / by_blocks;
            group = std::max(s.least_group, kAccumulatorBytes / (blocks * s.strip_sums));
        }
        // Enough tasks, each of whole groups, to finish together; tokens are split into more parts if there are few
        // strips.
        const int64_t groups = (s.strips + group - 1) / group;
        by_strips = std::min(groups, by_blocks > 1 ? threads : 4 * threads);
        if (by_strips < threads) by_strips = std::min(s.strips, threads);
        while (by_strips * by_blocks < threads && by_blocks < s.blocks) ++by_blocks;
    }

    int64_t tasks() const { return by_strips * by_blocks; }

    Task task(int64_t i) const {
        const int64_t s = i / by_blocks, b = i % by_blocks;
        return with_even_groups({s * shape.strips / by_strips, (s + 1) * shape.strips / by_strips,
                                 b * shape.blocks / by_blocks, (b + 1) * shape.blocks / by_blocks, group});
    }

    static Task with_even_groups(Task task) {
        const int64_t own = task.strip1 - task.strip0, parts = (own + task.group - 1) / task.group;
        task.group = (own + parts - 1) / parts;
        return task;
    }
};

// The number of tokens that each thread packs and multiplies with all of W; 0 if there are too few tokens for that.
static inline int64_t tokens_of_one_thread(int64_t M, int64_t token_bytes, bool one_by_one, int64_t threads) {
    const int64_t resident = kResidentBytes / token_bytes;
    const int64_t max_tokens = one_by_one && resident >= kFewestResident ? resident : kMostTokens;
    const int64_t turns = (M + max_tokens * threads - 1) / (max_tokens * threads);
    const int64_t tokens = round_up((M + turns * threads - 1) / (turns * threads), kBlockTokens);
    return tokens >= kTokensOfOneThread ? tokens : 0;
}

// The task of a single thread: all strips and all blocks.
static inline Task whole_task(const ProductShape& shape) {
    const bool resident = shape.one_by_one && kResidentBytes / shape.token_bytes >= kFewestResident;
    const int64_t tokens = shape.blocks * kBlockTokens;
    const int64_t resident_bytes = resident ? std::max(kResidentBytes, tokens * shape.token_bytes) : kResidentBytes;
    const Schedule schedule(shape, 1, resident_bytes, tokens);
    return Schedule::with_even_groups({0, shape.strips, 0, shape.blocks, schedule.group});
}

// The position of a task: chunk by chunk within a group of strips, strip by strip within a chunk.
struct Place {
    int64_t group0, group1, chunk, strip;

    explicit Place(const Task& t)
        : group0(t.strip0), group1(std::min(t.strip1, t.strip0 + t.group)), chunk(0), strip(t.strip0) {}

    // Advances the position; returns false at the end.
    bool next(const Task& t, int64_t chunks) {
        if (++strip < group1) return true;
        if (++chunk == chunks) {
            chunk = 0;
            group0 = group1;
            group1 = std::min(t.strip1, group0 + t.group);
        }
        strip = group0;
        return strip < t.strip1;
    }
};

template <class Units>
static void decode_remaining(Units& units, int64_t prefetch_distance) {
    Units u = units;
    while (u.left > 0) Units::decode_next(u, prefetch_distance);
    units = u;
}

// The number of units per step with which `units` of them fit into `steps` steps: a power of two, at most 16.
static inline int units_per_step(int64_t units, int64_t steps) {
    int n = 1;
    while (n < 16 && n * steps < units) n *= 2;
    return n;
}

// A Product (Forward, GradX) defines how a strip is decoded, multiplied and stored:
//
//     length(), extra_steps()                        of the contraction; extra_steps come first in every strip (LoRA)
//     narrow()                                       whether there is one tile of tokens, and strips are wide
//     passes(), block_sums()                         products of a step with one block, and floats of its accumulators
//     scratch(group)                                 memory of the task for `units`
//     units(place, step0, steps, buffer, scratch)    the units of one chunk; weights without units are decoded at once
//     multiply(per_step, buffer, strip, block, ...)  multiplies one block with a decoded chunk
//     store(strip, block, sums)                      writes the finished accumulators
template <class Product>
static void run_task(const Product& product, const Task& task) {
    const int64_t blocks = task.block1 - task.block0, extra = product.extra_steps();
    const int64_t steps = product.tiles.steps - extra;
    int64_t chunk_steps = (product.narrow() ? kChunk / 2 : kChunk) / kStep;
    if (!product.narrow() && product.length() <= kSingleChunk)
        chunk_steps = round_up(product.length(), kGroup128) / kStep;
    const int64_t chunks = (steps + chunk_steps - 1) / chunk_steps;
    const int64_t buffer_bytes = (extra + chunk_steps) * kStripTiles * kTileBytes;
    uint8_t* buffers = static_cast<uint8_t*>(workspace(Slot::kPanel, static_cast<size_t>(2 * buffer_bytes)));
    const int64_t block_sums = product.block_sums();
    float* sums = static_cast<float*>(
        workspace(Slot::kPartial, static_cast<size_t>(task.group * blocks * block_sums) * sizeof(float)));
    float* scratch = product.scratch(task.group);

    const TileSession session;
    const auto chunk_of = [&](const Place& place, int64_t& count) {
        count = std::min(chunk_steps, steps - place.chunk * chunk_steps);
        return place.chunk * chunk_steps;
    };
    Place place(task), next = place;
    int64_t count = 0;
    int64_t step0 = chunk_of(place, count);
    auto units = product.units(place, step0, count, buffers, scratch);
    decode_remaining(units, 0);
    bool more = true;
    for (int turn = 0; more; place = next, turn ^= 1) {
        const bool first = place.chunk == 0, last = place.chunk == chunks - 1;
        step0 = chunk_of(place, count);
        const uint8_t* decoded = buffers + turn * buffer_bytes;
        const bool stays = blocks == 1 && place.group1 - place.group0 == 1 && product.passes() == 1;
        const Sums begin = first ? Sums::kZero : stays ? Sums::kTiles : Sums::kMemory;
        const Sums end = stays && !last ? Sums::kTiles : Sums::kMemory;
        more = next.next(task, chunks);
        units.left = 0;
        int64_t prefetch_distance = 0;
        if (more) {
            int64_t next_count;
            const int64_t next_step0 = chunk_of(next, next_count);
            units = product.units(next, next_step0, next_count, buffers + (turn ^ 1) * buffer_bytes, scratch);
            prefetch_distance = product.prefetch_distance(chunk_steps * kStep, next.group1 - next.group0);
        }
        const int64_t all_steps = (count + (first ? extra : 0)) * blocks * product.passes();
        const int per_step = units_per_step(units.left, all_steps);
        for (int64_t b = 0; b < blocks; ++b) {
            float* c = sums + ((place.strip - place.group0) * blocks + b) * block_sums;
            product.multiply(per_step, decoded, place.strip, task.block0 + b, step0, count, c, begin, end, units,
                             prefetch_distance);
            if (last) product.store(place.strip, task.block0 + b, c);
        }
        decode_remaining(units, prefetch_distance);
    }
}

}  // namespace qlora::QLORA_ISA
