// The interface of ../register_tiles.h, implemented with AMX tiles.
//
// A panel of gemm.h, [steps][32 columns] of pairs, holds two right operands side by side: 16 steps of 16 columns form a
// tile whose rows are 128 bytes apart. Left operands are rows and are read in place.
#pragma once

#include "../register_tiles.h"
#include "tile.h"

namespace qlora::QLORA_ISA {

struct AmxTiles {
    using Panel = Bf16Dot;
    using Elem = Bf16;
    static constexpr int kPair = 2;
    static constexpr int kRows = 2 * kTileRows;
    static constexpr int64_t kStepMultiple = 16;
    using Session = TileSession;

    static void multiply(const Bf16* a, int64_t stride, int rows, const Bf16* b, int64_t steps, float* c,
                         bool adds = true) {
        if (!adds) clear(c, kRows * kColumns);
        constexpr int64_t kPanelRow = kColumns * kPair * sizeof(Bf16), kSumRow = kColumns * sizeof(float);
        const int64_t row_bytes = stride * static_cast<int64_t>(sizeof(Bf16));
        const bool two = rows > kTileRows;
        float* lower = c + kTileRows * kColumns;
        load_tile<0>(c, kSumRow);
        load_tile<1>(c + kLanes, kSumRow);
        if (two) {
            load_tile<2>(lower, kSumRow);
            load_tile<3>(lower + kLanes, kSumRow);
        }
        for (int64_t step = 0; step < steps; step += kStepMultiple) {
            const Bf16* panel = b + step * kColumns * kPair;
            load_tile<4>(a + step * kPair, row_bytes);
            load_tile<6>(panel, kPanelRow);
            tile_dot<0, 4, 6>();
            load_tile<7>(panel + kLanes * kPair, kPanelRow);
            tile_dot<1, 4, 7>();
            if (two) {
                load_tile<5>(a + kTileRows * stride + step * kPair, row_bytes);
                tile_dot<2, 5, 6>();
                tile_dot<3, 5, 7>();
            }
        }
        store_tile<0>(c, kSumRow);
        store_tile<1>(c + kLanes, kSumRow);
        if (two) {
            store_tile<2>(lower, kSumRow);
            store_tile<3>(lower + kLanes, kSumRow);
        }
    }
};

}  // namespace qlora::QLORA_ISA
