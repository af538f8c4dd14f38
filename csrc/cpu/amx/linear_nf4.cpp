// linear_nf4 and linear_nf4_lora on AMX tiles, for bf16 x.
//
//     s = dropout(x) A^T, rounded to bf16;   y = x W^T + s (scaling B)^T + bias
//
// The tiles of x begin with s as extra steps, so that s (scaling B)^T makes the contraction longer by r elements. A
// single token uses the dot products of avx512_bf16 (../dots.h), which read W in its stored order. x in fp32 or fp16
// also uses avx512_bf16, because rounding x to bf16 would change the result.
#include "low_rank.h"
#include "ops.h"

namespace qlora::QLORA_ISA {
namespace {

// y[m][n] = bf16(tile^T + bias) for two adjacent tiles [16 n][16 m] of accumulators, `rows` tokens, `columns` outputs.
void store_two_transposed(const float* low_tile, const float* high_tile, const float* bias, int64_t rows,
                          int64_t columns, int64_t row_length, Bf16* y) {
    __m512i low[16], high[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) low[i] = _mm512_load_si512(low_tile + 16 * i);
    transpose_registers(low);
    alignas(64) float low_rows[16][16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(low_rows[i], low[i]);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) high[i] = _mm512_load_si512(high_tile + 16 * i);
    transpose_registers(high);
    alignas(64) float high_rows[16][16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) _mm512_store_si512(high_rows[i], high[i]);

    const __mmask32 valid = columns >= 32 ? 0xffffffff : (1u << columns) - 1;
    const F32 low_bias = bias ? _mm512_maskz_loadu_ps(static_cast<__mmask16>(valid), bias) : zero();
    const F32 high_bias = bias ? _mm512_maskz_loadu_ps(static_cast<__mmask16>(valid >> 16), bias + 16) : zero();
    for (int64_t m = 0; m < rows; ++m) {
        const F32 a = add(_mm512_load_ps(low_rows[m]), low_bias), b = add(_mm512_load_ps(high_rows[m]), high_bias);
        _mm512_mask_storeu_epi16(y + m * row_length, valid, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a)));
    }
}

struct Forward {
    const NF4Weight& w;
    const Lora* lora;   // or null
    const float* bias;  // [N], or null
    Bf16* y;            // of the tiles' tokens
    TokenTiles tiles;

    int64_t length() const { return w.K; }
    int64_t extra_steps() const { return lora ? natural_steps(lora->r) : 0; }
    bool narrow() const { return tiles.M <= kTileRows; }
    int64_t passes() const { return 1; }
    int64_t block_sums() const { return 4 * kTileFloats; }

    int64_t strip_rows() const { return narrow() ? 64 : 32; }
    int64_t strip_tiles() const { return strip_rows() / kTileRows; }
    ProductShape shape() const {
        return {(w.N + strip_rows() - 1) / strip_rows(),
                tiles.blocks(),
                tiles.steps * kStep * int64_t{sizeof(Bf16)},
                block_sums() * int64_t{sizeof(float)},
                1,
                true};
    }

    // The rows of the next strip follow those of this strip.
    int64_t prefetch_distance(int64_t, int64_t) const { return strip_rows() * w.K / 2; }

    // Memory for the absmax of a group of strips.
    float* scratch(int64_t group) const {
        if (!suits_fast_decoder(w) || stores_absmax_of_groups(w)) return nullptr;
        const int64_t floats = group * strip_rows() * (w.K / kGroup64);
        return static_cast<float*>(workspace(Slot::kFactorRows, static_cast<size_t>(floats) * sizeof(float)));
    }

    ForwardUnits units(const Place& place, int64_t step0, int64_t steps, uint8_t* buffer, float* scratch) const {
        const int64_t n0 = place.strip * strip_rows(), valid = std::min(strip_rows(), w.N - n0);
        const int64_t k0 = step0 * kStep, length = steps * kStep;
        if (step0 == 0) {
            pack_scaled_B(n0, buffer);
            buffer += extra_steps() * strip_tiles() * kTileBytes;
        }
        const int64_t groups = w.K / kGroup64;
        const float* absmax = nullptr;
        if (!suits_fast_decoder(w)) {
            decode_strip(w, n0, strip_rows(), k0, length, buffer);
        } else if (stores_absmax_of_groups(w)) {
            absmax = w.absmax + n0 * groups;
        } else {
            float* own = scratch + (place.strip - place.group0) * strip_rows() * groups;
            if (step0 == 0) absmax_of_groups(w, n0 * groups, valid * groups, own);
            absmax = own;
        }
        ForwardUnits units(w, absmax, n0, strip_rows(), valid, k0, length, buffer);
        if (!absmax) units.left = 0;
        return units;
    }

    // Rows [n0, n0 + strip_rows) of scaling * B as L tiles [extra_steps][strip_tiles].
    void pack_scaled_B(int64_t n0, uint8_t* buffer) const {
        if (!lora) return;
        for (int64_t r = 0; r < strip_rows(); ++r) {
            const int64_t n = std::min(n0 + r, w.N - 1);
            for (int64_t j = 0; j < lora->r; j += kStep) {
                alignas(64) Bf16 row[kStep] = {};
                factor_row<Bf16>(lora->B, n * lora->r + j, std::min(kStep, lora->r - j), lora->scaling, row);
                memcpy(buffer + j / kStep * strip_tiles() * kTileBytes + r * kTileRowBytes, row, sizeof row);
            }
        }
    }

    void multiply(int per_step, const uint8_t* left, int64_t, int64_t block, int64_t step0, int64_t steps, float* c,
                  Sums begin, Sums end, ForwardUnits& units, int64_t prefetch_distance) const {
        const int tiles_m = tiles.tiles_in(block);
        const int64_t from = step0 == 0 ? 0 : extra_steps() + step0;
        const int64_t count = step0 == 0 ? extra_steps() + steps : steps;
        const uint8_t* right = tiles.at(block, from);
        const int64_t left_step = strip_tiles() * kTileBytes, right_step = tiles_m * kTileBytes;
        const auto run = [&](auto tiles_n, auto tokens) {
            qlora::QLORA_ISA::multiply<decltype(tiles_n)::value, decltype(tokens)::value>(
                per_step, left, left_step, right, right_step, count, c, begin, end, units, prefetch_distance);
        };
        if (narrow()) {
            run(std::integral_constant<int, 4>(), std::integral_constant<int, 1>());
        } else if (tiles_m == 2) {
            run(std::integral_constant<int, 2>(), std::integral_constant<int, 2>());
        } else {
            run(std::integral_constant<int, 2>(), std::integral_constant<int, 1>());
        }
    }

    void store(int64_t strip, int64_t block, const float* c) const {
        const int64_t n0 = strip * strip_rows(), tiles_m = tiles.tiles_in(block);
        for (int64_t j = 0; j < tiles_m; ++j) {
            const int64_t m0 = block * kBlockTokens + j * kTileRows;
            for (int64_t i = 0; i < strip_tiles() && n0 + i * 16 < w.N; i += 2) {
                const float* low = c + (i * tiles_m + j) * kTileFloats;
                const int64_t n = n0 + i * 16;
                store_two_transposed(low, low + tiles_m * kTileFloats, bias ? bias + n : nullptr,
                                     std::min<int64_t>(kTileRows, tiles.M - m0), w.N - n, w.N, y + m0 * w.N + n);
            }
        }
    }
};

struct ForwardOperands {
    const LinearProblem& p;
    const Lora* lora;
    const float* bias;
    const Bf16* x;
    const uint8_t* kept;    // dropout bitmap, or null
    const uint8_t* lora_A;  // L tiles
    Bf16* s;                // [M, r]
    Bf16* y;                // [M, N]

    // Makes the product of the tokens [m0, m0 + M), whose tiles are not packed yet.
    Forward product(int64_t m0, int64_t M) const {
        Forward forward{p.weight, lora, bias, y + m0 * p.weight.N, {nullptr, M, 0}};
        forward.tiles.steps = forward.extra_steps() + nibble_steps(p.weight.K);
        forward.tiles.data = static_cast<uint8_t*>(workspace(Slot::kRows, forward.tiles.bytes()));
        return forward;
    }

    // Packs block `b` of x, preceded by s, into the tiles. m0: the tiles' first token.
    void pack(const Forward& forward, int64_t m0, int64_t b) const {
        const int64_t K = p.weight.K, extra = forward.extra_steps();
        const TokenTiles& tiles = forward.tiles;
        const int count = tiles.tiles_in(b);
        const int64_t step_bytes = count * kTileBytes;
        const auto pack_x = [&](const uint8_t* bits) {
            for (int t = 0; t < count; ++t) {
                const int64_t first = b * kBlockTokens + t * kTileRows, m = m0 + first;
                const int64_t rows = std::min<int64_t>(kTileRows, tiles.M - first);
                pack_right_nibble_order({x + m * K, rows, K, bits, m * K}, tiles.at(b, extra) + t * kTileBytes,
                                        step_bytes);
            }
        };
        pack_x(lora ? kept : nullptr);
        if (!lora) return;
        const int64_t first = b * kBlockTokens, rows = std::min(kBlockTokens, tiles.M - first);
        Bf16* block_s = s + (m0 + first) * lora->r;
        low_rank_of_x(lora_A, tiles.at(b, extra), count, nibble_steps(K), kept ? keep_scale(*lora) : 1.0f, lora->r,
                      rows, block_s);
        if (kept) pack_x(nullptr);
        for (int t = 0; t < count; ++t) {
            pack_right({block_s + t * kTileRows * lora->r, std::min<int64_t>(kTileRows, rows - t * kTileRows), lora->r,
                        nullptr, 0},
                       tiles.at(b, 0) + t * kTileBytes, step_bytes);
        }
    }
};

void run(const ForwardOperands& operands) {
    const int64_t M = operands.p.M, threads = num_threads();
    const int64_t token_bytes = round_up(operands.p.weight.K, kGroup64) * int64_t{sizeof(Bf16)};
    if (const int64_t own = tokens_of_one_thread(M, token_bytes, true, threads)) {
        parallel_tasks((M + own - 1) / own, [&](int64_t i) {
            const int64_t m0 = i * own;
            const Forward forward = operands.product(m0, std::min(own, M - m0));
            for (int64_t b = 0; b < forward.tiles.blocks(); ++b) operands.pack(forward, m0, b);
            run_task(forward, whole_task(forward.shape()));
        });
        return;
    }
    const Forward forward = operands.product(0, M);
    parallel_tasks(forward.tiles.blocks(), [&](int64_t b) { operands.pack(forward, 0, b); });
    const Schedule schedule(forward.shape(), threads, kResidentBytes, kMostTokens);
    parallel_tasks(schedule.tasks(), [&](int64_t i) { run_task(forward, schedule.task(i)); });
}

bool runs_on_tiles(const LinearProblem& p) { return p.dtype == DType::kBfloat16 && p.M > 1; }

}  // namespace

void linear_nf4(const LinearProblem& p, const void* x, AnyFloat bias, void* y) {
    if (!runs_on_tiles(p)) return avx512_bf16::kKernels.linear_nf4(p, x, bias, y);
    run({p, nullptr, bias_as_float(bias, p.weight.N), static_cast<const Bf16*>(x), nullptr, nullptr, nullptr,
         static_cast<Bf16*>(y)});
}

void linear_nf4_lora(const LinearProblem& p, const Lora& lora, const void* x, AnyFloat bias, void* y, void* s) {
    if (!runs_on_tiles(p) || lora.r == 0) return avx512_bf16::kKernels.linear_nf4_lora(p, lora, x, bias, y, s);
    const uint8_t* kept = dropout_bitmap(lora, p.M * p.weight.K);
    run({p, &lora, bias_as_float(bias, p.weight.N), static_cast<const Bf16*>(x), kept, pack_lora_A(lora, p.weight.K),
         static_cast<Bf16*>(s), static_cast<Bf16*>(y)});
}

}  // namespace qlora::QLORA_ISA
