// Operands and scratch memory of attention: blocks of kBlock tokens, as rows (left operands) and as panels (right
// operands).
#pragma once

#include "attention_problem.h"
#include "register_tiles.h"

namespace qlora::QLORA_ISA {

inline constexpr int64_t kBlock = 96;  // tokens; a multiple of the rows, columns and steps of tiles on every set

// Allocates parts of a buffer. With a null base, it only computes the size.
class Carver {
  public:
    explicit Carver(char* base) : base_(base) {}
    template <class E>
    E* take(int64_t count) {
        E* part = base_ ? reinterpret_cast<E*>(base_ + used_) : nullptr;
        used_ += static_cast<size_t>(round_up_to(count * static_cast<int64_t>(sizeof(E)), 64));
        return part;
    }
    size_t used() const { return used_; }

  private:
    char* base_;
    size_t used_ = 0;
};

template <class T, class Tiles>
struct HeadLayout {
    using Elem = typename Tiles::Elem;
    static constexpr int64_t kPair = Tiles::kPair;
    static constexpr int64_t kTilesOfBlock = kBlock / Tiles::kRows;
    static constexpr int64_t kStripsOfBlock = kBlock / kColumns;
    static constexpr int64_t kBlockSteps = kBlock / kPair;
    static constexpr int64_t kTileFloats = Tiles::kRows * kColumns;
    static_assert(kBlock % Tiles::kRows == 0 && kBlock % kColumns == 0 && kBlockSteps % Tiles::kStepMultiple == 0);

    int64_t D, steps, strips, row;  // of a head: steps along D, column strips, elements per row of a left operand

    explicit HeadLayout(int64_t head_dim)
        : D(head_dim),
          steps(round_up_to((head_dim + kPair - 1) / kPair, Tiles::kStepMultiple)),
          strips((head_dim + kColumns - 1) / kColumns),
          row(steps * kPair + 64 / static_cast<int64_t>(sizeof(Elem))) {}

    int64_t rows_size() const { return kBlock * row; }
    int64_t keys_size() const { return kBlock * steps * kPair; }
    int64_t pairs_size() const { return strips * kColumns * kBlock; }
    int64_t sums_size() const { return strips * kTilesOfBlock * kTileFloats; }

    // Packs a left operand with rows along D; rows beyond `count` are zero.
    void pack_rows(const T* tokens, int64_t stride, int64_t count, Elem* out) const {
        for (int64_t t = 0; t < kBlock; ++t) {
            if (t < count) convert_row(tokens + t * stride, D, out + t * row);
            const int64_t length = t < count ? D : 0;
            zero_row(out + t * row + length, row - length);
        }
    }

    // Packs a right operand whose columns are tokens: [strip of tokens][steps of D][kColumns], without empty strips.
    void pack_keys(const T* tokens, int64_t stride, int64_t count, Elem* out) const {
        fill_from_rows<typename Tiles::Panel, kColumns>(
            {0, count, 0, steps}, D, out,
            [&](int64_t t, int64_t begin, int64_t n, Elem* dst) { convert_row(tokens + t * stride + begin, n, dst); });
    }

    // Packs a right operand that contracts over tokens: [strip of D][steps of tokens][kColumns].
    void pack_pairs(const T* tokens, int64_t stride, int64_t count, Elem* out) const {
        for (int64_t strip = 0; strip < strips; strip += kMaxGroup) {
            const int64_t column0 = strip * kColumns;
            const int64_t width = D - column0 < kMaxGroup * kColumns ? D - column0 : kMaxGroup * kColumns;
            fill_from_columns<typename Tiles::Panel, kColumns>(
                {column0, width, 0, kBlockSteps}, count, out + strip * kColumns * kBlock,
                [&](int64_t t, int64_t begin, int64_t n, Elem* dst) -> const Elem* {
                    convert_row(tokens + t * stride + begin, n, dst);
                    return dst;
                });
        }
    }

    // sums[strip][tile] += rows [kBlock, of a left operand] of tile t times steps [step0, step1) of a panel of
    // pack_pairs.
    void multiply_pairs(const Elem* left, int64_t t, const Elem* panel, int64_t step0, int64_t step1,
                        float* sums) const {
        for (int64_t strip = 0; strip < strips; ++strip) {
            Tiles::multiply(left + t * Tiles::kRows * kBlock + step0 * kPair, kBlock, Tiles::kRows,
                            panel + (strip * kBlockSteps + step0) * kColumns * kPair, step1 - step0,
                            sums + (strip * kTilesOfBlock + t) * kTileFloats);
        }
    }

    // scores[strip][tile] = rows of tile t (pack_rows) times strips [strip0, strip1) of a panel of pack_keys.
    void multiply_keys(const Elem* left, int64_t t, const Elem* panel, int64_t strip0, int64_t strip1,
                       float* scores) const {
        for (int64_t strip = strip0; strip < strip1; ++strip) {
            float* c = scores + (strip * kTilesOfBlock + t) * kTileFloats;
            Tiles::multiply(left + t * Tiles::kRows * row, row, Tiles::kRows, panel + strip * steps * kColumns * kPair,
                            steps, c, false);
        }
    }

    // Row r of the first strip of scores or sums; consecutive strips are kStripFloats apart.
    static constexpr int64_t kStripFloats = kTilesOfBlock * kTileFloats;
    static float* row_of(float* tiles, int64_t r) {
        return tiles + r / Tiles::kRows * kTileFloats + r % Tiles::kRows * kColumns;
    }

    // out[0, D) = sums of row r times `factor`.
    void store_row(float* sums, int64_t r, float factor, T* out) const {
        const F32 f = set1(factor);
        for (int64_t strip = 0; strip < strips; ++strip) {
            const float* c = row_of(sums, r) + strip * kStripFloats;
            for (int64_t j = 0; j < kColumns; j += kLanes) {
                const int64_t d = strip * kColumns + j, left = D - d;
                if (left <= 0) break;
                store_sum_n(out + d, mul(load(c + j), f), static_cast<int>(left < kLanes ? left : kLanes));
            }
        }
    }
};

// dst[c][r] = src[r][c] for a rows x kBlock matrix of dwords.
static inline void transpose_block_dwords(const uint32_t* src, int64_t rows, uint32_t* dst) {
    static_assert(kBlock / 2 % kTranspose == 0);
    for (int64_t r = 0; r < rows; r += kTranspose) {
        for (int64_t c = 0; c < kBlock; c += kTranspose) {
            transpose_tile(src + r * kBlock + c, kBlock, kTranspose, dst + c * rows + r, rows);
        }
    }
}

// dst[c][r] = src[r][c] for kBlock x kBlock elements; `pairs` is scratch of that size.
template <class Tiles>
static inline void transpose_block(const typename Tiles::Elem* src, typename Tiles::Elem* pairs,
                                   typename Tiles::Elem* dst) {
    auto* out = reinterpret_cast<uint32_t*>(dst);
    if constexpr (Tiles::kPair == 1) {
        (void)pairs;
        transpose_block_dwords(reinterpret_cast<const uint32_t*>(src), kBlock, out);
    } else {
        auto* words = reinterpret_cast<uint32_t*>(pairs);
        for (int64_t r = 0; r < kBlock; r += 2) {
            for (int64_t c = 0; c < kBlock; c += kColumns) {
                interleave<kColumns>(src + r * kBlock + c, src + (r + 1) * kBlock + c, words + r / 2 * kBlock + c);
            }
        }
        transpose_block_dwords(words, kBlock / 2, out);
    }
}

// The keys [first, last) of a block that are visible to a row.
struct KeyRange {
    int64_t first = 0, last = 0;
    bool empty() const { return first >= last; }
    void widen(const KeyRange& other) {
        if (other.empty()) return;
        if (empty()) {
            *this = other;
        } else {
            first = other.first < first ? other.first : first;
            last = other.last > last ? other.last : last;
        }
    }
    KeyRange within(int64_t begin, int64_t count) const {
        const int64_t a = first < begin ? 0 : first - begin, b = last - begin < count ? last - begin : count;
        return a < b ? KeyRange{a, b} : KeyRange{};
    }
};

// Returns v in lanes j for which column + j is in the range, and `other` in the rest.
static inline F32 visible(F32 v, const KeyRange& range, int64_t column, float other) {
    if (range.first <= column && column + kLanes <= range.last) return v;
    const auto lanes_below = [&](int64_t key) {
        const int64_t n = key - column;
        return n <= 0 ? 0u : n >= kLanes ? (1u << kLanes) - 1 : (1u << n) - 1;
    };
    const uint32_t bits = lanes_below(range.last) & ~lanes_below(range.first);
    return add(keep(v, bits), keep(set1(other), ~bits));
}

}  // namespace qlora::QLORA_ISA
