// Compares the tile product of csrc/cpu/amx/tile.h with a scalar model of TDPBF16PS on random bit patterns of bf16,
// which include subnormal numbers, infinities and NaN. Built with QLORA_EMULATE_AMX, it checks the emulation. Built
// without, on a machine with AMX, it checks that the model, and therefore the emulation, equals the hardware.
//
// It prints the number of values that differ; the exit code is 1 if there are any, and 77 if this process may not use
// AMX.
#include <cmath>
#include <cstdio>
#include <random>

#include "amx/support.h"
#include "amx/tile.h"

using namespace qlora::QLORA_ISA;

static float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

static float bf16(const uint8_t* bytes) {
    uint16_t half;
    memcpy(&half, bytes, sizeof half);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return flushed(x);
}

static bool same(float a, float b) { return memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b)); }

int main() {
#ifndef QLORA_EMULATE_AMX
    if (const char* reason = qlora::amx_unavailable()) return printf("%s\n", reason), 77;
#endif
    alignas(64) uint8_t left[kTileBytes], right[kTileBytes];
    alignas(64) float sums[kTileFloats], result[kTileFloats];
    std::mt19937 random(0);
    int wrong = 0;
    for (int round = 0; round < 200; ++round) {
        // Every third round draws all bit patterns; the others use exponents for which sums do not overflow.
        const auto word = [&]() -> uint16_t {
            const auto bits = static_cast<uint16_t>(random());
            return round % 3 == 0 ? bits : static_cast<uint16_t>((bits & 0x83ff) | 0x3c00);
        };
        for (int i = 0; i < kTileBytes; i += 2) {
            const uint16_t l = word(), r = word();
            memcpy(left + i, &l, 2), memcpy(right + i, &r, 2);
        }
        for (float& sum : sums) sum = static_cast<float>(static_cast<int>(random() % 2001) - 1000) / 64.0f;
        {
            const TileSession session;
            load_tile<0>(sums), load_tile<4>(left), load_tile_streaming<6>(right);
            tile_dot<0, 4, 6>();
            store_tile<0>(result);
        }
        for (int i = 0; i < 16; ++i) {
            for (int j = 0; j < 16; ++j) {
                float even = 0.0f, odd = 0.0f;
                for (int p = 0; p < 16; ++p) {
                    const uint8_t *l = left + i * kTileRowBytes + 4 * p, *r = right + p * kTileRowBytes + 4 * j;
                    even = flushed(std::fma(bf16(l), bf16(r), even));
                    odd = flushed(std::fma(bf16(l + 2), bf16(r + 2), odd));
                }
                const float expected = flushed(flushed(sums[16 * i + j]) + flushed(even + odd));
                wrong += !same(result[16 * i + j], expected);
            }
        }
    }
    printf("%d of %d values differ\n", wrong, 200 * kTileFloats);
    return wrong != 0;
}
