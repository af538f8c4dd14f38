// Attention for training. The forward pass keeps the log of each row's sum of exponentials, from which the backward
// pass recomputes the probabilities.
//
// A task is one key head of one sequence with the query heads that use it. Its keys and values are packed once, block
// by block. The gradients of keys and values are summed by one thread in a fixed order, so that any number of threads
// gives the same bits. For each block of queries and each block of keys that is visible to some of them:
//
//     forward    S = Q K^T;  P = exp2(c S - m);  O += P V
//     backward   S = Q K^T;  P = exp2(c S - log_sum);  dP = dO V^T;  dS = P (dP - rowsum(dO O))
//                dQ += dS K;  dV += P^T dO;  dK += dS^T Q
//
// Left operands are rows; P and dS are transposed once per block. Tiles of queries for which no key of a block is
// visible are skipped, and so are invisible columns and steps of other tiles. scale is applied to the scores and, at
// the end, to dQ and dK.
#pragma once

#include "attention_operands.h"
#include "exp.h"

namespace qlora::QLORA_ISA {

inline constexpr float kLn2 = 0.693147180559945309f;
inline constexpr float kRise2 = 8.0f;  // limit in base 2 by which a score may exceed the maximum in use

template <class T, class Tiles>
class Attention {
    using Layout = HeadLayout<T, Tiles>;
    using Elem = typename Tiles::Elem;
    static constexpr int64_t kTilesOfBlock = Layout::kTilesOfBlock;
    static constexpr int64_t kStripFloats = Layout::kStripFloats;
    static constexpr int64_t kScores = Layout::kStripsOfBlock * kStripFloats;

  public:
    explicit Attention(const AttentionProblem& problem)
        : p_(problem),
          layout_(p_.D),
          group_(p_.H / p_.KV),
          key_blocks_((p_.Tk + kBlock - 1) / kBlock),
          query_blocks_((p_.Tq + kBlock - 1) / kBlock),
          to_log2_(p_.softcap > 0.0f ? p_.softcap * kLog2E : p_.scale * kLog2E),
          into_cap_(p_.softcap > 0.0f ? p_.scale / p_.softcap : 0.0f) {}

    void forward(const AttentionOutputs& outputs) const {
        parallel_tasks(p_.B * p_.KV, [&](int64_t task) { forward_task(task / p_.KV, task % p_.KV, outputs); });
    }

    void backward(const AttentionGradients& gradients) const {
        parallel_tasks(p_.B * p_.KV, [&](int64_t task) { backward_task(task / p_.KV, task % p_.KV, gradients); });
    }

  private:
    // For each tile of keys of a block: the steps along the queries between the first and the last that see one of
    // them.
    struct QueryRanges {
        int64_t first_step[kTilesOfBlock], last_step[kTilesOfBlock];
    };
    struct Buffers {
        Elem *keys, *values, *key_pairs;             // panels of all blocks of keys
        Elem *q, *grad, *q_pairs, *grad_pairs;       // of a block of queries
        Elem *probs, *grad_scores, *turned, *pairs;  // [kBlock, kBlock]
        float *scores, *grad_probs, *sums;           // sums: of a block of queries
        float *key_sums, *value_sums;                // of all blocks of keys
        QueryRanges* ranges;                         // of a block of queries and all blocks of keys
    };
    struct QueryBlock {  // of a block of queries
        int64_t count;
        KeyRange ranges[kBlock];  // as in the arguments
        float maxima[kBlock], totals[kBlock], deltas[kBlock];
        KeyRange all() const {
            KeyRange range;
            for (int64_t r = 0; r < count; ++r) range.widen(ranges[r]);
            return range;
        }
        KeyRange of_tile(int64_t t) const {
            KeyRange range;
            for (int64_t r = t * Tiles::kRows; r < (t + 1) * Tiles::kRows && r < count; ++r) range.widen(ranges[r]);
            return range;
        }
    };

    Buffers carve(bool backward) const {
        Buffers b{};
        char* base = nullptr;
        for (int pass = 0; pass < 2; ++pass) {
            Carver carver(base);
            b.keys = carver.template take<Elem>(key_blocks_ * layout_.keys_size());
            b.values =
                carver.template take<Elem>(key_blocks_ * (backward ? layout_.keys_size() : layout_.pairs_size()));
            b.q = carver.template take<Elem>(layout_.rows_size());
            b.probs = carver.template take<Elem>(kBlock * kBlock);
            b.scores = carver.template take<float>(kScores);
            b.sums = carver.template take<float>(layout_.sums_size());
            if (backward) {
                b.key_pairs = carver.template take<Elem>(key_blocks_ * layout_.pairs_size());
                b.grad = carver.template take<Elem>(layout_.rows_size());
                b.q_pairs = carver.template take<Elem>(layout_.pairs_size());
                b.grad_pairs = carver.template take<Elem>(layout_.pairs_size());
                b.grad_scores = carver.template take<Elem>(kBlock * kBlock);
                b.turned = carver.template take<Elem>(kBlock * kBlock);
                b.pairs = carver.template take<Elem>(kBlock * kBlock);
                b.grad_probs = carver.template take<float>(kScores);
                b.key_sums = carver.template take<float>(key_blocks_ * layout_.sums_size());
                b.value_sums = carver.template take<float>(key_blocks_ * layout_.sums_size());
                b.ranges = carver.template take<QueryRanges>(key_blocks_);
            }
            if (pass == 0) base = static_cast<char*>(workspace(Slot::kPanel, carver.used()));
        }
        return b;
    }

    static const T* tokens(const HeadsView& view, int64_t b, int64_t head, int64_t t) {
        return static_cast<const T*>(view.data) + b * view.batch + head * view.head + t * view.token;
    }
    T* out_row(void* out, int64_t b, int64_t t, int64_t length, int64_t heads, int64_t head) const {
        return static_cast<T*>(out) + ((b * length + t) * heads + head) * p_.D;
    }
    int64_t keys_in(int64_t j) const { return p_.Tk - j * kBlock < kBlock ? p_.Tk - j * kBlock : kBlock; }

    QueryBlock query_block(int64_t b, int64_t i) const {
        QueryBlock rows;
        const int64_t t0 = i * kBlock;
        rows.count = p_.Tq - t0 < kBlock ? p_.Tq - t0 : kBlock;
        for (int64_t r = 0; r < rows.count; ++r) {
            const int64_t at = b * p_.Tq + t0 + r;
            rows.ranges[r] = {p_.starts[at], p_.ends[at]};
        }
        return rows;
    }

    // The strips of a block of keys that a tile computes.
    static int64_t first_strip(const KeyRange& seen) { return seen.first / kColumns; }
    static int64_t last_strip(const KeyRange& seen) { return (seen.last + kColumns - 1) / kColumns; }
    static int64_t steps_to(int64_t tokens) {
        return round_up_to((tokens + Tiles::kPair - 1) / Tiles::kPair, Tiles::kStepMultiple);
    }

    // Converts scores to base-2 logits.
    F32 logits(F32 scores) const {
        if (p_.softcap > 0.0f) scores = tanh_vector(mul(scores, set1(into_cap_)));
        return mul(scores, set1(to_log2_));
    }

    void forward_task(int64_t b, int64_t kv, const AttentionOutputs& outputs) const {
        const Buffers buffers = carve(false);
        for (int64_t j = 0; j < key_blocks_; ++j) {
            layout_.pack_keys(tokens(p_.k, b, kv, j * kBlock), p_.k.token, keys_in(j),
                              buffers.keys + j * layout_.keys_size());
            layout_.pack_pairs(tokens(p_.v, b, kv, j * kBlock), p_.v.token, keys_in(j),
                               buffers.values + j * layout_.pairs_size());
        }
        const typename Tiles::Session session;
        for (int64_t i = 0; i < query_blocks_; ++i) {
            QueryBlock rows = query_block(b, i);
            for (int64_t h = kv * group_; h < (kv + 1) * group_; ++h) forward_block(b, h, i, rows, buffers, outputs);
        }
    }

    void forward_block(int64_t b, int64_t h, int64_t i, QueryBlock& rows, const Buffers& buffers,
                       const AttentionOutputs& outputs) const {
        layout_.pack_rows(tokens(p_.q, b, h, i * kBlock), p_.q.token, rows.count, buffers.q);
        clear(buffers.sums, layout_.sums_size());
        for (int64_t r = 0; r < kBlock; ++r) rows.maxima[r] = -kInfinity, rows.totals[r] = 0.0f;
        const KeyRange all = rows.all();
        for (int64_t j = all.first / kBlock; j * kBlock < all.last; ++j) {
            for (int64_t t = 0; t < kTilesOfBlock; ++t) {
                const KeyRange seen = rows.of_tile(t).within(j * kBlock, keys_in(j));
                if (seen.empty()) continue;
                layout_.multiply_keys(buffers.q, t, buffers.keys + j * layout_.keys_size(), first_strip(seen),
                                      last_strip(seen), buffers.scores);
                for (int64_t r = t * Tiles::kRows; r < (t + 1) * Tiles::kRows; ++r) {
                    const KeyRange own = r < rows.count ? rows.ranges[r].within(j * kBlock, keys_in(j)) : KeyRange{};
                    soften(r, own, seen, rows, buffers);
                }
                layout_.multiply_pairs(buffers.probs, t, buffers.values + j * layout_.pairs_size(), 0,
                                       steps_to(seen.last), buffers.sums);
            }
        }
        for (int64_t r = 0; r < rows.count; ++r) {
            const int64_t t = i * kBlock + r;
            const float total = rows.totals[r];
            const bool sees = !rows.ranges[r].empty();
            layout_.store_row(buffers.sums, r, sees ? 1.0f / total : 0.0f, out_row(outputs.out, b, t, p_.Tq, p_.H, h));
            outputs.log_sums[(b * p_.H + h) * p_.Tq + t] = sees ? rows.maxima[r] * kLn2 + std::log(total) : 0.0f;
        }
    }

    // Converts the scores of one query to probabilities relative to its running maximum; zero outside `own`.
    void soften(int64_t r, const KeyRange& own, const KeyRange& seen, QueryBlock& rows, const Buffers& buffers) const {
        Elem* probs = buffers.probs + r * kBlock;
        const int64_t begin = first_strip(seen) * kColumns, end = last_strip(seen) * kColumns;
        zero_row(probs, own.empty() ? kBlock : begin);
        zero_row(probs + end, kBlock - end);
        if (own.empty()) return;
        float* row = Layout::row_of(buffers.scores, r);
        F32 top = set1(-kInfinity);
        for (int64_t c = begin; c < end; c += kLanes) {
            float* at = row + c / kColumns * kStripFloats + c % kColumns;
            const F32 z = visible(logits(load(at)), own, c, -kInfinity);
            store(at, z);
            top = maximum(top, z);
        }
        const float highest_score = highest(top);
        float& shift = rows.maxima[r];
        if (highest_score > shift + kRise2 || shift == -kInfinity) {
            const float factor = shift == -kInfinity ? 0.0f : std::exp2(shift - highest_score);
            if (factor != 0.0f) rescale(r, factor, buffers.sums);
            rows.totals[r] *= factor;
            shift = highest_score;
        }
        const F32 minus_shift = set1(shift == -kInfinity ? 0.0f : -shift);
        F32 sum = zero();
        for (int64_t c = begin; c < end; c += kLanes) {
            const F32 e = exp2_vector(add(load(row + c / kColumns * kStripFloats + c % kColumns), minus_shift));
            sum = add(sum, e);
            store_sum(probs + c, e);
        }
        rows.totals[r] += hsum(sum);
    }

    void rescale(int64_t r, float factor, float* sums) const {
        const F32 f = set1(factor);
        for (int64_t strip = 0; strip < layout_.strips; ++strip) {
            float* c = Layout::row_of(sums, r) + strip * kStripFloats;
            for (int64_t j = 0; j < kColumns; j += kLanes) store(c + j, mul(load(c + j), f));
        }
    }

    void backward_task(int64_t b, int64_t kv, const AttentionGradients& gradients) const {
        const Buffers buffers = carve(true);
        for (int64_t j = 0; j < key_blocks_; ++j) {
            const T* k = tokens(p_.k, b, kv, j * kBlock);
            layout_.pack_keys(k, p_.k.token, keys_in(j), buffers.keys + j * layout_.keys_size());
            layout_.pack_pairs(k, p_.k.token, keys_in(j), buffers.key_pairs + j * layout_.pairs_size());
            layout_.pack_keys(tokens(p_.v, b, kv, j * kBlock), p_.v.token, keys_in(j),
                              buffers.values + j * layout_.keys_size());
        }
        clear(buffers.key_sums, key_blocks_ * layout_.sums_size());
        clear(buffers.value_sums, key_blocks_ * layout_.sums_size());
        const typename Tiles::Session session;
        for (int64_t i = 0; i < query_blocks_; ++i) {
            QueryBlock rows = query_block(b, i);
            const KeyRange all = rows.all();
            for (int64_t j = all.first / kBlock; j * kBlock < all.last; ++j)
                buffers.ranges[j] = queries_of_keys(rows, j);
            for (int64_t h = kv * group_; h < (kv + 1) * group_; ++h) {
                backward_block(b, h, i, rows, all, buffers, gradients);
            }
        }
        for (int64_t t = 0; t < p_.Tk; ++t) {
            const int64_t at = t / kBlock * layout_.sums_size();
            layout_.store_row(buffers.key_sums + at, t % kBlock, p_.scale,
                              out_row(gradients.grad_k, b, t, p_.Tk, p_.KV, kv));
            layout_.store_row(buffers.value_sums + at, t % kBlock, 1.0f,
                              out_row(gradients.grad_v, b, t, p_.Tk, p_.KV, kv));
        }
    }

    void backward_block(int64_t b, int64_t h, int64_t i, QueryBlock& rows, const KeyRange& all, const Buffers& buffers,
                        const AttentionGradients& gradients) const {
        const int64_t t0 = i * kBlock;
        const T *q = tokens(p_.q, b, h, t0), *grad = tokens(gradients.grad_out, b, h, t0);
        layout_.pack_rows(q, p_.q.token, rows.count, buffers.q);
        layout_.pack_pairs(q, p_.q.token, rows.count, buffers.q_pairs);
        layout_.pack_rows(grad, gradients.grad_out.token, rows.count, buffers.grad);
        layout_.pack_pairs(grad, gradients.grad_out.token, rows.count, buffers.grad_pairs);
        for (int64_t r = 0; r < rows.count; ++r) {
            rows.maxima[r] = gradients.log_sums[(b * p_.H + h) * p_.Tq + t0 + r] * kLog2E;
            rows.deltas[r] = dot(static_cast<const T*>(gradients.out) + ((b * p_.Tq + t0 + r) * p_.H + h) * p_.D,
                                 grad + r * gradients.grad_out.token);
        }
        clear(buffers.sums, layout_.sums_size());
        for (int64_t j = all.first / kBlock; j * kBlock < all.last; ++j) {
            const int64_t keys = keys_in(j);
            for (int64_t t = 0; t < kTilesOfBlock; ++t) {
                const KeyRange seen = rows.of_tile(t).within(j * kBlock, keys);
                if (!seen.empty()) {
                    layout_.multiply_keys(buffers.q, t, buffers.keys + j * layout_.keys_size(), first_strip(seen),
                                          last_strip(seen), buffers.scores);
                    layout_.multiply_keys(buffers.grad, t, buffers.values + j * layout_.keys_size(), first_strip(seen),
                                          last_strip(seen), buffers.grad_probs);
                }
                for (int64_t r = t * Tiles::kRows; r < (t + 1) * Tiles::kRows; ++r) {
                    const KeyRange own = r < rows.count ? rows.ranges[r].within(j * kBlock, keys) : KeyRange{};
                    between(r, own, seen, rows, buffers);
                }
                if (!seen.empty()) {
                    layout_.multiply_pairs(buffers.grad_scores, t, buffers.key_pairs + j * layout_.pairs_size(), 0,
                                           steps_to(seen.last), buffers.sums);
                }
            }
            const QueryRanges& seen_by = buffers.ranges[j];
            add_transposed(seen_by, buffers.probs, buffers.grad_pairs, buffers,
                           buffers.value_sums + j * layout_.sums_size());
            add_transposed(seen_by, buffers.grad_scores, buffers.q_pairs, buffers,
                           buffers.key_sums + j * layout_.sums_size());
        }
        for (int64_t r = 0; r < rows.count; ++r) {
            layout_.store_row(buffers.sums, r, p_.scale, out_row(gradients.grad_q, b, t0 + r, p_.Tq, p_.H, h));
        }
    }

    float dot(const T* a, const T* b) const {
        F32 sum = zero();
        for (int64_t d = 0; d < p_.D; d += kLanes) {
            const int n = static_cast<int>(p_.D - d < kLanes ? p_.D - d : kLanes);
            sum = fma(load_n(a + d, n), load_n(b + d, n), sum);
        }
        return hsum(sum);
    }

    // Computes P and dS of one query and a block of keys; zero outside `own`.
    void between(int64_t r, const KeyRange& own, const KeyRange& seen, const QueryBlock& rows,
                 const Buffers& buffers) const {
        Elem *probs = buffers.probs + r * kBlock, *grad_scores = buffers.grad_scores + r * kBlock;
        const int64_t begin = first_strip(seen) * kColumns, end = last_strip(seen) * kColumns;
        zero_row(probs, own.empty() ? kBlock : begin);
        zero_row(grad_scores, own.empty() ? kBlock : begin);
        if (own.empty()) return;
        zero_row(probs + end, kBlock - end);
        zero_row(grad_scores + end, kBlock - end);
        const float *s = Layout::row_of(buffers.scores, r), *dp = Layout::row_of(buffers.grad_probs, r);
        const F32 minus_log_sum = set1(-rows.maxima[r]), minus_delta = set1(-rows.deltas[r]);
        for (int64_t c = begin; c < end; c += kLanes) {
            const int64_t at = c / kColumns * kStripFloats + c % kColumns;
            const F32 z = logits(load(s + at));
            const F32 e = visible(exp2_vector(add(z, minus_log_sum)), own, c, 0.0f);
            F32 ds = mul(e, add(load(dp + at), minus_delta));
            if (p_.softcap > 0.0f) {
                const F32 t = mul(z, set1(1.0f / to_log2_));
                ds = mul(ds, subtract(set1(1.0f), mul(t, t)));
            }
            store_sum(probs + c, e);
            store_sum(grad_scores + c, ds);
        }
    }

    QueryRanges queries_of_keys(const QueryBlock& rows, int64_t j) const {
        QueryRanges ranges;
        for (int64_t t = 0; t < kTilesOfBlock; ++t) {
            int64_t first = rows.count, last = 0;
            for (int64_t r = 0; r < rows.count; ++r) {
                if (rows.ranges[r].within(j * kBlock + t * Tiles::kRows, Tiles::kRows).empty()) continue;
                first = r < first ? r : first;
                last = r + 1;
            }
            ranges.first_step[t] = first / (Tiles::kStepMultiple * Tiles::kPair) * Tiles::kStepMultiple;
            ranges.last_step[t] = last == 0 ? 0 : steps_to(last);
        }
        return ranges;
    }

    // sums[keys of a block] += M^T B with M [queries, keys], where B is the panel of the queries.
    void add_transposed(const QueryRanges& queries, const Elem* matrix, const Elem* panel, const Buffers& buffers,
                        float* sums) const {
        transpose_block<Tiles>(matrix, buffers.pairs, buffers.turned);
        for (int64_t t = 0; t < kTilesOfBlock; ++t) {
            if (queries.first_step[t] >= queries.last_step[t]) continue;
            layout_.multiply_pairs(buffers.turned, t, panel, queries.first_step[t], queries.last_step[t], sums);
        }
    }

    const AttentionProblem& p_;
    Layout layout_;
    int64_t group_, key_blocks_, query_blocks_;
    float to_log2_, into_cap_;
};

}  // namespace qlora::QLORA_ISA
