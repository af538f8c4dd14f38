// ldmatrix and mma.sync.m16n8k16 as warp collectives, with the fragment layouts of the PTX manual.
#pragma once

#include <bit>
#include <cstring>

#include "async_copy.h"
#include "number_formats.h"
#include "warp.h"

namespace cuda_host {

struct Words4 {
    uint32_t word[4];
};
struct Floats4 {
    float value[4];
};
struct MmaOperands {
    uint32_t a[4], b[2];
    float c[4];
};

// ldmatrix.x1/.x2/.x4: lane l names row l % 8 of matrix l / 8; lane l receives elements 2(l%4), 2(l%4)+1 of row l / 4.
inline Words4 ldmatrix(int matrices, bool transposed, const void* row, Where where = Where::current()) {
    struct Row {
        uint16_t element[8];
    };
    Row mine{};
    if (lane() < matrices * 8) {
        check_alignment(row, 16, "ldmatrix");
        memcpy(&mine, row, sizeof mine);
    }
    return collective<Words4>(
        "ldmatrix", kFullWarp, mine,
        [=](const Row* rows, Words4* outputs, uint32_t) {
            for (int matrix = 0; matrix < matrices; matrix++) {
                const Row* m = rows + matrix * 8;
                for (int l = 0; l < kWarpLanes; l++) {
                    const int i = l / 4, j = l % 4 * 2;
                    const uint32_t low = transposed ? m[j].element[i] : m[i].element[j];
                    const uint32_t high = transposed ? m[j + 1].element[i] : m[i].element[j + 1];
                    outputs[l].word[matrix] = low | high << 16;
                }
            }
        },
        where);
}

// stmatrix.x1/.x2/.x4: the inverse; lane l gives the address of row l % 8 of matrix l / 8.
inline void stmatrix(int matrices, bool transposed, void* row, const Words4& words, Where where = Where::current()) {
    struct Row {
        uint16_t element[8];
    };
    const Row mine = collective<Row>(
        "stmatrix", kFullWarp, words,
        [=](const Words4* in, Row* rows, uint32_t) {
            for (int l = 0; l < matrices * 8; l++) {
                for (int j = 0; j < 8; j++) {
                    const int i = l % 8, source = transposed ? j * 4 + i / 2 : i * 4 + j / 2;
                    rows[l].element[j] = uint16_t(in[source].word[l / 8] >> 16 * ((transposed ? i : j) & 1));
                }
            }
        },
        where);
    if (lane() >= matrices * 8) return;
    check_alignment(row, 16, "stmatrix");
    memcpy(row, &mine, sizeof mine);
}

// D = A B + C, A [16, 16], B [16, 8], fp32 sums in order of k (a GPU's order is its own, so the last bits differ).
// to_float: the value of one 16-bit element.
template <class ToFloat>
Floats4 mma_m16n8k16(const char* operation, const MmaOperands& operands, ToFloat to_float,
                     Where where = Where::current()) {
    return collective<Floats4>(
        operation, kFullWarp, operands,
        [to_float](const MmaOperands* in, Floats4* out, uint32_t) {
            float a[16][16], b[16][8];
            for (int l = 0; l < kWarpLanes; l++) {
                const int group = l / 4, pair = l % 4 * 2;
                for (int half = 0; half < 2; half++) {
                    for (int i = 0; i < 4; i++) {
                        a[group + (i & 1) * 8][pair + half + (i >> 1) * 8] =
                            to_float(uint16_t(in[l].a[i] >> (16 * half)));
                    }
                    for (int i = 0; i < 2; i++)
                        b[pair + half + i * 8][group] = to_float(uint16_t(in[l].b[i] >> (16 * half)));
                }
            }
            for (int l = 0; l < kWarpLanes; l++) {
                for (int i = 0; i < 4; i++) {
                    const int m = l / 4 + (i >> 1) * 8, n = l % 4 * 2 + (i & 1);
                    float sum = in[l].c[i];
                    for (int k = 0; k < 16; k++) sum += a[m][k] * b[k][n];
                    out[l].value[i] = sum;
                }
            }
        },
        where);
}

inline Floats4 mma_m16n8k16_bf16(const MmaOperands& operands, Where where = Where::current()) {
    return mma_m16n8k16("mma.m16n8k16.bf16", operands, bf16_to_float, where);
}
inline Floats4 mma_m16n8k16_fp16(const MmaOperands& operands, Where where = Where::current()) {
    return mma_m16n8k16("mma.m16n8k16.f16", operands, fp16_to_float, where);
}

}  // namespace cuda_host
