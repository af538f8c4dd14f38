// linear_nf4_grad_x and linear_nf4_lora_backward on AMX tiles, for bf16. With G = grad_y:
//
//     ds     = scaling * G B                 from the tiles of G that grad_x also uses; rounded to bf16
//     grad_x = G W + mask * (ds A) / keep    the tiles of G begin with ds as extra steps
//     grad_A = ds^T dropout(x)               contractions over tokens (token_products.h)
//     grad_B = scaling * (s^T G)^T
#include "low_rank.h"
#include "ops.h"
#include "token_products.h"

namespace qlora::QLORA_ISA {
namespace {

struct ColumnOrder {
    alignas(64) uint16_t index[kGroup64]{};

    // Column i of a strip is word 16 (i % 4) + i / 4 of its four tiles' rows.
    constexpr ColumnOrder() {
        for (int i = 0; i < kGroup64; ++i) index[i] = static_cast<uint16_t>(i % 4 * 16 + i / 4);
    }
};

// grad_x[m][k] = bf16 of the four tiles of a strip, whose columns are in nibble order, for `rows` tokens.
void store_strip(const float* const (&tiles)[4], int64_t rows, int64_t columns, int64_t row_length, Bf16* out) {
    static constexpr ColumnOrder kOrder;
    const __m512i low = _mm512_load_si512(kOrder.index), high = _mm512_load_si512(kOrder.index + 32);
    const uint64_t valid = columns >= 64 ? ~uint64_t{0} : (uint64_t{1} << columns) - 1;
    for (int64_t m = 0; m < rows; ++m) {
        const auto row = [&](int c) { return _mm512_load_ps(tiles[c] + kTileRows * m); };
        const __m512i first = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(row(1), row(0)));
        const __m512i second = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(row(3), row(2)));
        Bf16* to = out + m * row_length;
        _mm512_mask_storeu_epi16(to, static_cast<__mmask32>(valid), _mm512_permutex2var_epi16(first, low, second));
        _mm512_mask_storeu_epi16(to + 32, static_cast<__mmask32>(valid >> 32),
                                 _mm512_permutex2var_epi16(first, high, second));
    }
}

struct GradX {
    const NF4Weight& w;
    const float* absmax;  // of all groups of 64, or null if the fast decoder does not support the weight
    const Lora* lora;     // or null
    const uint8_t* kept;  // dropout bitmap of [M, K], or null
    int64_t position;     // index of the tiles' first token in the bitmap
    Bf16* grad_x;         // of the tiles' tokens
    TokenTiles tiles;

    int64_t length() const { return w.N; }
    int64_t extra_steps() const { return lora ? natural_steps(lora->r) : 0; }
    bool narrow() const { return tiles.M <= kTileRows; }
    int64_t passes() const { return narrow() ? 1 : 2; }
    int64_t block_sums() const { return (narrow() ? 4 : 8) * kTileFloats; }

    // Each strip reads a cache line, or half of one, of every row of W. If W is not in L1 or L2, it is better to read a
    // chunk's rows for many strips at once.
    static bool is_near(const NF4Weight& w) { return w.N * w.K / 2 <= 512 << 10; }
    ProductShape shape() const {
        return {(w.K + kGroup64 - 1) / kGroup64,
                tiles.blocks(),
                tiles.steps * kStep * int64_t{sizeof(Bf16)},
                block_sums() * int64_t{sizeof(float)},
                2,
                is_near(w)};
    }

    // The cache line of this strip in the next chunk or, if a chunk has many strips, the next cache line.
    int64_t prefetch_distance(int64_t chunk, int64_t group) const { return group <= 4 ? chunk * w.K / 2 : 64; }

    float* scratch(int64_t) const { return nullptr; }

    GradXUnits units(const Place& place, int64_t step0, int64_t steps, uint8_t* buffer, float*) const {
        const int64_t k0 = place.strip * kGroup64, n0 = step0 * kStep, length = steps * kStep;
        if (step0 == 0) {
            pack_A(k0, buffer);
            buffer += extra_steps() * kStripTiles * kTileBytes;
        }
        GradXUnits units(w, absmax, k0, n0, length, buffer);
        if (!absmax || n0 + length > w.N) {
            decode_columns(w, k0, n0, length, buffer);
            units.left = 0;
        }
        return units;
    }

    // Columns [k0, k0 + 64) of A as R tiles [extra_steps][4].
    void pack_A(int64_t k0, uint8_t* buffer) const {
        if (!lora) return;
        const int64_t columns = std::min(kGroup64, w.K - k0);
        for (int64_t p = 0; p < extra_steps() * kTileRows; ++p) {
            alignas(64) Bf16 rows[2][kGroup64] = {};
            for (int i = 0; i < 2; ++i) {
                const int64_t j = 2 * p + i;
                if (j < lora->r) factor_row<Bf16>(lora->A, j * w.K + k0, columns, 1.0f, rows[i]);
            }
            pack_pairs_nibble_order(rows[0], rows[1],
                                    buffer + p / kTileRows * kStripTiles * kTileBytes + p % kTileRows * kTileRowBytes);
        }
    }

    void multiply(int per_step, const uint8_t* right, int64_t strip, int64_t block, int64_t step0, int64_t steps,
                  float* c, Sums begin, Sums end, GradXUnits& units, int64_t prefetch_distance) const {
        int64_t from = step0 == 0 ? 0 : extra_steps() + step0;
        int64_t count = step0 == 0 ? extra_steps() + steps : steps;
        if (step0 == 0 && lora && kept) {
            GradXUnits none = units;
            none.left = 0;
            products(0, right, block, 0, extra_steps(), c, Sums::kZero, Sums::kMemory, none, 0);
            apply_mask(strip, block, c);
            right += extra_steps() * kStripTiles * kTileBytes;
            from = extra_steps(), count = steps, begin = Sums::kMemory;
        }
        products(per_step, right, block, from, count, c, begin, end, units, prefetch_distance);
    }

    void products(int per_step, const uint8_t* right, int64_t block, int64_t from, int64_t steps, float* c, Sums begin,
                  Sums end, GradXUnits& units, int64_t prefetch_distance) const {
        const int tiles_m = tiles.tiles_in(block);
        const uint8_t* left = tiles.at(block, from);
        const int64_t left_step = tiles_m * kTileBytes, right_step = kStripTiles * kTileBytes;
        const auto run = [&](auto tokens, auto columns) {
            qlora::QLORA_ISA::multiply<decltype(tokens)::value, decltype(columns)::value>(
                per_step, left, left_step, right, right_step, steps, c, begin, end, units, prefetch_distance);
        };
        const std::integral_constant<int, 1> one;
        const std::integral_constant<int, 2> two;
        if (narrow()) return run(one, std::integral_constant<int, 4>());
        for (int half = 0; half < 2; ++half, right += 2 * kTileBytes, c += 4 * kTileFloats) {
            tiles_m == 2 ? run(two, two) : run(one, two);
        }
    }

    // The accumulators of tile j of a block's tokens and tile t of a strip's columns.
    template <class Float>
    Float* accumulators(Float* c, int j, int t) const {
        if (narrow()) return c + t * kTileFloats;
        return c + (t / 2 * 4 + j * 2 + t % 2) * kTileFloats;
    }

    // c = mask * c / keep.
    void apply_mask(int64_t strip, int64_t block, float* c) const {
        const F32 factor = set1(keep_scale(*lora));
        for (int j = 0; j < tiles.tiles_in(block); ++j) {
            const int64_t m0 = block * kBlockTokens + j * kTileRows;
            for (int64_t m = 0; m < kTileRows && m0 + m < tiles.M; ++m) {
                const int64_t first = (position + m0 + m) * w.K + strip * kGroup64;
                uint64_t bits = bits_at(kept, first) & 0xffffffff;
                if (strip * kGroup64 + 32 < w.K) bits |= bits_at(kept, first + 32) << 32;
                for (int t = 0; t < 4; ++t) {
                    float* row = accumulators(c, j, t) + m * kTileRows;
                    const uint64_t every_fourth = _pext_u64(bits, uint64_t{0x1111111111111111} << t);
                    _mm512_store_ps(row, keep(mul(load(row), factor), static_cast<uint32_t>(every_fourth)));
                }
            }
        }
    }

    void store(int64_t strip, int64_t block, const float* c) const {
        const int64_t k0 = strip * kGroup64;
        for (int j = 0; j < tiles.tiles_in(block); ++j) {
            const int64_t m0 = block * kBlockTokens + j * kTileRows;
            const float* four[4];
            for (int t = 0; t < 4; ++t) four[t] = accumulators(c, j, t);
            store_strip(four, std::min<int64_t>(kTileRows, tiles.M - m0), w.K - k0, w.K, grad_x + m0 * w.K + k0);
        }
    }
};

struct BackwardOperands {
    const LinearProblem& p;
    const float* absmax;
    const Lora* lora;
    const uint8_t* kept;
    const Bf16* grad_y;     // [M, N]
    const uint8_t* lora_B;  // R tiles
    Bf16* ds;               // [M, r]
    Bf16* grad_x;           // [M, K], or null

    GradX product(int64_t m0, int64_t M) const {
        const int64_t K = p.weight.K;
        GradX grad{p.weight, absmax, lora, kept, m0, grad_x ? grad_x + m0 * K : nullptr, {nullptr, M, 0}};
        grad.tiles.steps = grad.extra_steps() + natural_steps(p.weight.N);
        grad.tiles.data = static_cast<uint8_t*>(workspace(Slot::kRows, grad.tiles.bytes()));
        return grad;
    }

    // Packs block `b` of grad_y, preceded by ds, into the tiles. m0: the tiles' first token.
    void pack(const GradX& grad, int64_t m0, int64_t b) const {
        const int64_t N = p.weight.N, extra = grad.extra_steps();
        const TokenTiles& tiles = grad.tiles;
        const int count = tiles.tiles_in(b);
        const int64_t first = b * kBlockTokens, rows = std::min(kBlockTokens, tiles.M - first);
        const auto pack_rows = [&](const Bf16* src, int64_t length, int64_t step) {
            for (int t = 0; t < count; ++t) {
                const Bf16* from = src + t * kTileRows * length;
                pack_left({from, std::min<int64_t>(kTileRows, rows - t * kTileRows), length, nullptr, 0},
                          tiles.at(b, step) + t * kTileBytes, count * kTileBytes);
            }
        };
        pack_rows(grad_y + (m0 + first) * N, N, extra);
        if (!lora) return;
        Bf16* block_ds = ds + (m0 + first) * lora->r;
        low_rank_of_grad_y(tiles.at(b, extra), lora_B, count, natural_steps(N), lora->scaling, lora->r, rows, block_ds);
        pack_rows(block_ds, lora->r, 0);
    }
};

void run(const BackwardOperands& operands) {
    const int64_t M = operands.p.M, threads = num_threads();
    const NF4Weight& w = operands.p.weight;
    const int64_t token_bytes = round_up(w.N, kStep) * int64_t{sizeof(Bf16)};
    if (const int64_t own = tokens_of_one_thread(M, token_bytes, GradX::is_near(w), threads)) {
        parallel_tasks((M + own - 1) / own, [&](int64_t i) {
            const int64_t m0 = i * own;
            const GradX grad = operands.product(m0, std::min(own, M - m0));
            for (int64_t b = 0; b < grad.tiles.blocks(); ++b) operands.pack(grad, m0, b);
            if (grad.grad_x) run_task(grad, whole_task(grad.shape()));
        });
        return;
    }
    const GradX grad = operands.product(0, M);
    parallel_tasks(grad.tiles.blocks(), [&](int64_t b) { operands.pack(grad, 0, b); });
    if (!grad.grad_x) return;
    const Schedule schedule(grad.shape(), threads, kResidentBytes, kMostTokens);
    parallel_tasks(schedule.tasks(), [&](int64_t i) { run_task(grad, schedule.task(i)); });
}

// One absmax for each 64 weights: the stored array, or an array computed in scratch memory of the calling thread. Null
// if the fast decoder does not support the weight.
const float* absmax_of_all_groups(const NF4Weight& w) {
    if (!suits_fast_decoder(w)) return nullptr;
    if (stores_absmax_of_groups(w)) return w.absmax;
    const int64_t groups = w.N * w.K / kGroup64;
    float* out = static_cast<float*>(workspace(Slot::kFactorRows, static_cast<size_t>(groups) * sizeof(float)));
    constexpr int64_t kGrain = 4096;
    parallel_ranges(groups, kGrain,
                    [&](int64_t begin, int64_t end) { absmax_of_groups(w, begin, end - begin, out + begin); });
    return out;
}

bool runs_on_tiles(const LinearProblem& p) { return p.dtype == DType::kBfloat16 && p.M > 0; }

}  // namespace

void linear_nf4_grad_x(const LinearProblem& p, const void* grad_y, void* grad_x) {
    if (!runs_on_tiles(p)) return avx512_bf16::kKernels.linear_nf4_grad_x(p, grad_y, grad_x);
    run({p, absmax_of_all_groups(p.weight), nullptr, nullptr, static_cast<const Bf16*>(grad_y), nullptr, nullptr,
         static_cast<Bf16*>(grad_x)});
}

void linear_nf4_lora_backward(const LinearProblem& p, const Lora& lora, const void* grad_y, const void* x,
                              const void* s, void* grad_x, float* grad_A, float* grad_B) {
    if (!runs_on_tiles(p) || lora.r == 0) {
        return avx512_bf16::kKernels.linear_nf4_lora_backward(p, lora, grad_y, x, s, grad_x, grad_A, grad_B);
    }
    const int64_t M = p.M, N = p.weight.N, K = p.weight.K, r = lora.r;
    const uint8_t* kept = dropout_bitmap(lora, M * K);
    Bf16* ds = static_cast<Bf16*>(workspace(Slot::kSmall, static_cast<size_t>(M * r) * sizeof(Bf16)));
    const auto* G = static_cast<const Bf16*>(grad_y);
    const float* absmax = grad_x ? absmax_of_all_groups(p.weight) : nullptr;
    if (grad_A || grad_x) run({p, absmax, &lora, kept, G, pack_lora_B(lora, N), ds, static_cast<Bf16*>(grad_x)});

    if (grad_A) {
        const float keep_factor = kept ? keep_scale(lora) : 1.0f;
        token_product({ds, r}, {static_cast<const Bf16*>(x), M, K, kept, 0}, keep_factor,
                      [&](int64_t j, int64_t column, int64_t columns, const float* sums) {
                          memcpy(grad_A + j * K + column, sums, static_cast<size_t>(columns) * sizeof(float));
                      });
    }
    if (grad_B) {
        token_product({static_cast<const Bf16*>(s), r}, {G, M, N, nullptr, 0}, lora.scaling,
                      [&](int64_t j, int64_t column, int64_t columns, const float* sums) {
                          for (int64_t n = 0; n < columns; ++n) grad_B[(column + n) * r + j] = sums[n];
                      });
    }
}

}  // namespace qlora::QLORA_ISA
