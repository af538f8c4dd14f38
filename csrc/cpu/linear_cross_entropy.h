// linear_cross_entropy: the loss of each token and its gradient in one pass over the weight, with logits of only
// kTokens x kChunk at a time.
//
// With p = softmax(z), the gradient of a loss with respect to the hidden state is sum_v p_v W_v - W_label. The sum is
// an attention whose keys and values are both W, and it is computed as attention is, for each chunk of the vocabulary:
//
//     scores = X W^T              kTokens x kChunk, fp32
//     P      = exp(scores - m)    rounded to the operand type; m is a running maximum of each token
//     sums  += P W                kTokens x K, fp32
//
// m rises only in steps of more than kRise, so that the sums are rarely rescaled. The label's column is left out of P:
// p_label - 1, which would cancel, is computed from the loss and multiplied by W_label in fp32.
//
// A task is one block of tokens and one part of the vocabulary. Blocks and parts depend only on the shapes, and parts
// are merged in order, so that any number of threads gives the same bits.
#pragma once

#include "cross_entropy.h"
#include "exp.h"
#include "register_tiles.h"

namespace qlora::QLORA_ISA {

inline constexpr int64_t kTokens = 256;      // per block
inline constexpr int64_t kChunk = 256;       // rows of the weight per chunk
inline constexpr int64_t kFewestTasks = 16;  // with fewer blocks, the vocabulary is split into parts
inline constexpr float kRise = 5.0f;

template <class T, class Tiles>
class CrossEntropy {
    using Elem = typename Tiles::Elem;
    static constexpr int64_t kPair = Tiles::kPair;
    static constexpr int64_t kTileFloats = Tiles::kRows * kColumns;
    static constexpr int64_t kProbsStride = kChunk + 64 / sizeof(Elem);

  public:
    CrossEntropy(const CrossEntropyProblem& problem, const void* hidden, const CrossEntropyResults& results)
        : p_(problem), results_(results), hidden_(static_cast<const T*>(hidden)), steps_(padded_steps(p_.K)) {
        find_learned();
        blocks_ = (learned_ + kTokens - 1) / kTokens;
        const int64_t chunks = (p_.V + kChunk - 1) / kChunk;
        const int64_t wanted = blocks_ > 0 ? (kFewestTasks + blocks_ - 1) / blocks_ : 1;
        parts_ = wanted < chunks ? wanted : chunks;
        strips_of_k_ = (p_.K + kColumns - 1) / kColumns;
    }

    void run() {
        if (learned_ == 0) return;
        copy_hidden();
        // For each part, the maximum and the sum of each token; with several parts, also the sums of P W.
        const int64_t sums = parts_ > 1 && results_.grad_hidden ? parts_ * blocks_ * sums_floats() : 0;
        float* floats = static_cast<float*>(
            workspace(Slot::kFactors, static_cast<size_t>((2 * parts_ + 1) * learned_ + sums) * sizeof(float)));
        maxima_ = floats;
        totals_ = maxima_ + parts_ * learned_;
        label_scores_ = totals_ + parts_ * learned_;
        shared_sums_ = label_scores_ + learned_;
        parallel_tasks(parts_ * blocks_, [&](int64_t task) { block_and_part(task / parts_, task % parts_); });
        if (parts_ == 1) return;
        parallel_ranges(learned_, Tiles::kRows, [&](int64_t begin, int64_t end) {
            for (int64_t token = begin; token < end; ++token) finish(token, shared_sums_);
        });
    }

  private:
    static int64_t padded_steps(int64_t length) {
        return round_up_to((length + kPair - 1) / kPair, Tiles::kStepMultiple);
    }

    int64_t sums_floats() const { return strips_of_k_ * tiles(kTokens) * kTileFloats; }
    static int64_t tiles(int64_t rows) { return (rows + Tiles::kRows - 1) / Tiles::kRows; }
    // Row i of a block is row i % kRows of tile i / kRows.
    static float* row_of(float* tiles_of_strip, int64_t i) {
        return tiles_of_strip + i / Tiles::kRows * kTileFloats + i % Tiles::kRows * kColumns;
    }

    // Collects the tokens that are not ignored, in order, and writes zeros for the ignored ones.
    void find_learned() {
        int64_t* tokens = static_cast<int64_t*>(workspace(Slot::kBits, static_cast<size_t>(p_.M) * sizeof(int64_t)));
        for (int64_t m = 0; m < p_.M; ++m) {
            if (p_.labels[m] != p_.ignored) {
                tokens[learned_++] = m;
                continue;
            }
            results_.losses[m] = results_.log_sums[m] = 0.0f;
            if (results_.grad_hidden) memset(grad_row(m), 0, static_cast<size_t>(p_.K) * sizeof(T));
        }
        tokens_ = tokens;
    }

    T* grad_row(int64_t m) const { return static_cast<T*>(results_.grad_hidden) + m * p_.K; }

    void copy_hidden() {
        constexpr int64_t kLine = 64 / sizeof(Elem);
        stride_ = round_up_to(steps_ * kPair, kLine);
        if (stride_ * static_cast<int64_t>(sizeof(Elem)) % kConflict == 0) stride_ += kLine;
        // A tile reads all of its rows, even if fewer exist.
        const int64_t rows = round_up_to(learned_, Tiles::kRows) + Tiles::kRows;
        Elem* data = static_cast<Elem*>(workspace(Slot::kRows, static_cast<size_t>(rows * stride_) * sizeof(Elem)));
        parallel_ranges(rows, Tiles::kRows, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const int64_t length = i < learned_ ? p_.K : 0;
                if (length) convert_row(hidden_ + tokens_[i] * p_.K, length, data + i * stride_);
                zero_row(data + i * stride_ + length, stride_ - length);
            }
        });
        x_ = data;
    }

    void block_and_part(int64_t block, int64_t part) {
        const int64_t token0 = block * kTokens;
        const int64_t rows = learned_ - token0 < kTokens ? learned_ - token0 : kTokens;
        const int64_t chunks = (p_.V + kChunk - 1) / kChunk;
        const int64_t first = part * chunks / parts_, last = (part + 1) * chunks / parts_;
        const bool wants_grad = results_.grad_hidden != nullptr;
        constexpr int64_t kScores = kChunk / kColumns * kTokens * kColumns + kChunk / kColumns * kTileFloats;
        const int64_t own_sums = wants_grad && parts_ == 1 ? sums_floats() : 0;
        float* scores =
            static_cast<float*>(workspace(Slot::kPartial, static_cast<size_t>(kScores + own_sums) * sizeof(float)));
        float* sums = parts_ == 1 ? scores + kScores : shared_sums_ + (part * blocks_ + block) * sums_floats();
        Elem* probs = static_cast<Elem*>(
            workspace(Slot::kFactorRows, static_cast<size_t>((kTokens + Tiles::kRows) * kProbsStride) * sizeof(Elem)));
        if (wants_grad) clear(sums, sums_floats());
        float* maxima = maxima_ + part * learned_ + token0;
        float* totals = totals_ + part * learned_ + token0;
        for (int64_t i = 0; i < rows; ++i) maxima[i] = -kInfinity, totals[i] = 0.0f;
        for (int64_t chunk = first; chunk < last; ++chunk) {
            const int64_t v0 = chunk * kChunk, columns = p_.V - v0 < kChunk ? p_.V - v0 : kChunk;
            multiply_scores(token0, rows, v0, columns, scores);
            for (int64_t i = 0; i < rows; ++i) {
                soften(token0 + i, i, rows, v0, columns, scores, maxima[i], totals[i], probs + i * kProbsStride, sums);
            }
            if (wants_grad) add_products(rows, v0, columns, probs, sums);
        }
        if (parts_ > 1) return;
        for (int64_t i = 0; i < rows; ++i) finish(token0 + i, sums);
    }

    // dst = W[v, k .. k + count), rounded to T and stored as E.
    template <class E>
    void read_weight(int64_t v, int64_t k, int64_t count, E* dst) const {
        const HeadWeight& w = p_.weight;
        const int64_t columns = p_.K - w.rank, offset = v * columns + k;
        const int64_t left = columns - k < 0 ? 0 : columns - k;
        const int64_t own = left < count ? left : count;  // in front of the low-rank columns
        if (!w.dense.data) {
            using Rounding =
                std::conditional_t<std::is_same_v<E, float>, RoundWidened<T>, typename Arithmetic<T>::Rounding>;
            if (own > 0) decode_range<Rounding>(w.nf4, offset, offset + own, dst);
        } else if (w.dense.dtype == p_.dtype) {
            convert_row(static_cast<const T*>(w.dense.data) + offset, own, dst);
        } else {
            factor_row<T>(w.dense, offset, own, 1.0f, dst);
        }
        if (own < count) factor_row<T>(w.low_rank, v * w.rank + k + own - columns, count - own, 1.0f, dst + own);
    }

    // Fills a panel whose columns are rows of W. Rows of a dense head are transposed in place, without a copy.
    void fill_columns(const PanelRange& range, Elem* panel) const {
        const int64_t steps = range.step1 - range.step0;
        const bool aligned = reinterpret_cast<uintptr_t>(p_.weight.dense.data) % sizeof(uint32_t) == 0;
        if (reads_weight_in_place() && aligned && p_.K % kPair == 0 && range.columns % kColumns == 0 &&
            range.step1 * kPair <= p_.K) {
            const int64_t stride = p_.K / kPair;  // in steps, which are dwords
            const auto* rows = static_cast<const uint32_t*>(p_.weight.dense.data) + range.column0 * stride;
            for (int64_t column = 0; column < range.columns; column += kColumns) {
                transpose_dwords(rows + column * stride + range.step0, stride, kColumns, steps,
                                 reinterpret_cast<uint32_t*>(panel + column * steps * kPair), kColumns);
            }
            return;
        }
        fill_from_rows<typename Tiles::Panel, kColumns>(
            range, p_.K, panel, [&](int64_t v, int64_t k, int64_t n, Elem* dst) { read_weight(v, k, n, dst); });
    }

    // Whether the rows of W are operands as they are stored.
    bool reads_weight_in_place() const {
        const HeadWeight& w = p_.weight;
        return std::is_same_v<T, Elem> && w.dense.data && w.dense.dtype == p_.dtype && w.rank == 0;
    }

    // scores[strip][tile] = X W^T of the columns [v0, v0 + columns).
    void multiply_scores(int64_t token0, int64_t rows, int64_t v0, int64_t columns, float* scores) const {
        constexpr int64_t kMostSteps =
            kPanelBytes / (kMaxGroup * kColumns * kPair * static_cast<int64_t>(sizeof(Elem)));
        const int64_t pieces = (steps_ + kMostSteps - 1) / kMostSteps;
        const int64_t piece = round_up_to((steps_ + pieces - 1) / pieces, kSpan);
        Elem* panel = static_cast<Elem*>(
            workspace(Slot::kPanel, static_cast<size_t>(kMaxGroup * kColumns * piece * kPair) * sizeof(Elem)));
        const int64_t count = tiles(rows), strips = (columns + kColumns - 1) / kColumns;
        const typename Tiles::Session session;
        for (int64_t strip0 = 0; strip0 < strips; strip0 += kMaxGroup) {
            const int64_t group = strips - strip0 < kMaxGroup ? strips - strip0 : kMaxGroup;
            const int64_t column0 = strip0 * kColumns;
            const int64_t width = columns - column0 < group * kColumns ? columns - column0 : group * kColumns;
            for (int64_t step0 = 0; step0 < steps_; step0 += piece) {
                const int64_t step1 = step0 + piece < steps_ ? step0 + piece : steps_;
                fill_columns({v0 + column0, width, step0, step1}, panel);
                for (int64_t t = 0; t < count; ++t) {
                    for (int64_t g = 0; g < group; ++g) {
                        const Elem* a = x_ + (token0 + t * Tiles::kRows) * stride_ + step0 * kPair;
                        Tiles::multiply(a, stride_, rows_of_tile(rows, t),
                                        panel + g * (step1 - step0) * kColumns * kPair, step1 - step0,
                                        scores + ((strip0 + g) * count + t) * kTileFloats, step0 > 0);
                    }
                }
            }
        }
    }

    static int rows_of_tile(int64_t rows, int64_t t) {
        const int64_t left = rows - t * Tiles::kRows;
        return static_cast<int>(left < Tiles::kRows ? left : Tiles::kRows);
    }

    // Converts the scores of one token to probabilities relative to its running maximum.
    void soften(int64_t token, int64_t i, int64_t rows, int64_t v0, int64_t columns, float* scores, float& shift,
                float& total, Elem* probs, float* sums) const {
        const int64_t strips = (columns + kColumns - 1) / kColumns, count = tiles(rows);
        float* row = row_of(scores, i);
        const int64_t strip_floats = count * kTileFloats;
        F32 top = set1(-kInfinity);
        const bool plain = !p_.bias.data && p_.softcap == 0.0f && p_.scale == 1.0f;
        for (int64_t strip = 0; strip < strips; ++strip) {
            float* z = row + strip * strip_floats;
            for (int64_t j = 0; j < kColumns; j += kLanes) {
                const int64_t column = strip * kColumns + j;
                F32 value = load(z + j);
                if (!plain) value = logits(value, v0 + column, columns - column);
                if (columns - column < kLanes) value = first_lanes(value, columns - column, -kInfinity);
                if (!plain || columns - column < kLanes) store(z + j, value);
                top = maximum(top, value);
            }
        }
        const float highest_score = highest(top);
        if (highest_score > shift + kRise || shift == -kInfinity) {
            const float factor = shift == -kInfinity ? 0.0f : std::exp(shift - highest_score);
            total *= factor;
            if (results_.grad_hidden && factor != 0.0f) rescale(i, rows, factor, sums);
            shift = highest_score;
        }
        const float base = shift == -kInfinity ? 0.0f : shift;
        const int64_t label = p_.labels[tokens_[token]] - v0;
        if (label >= 0 && label < columns) {
            float& score = row[label / kColumns * strip_floats + label % kColumns];
            label_scores_[token] = score;
            total += std::exp(score - base);
            score = -kInfinity;
        }
        F32 sum = zero();
        const F32 minus_base = set1(-base);
        const F32 over_cap = set1(p_.softcap > 0.0f ? 1.0f / p_.softcap : 0.0f);
        for (int64_t strip = 0; strip < strips; ++strip) {
            const float* z = row + strip * strip_floats;
            for (int64_t j = 0; j < kColumns; j += kLanes) {
                const F32 value = load(z + j);
                F32 e = exp_vector(add(value, minus_base));
                sum = add(sum, e);
                if (!results_.grad_hidden) continue;
                if (p_.softcap > 0.0f) e = mul(e, softcap_slope(value, over_cap));
                store_sum(probs + strip * kColumns + j, e);
            }
        }
        total += hsum(sum);
        // The steps of the last chunk are padded.
        const int64_t end = round_up_to(strips * kColumns, Tiles::kStepMultiple * kPair);
        if (results_.grad_hidden) zero_row(probs + strips * kColumns, end - strips * kColumns);
    }

    F32 logits(F32 value, int64_t v, int64_t left) const {
        if (p_.bias.data && left > 0) {
            float bias[kLanes];
            convert_row(p_.bias, v, left < kLanes ? left : kLanes, bias);
            value = add(value, load_n(bias, static_cast<int>(left < kLanes ? left : kLanes)));
        }
        value = mul(value, set1(p_.scale));
        if (p_.softcap > 0.0f) value = mul(tanh_vector(mul(value, set1(1.0f / p_.softcap))), set1(p_.softcap));
        return value;
    }

    // The derivative of the softcap, dz / d(z before the cap) = 1 - (z / softcap)^2, at most 0 for z = -inf.
    static F32 softcap_slope(F32 z, F32 over_cap) {
        const F32 t = maximum(mul(z, over_cap), set1(-1.0f));
        return subtract(set1(1.0f), mul(t, t));
    }

    void rescale(int64_t i, int64_t rows, float factor, float* sums) const {
        const F32 f = set1(factor);
        for (int64_t strip = 0; strip < strips_of_k_; ++strip) {
            float* c = row_of(sums + strip * tiles(rows) * kTileFloats, i);
            for (int64_t j = 0; j < kColumns; j += kLanes) store(c + j, mul(load(c + j), f));
        }
    }

    // sums[strip][tile] += P W of the rows [v0, v0 + length) of W.
    void add_products(int64_t rows, int64_t v0, int64_t length, const Elem* probs, float* sums) const {
        const int64_t steps = padded_steps(length), count = tiles(rows);
        Elem* panel = static_cast<Elem*>(
            workspace(Slot::kPanel, static_cast<size_t>(kMaxGroup * kColumns * steps * kPair) * sizeof(Elem)));
        const HeadWeight& w = p_.weight;
        const bool in_place = reads_weight_in_place();
        const typename Tiles::Session session;
        for (int64_t strip0 = 0; strip0 < strips_of_k_; strip0 += kMaxGroup) {
            const int64_t group = strips_of_k_ - strip0 < kMaxGroup ? strips_of_k_ - strip0 : kMaxGroup;
            const int64_t k0 = strip0 * kColumns;
            const int64_t width = p_.K - k0 < group * kColumns ? p_.K - k0 : group * kColumns;
            const bool whole = width == group * kColumns;
            fill_from_columns<typename Tiles::Panel, kColumns>(
                {k0, width, 0, steps}, length, panel, [&](int64_t l, int64_t k, int64_t n, Elem* dst) -> const Elem* {
                    if constexpr (std::is_same_v<T, Elem>) {
                        if (in_place && whole) return static_cast<const T*>(w.dense.data) + (v0 + l) * p_.K + k;
                    }
                    read_weight(v0 + l, k, n, dst);
                    return dst;
                });
            for (int64_t t = 0; t < count; ++t) {
                for (int64_t g = 0; g < group; ++g) {
                    Tiles::multiply(probs + t * Tiles::kRows * kProbsStride, kProbsStride, rows_of_tile(rows, t),
                                    panel + g * steps * kColumns * kPair, steps,
                                    sums + ((strip0 + g) * count + t) * kTileFloats);
                }
            }
        }
    }

    // Merges the parts of one token and writes its results. sums: of part 0 of its block, or of all blocks and parts.
    void finish(int64_t token, const float* sums) const {
        const int64_t block = token / kTokens, i = token % kTokens;
        const int64_t rows = learned_ - block * kTokens < kTokens ? learned_ - block * kTokens : kTokens;
        const int64_t m = tokens_[token];
        float top = -kInfinity;
        for (int64_t part = 0; part < parts_; ++part) {
            const float maximum_of_part = maxima_[part * learned_ + token];
            top = maximum_of_part > top ? maximum_of_part : top;
        }
        const float base = top == -kInfinity ? 0.0f : top;
        float total = 0.0f;
        for (int64_t part = 0; part < parts_; ++part)
            total += part_weight(part, token, base) * totals_[part * learned_ + token];
        const float log_sum = base + std::log(total), z = label_scores_[token];
        results_.log_sums[m] = log_sum;
        results_.losses[m] = log_sum - z;
        if (!results_.grad_hidden) return;

        const float capped = p_.softcap > 0.0f ? z / p_.softcap : 0.0f;
        const float of_label = std::expm1(z - log_sum) * (1.0f - capped * capped) * p_.scale;
        float* gradient =
            static_cast<float*>(workspace(Slot::kSmall, static_cast<size_t>(2 * p_.K + 2 * kColumns) * sizeof(float)));
        float* label_row = gradient + round_up_to(p_.K, kColumns);
        read_weight(p_.labels[m], 0, p_.K, label_row);
        for (int64_t k = 0; k < p_.K; ++k) gradient[k] = label_row[k] * of_label;
        for (int64_t part = 0; part < parts_; ++part) {
            const float weight = part_weight(part, token, base) / total * p_.scale;
            const float* of_part = parts_ == 1 ? sums : sums + (part * blocks_ + block) * sums_floats();
            for (int64_t strip = 0; strip < strips_of_k_; ++strip) {
                const float* c = row_of(const_cast<float*>(of_part) + strip * tiles(rows) * kTileFloats, i);
                const int64_t k0 = strip * kColumns, width = p_.K - k0 < kColumns ? p_.K - k0 : kColumns;
                for (int64_t j = 0; j < width; ++j) gradient[k0 + j] += weight * c[j];
            }
        }
        T* out = grad_row(m);
        for (int64_t k = 0; k < p_.K; k += kLanes) {
            const int n = static_cast<int>(p_.K - k < kLanes ? p_.K - k : kLanes);
            store_sum_n(out + k, load_n(gradient + k, n), n);
        }
    }

    float part_weight(int64_t part, int64_t token, float base) const {
        const float maximum_of_part = maxima_[part * learned_ + token];
        return maximum_of_part == -kInfinity ? (totals_[part * learned_ + token] == 0.0f ? 0.0f : 1.0f)
                                             : std::exp(maximum_of_part - base);
    }

    const CrossEntropyProblem& p_;
    const CrossEntropyResults& results_;
    const T* hidden_;
    int64_t steps_, stride_ = 0, learned_ = 0, blocks_ = 0, parts_ = 1, strips_of_k_ = 0;
    const int64_t* tokens_ = nullptr;  // of the learned ones
    const Elem* x_ = nullptr;          // their hidden states, padded
    float *maxima_ = nullptr, *totals_ = nullptr, *label_scores_ = nullptr, *shared_sums_ = nullptr;
};

}  // namespace qlora::QLORA_ISA
