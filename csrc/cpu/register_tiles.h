// The products of linear_cross_entropy and attention on the register tiles of gemm.h. csrc/cpu/amx has the same
// interface with AMX tiles.
#pragma once

#include "linear.h"

namespace qlora::QLORA_ISA {

static inline int64_t round_up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class Mac>
struct RegisterTiles {
    using Panel = Mac;  // selects the layout of b
    using Elem = typename Mac::Elem;
    static constexpr int kPair = Mac::kPair;
    static constexpr int kRows = kMaxRows;
    static constexpr int64_t kStepMultiple = 1;  // operands are padded with zeros to a multiple of it
    struct Session {                             // state of a thread while it multiplies
        Session() {}
        ~Session() {}
    };

    // c[rows][kColumns] = a[rows][steps] b[steps][kColumns], or += if `adds`; rows <= kRows. The rows of a are `stride`
    // elements apart; steps is a multiple of kStepMultiple. The memory of a and c must include all kRows rows.
    static void multiply(const Elem* a, int64_t stride, int rows, const Elem* b, int64_t steps, float* c,
                         bool adds = true) {
        if (steps == 0 && !adds) clear(c, rows * kColumns);
        tile_kernel_for<Mac, kVectors>(rows)(a, stride, kPair, b, steps, {}, adds, c);
    }
};

}  // namespace qlora::QLORA_ISA
