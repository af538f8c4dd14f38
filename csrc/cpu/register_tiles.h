// The products of linear_cross_entropy and attention on the register tiles of gemm.h. csrc/cpu/amx has the same
// interface over AMX tiles.
#pragma once

#include "linear.h"

namespace qlora::QLORA_ISA {

static inline int64_t round_up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

template <class Mac>
struct RegisterTiles {
    using Panel = Mac;  // names the layout of b
    using Elem = typename Mac::Elem;
    static constexpr int kPair = Mac::kPair;
    static constexpr int kRows = kMaxRows;
    static constexpr int64_t kStepMultiple = 1;  // steps of an operand are padded to it with zeros
    struct Session {                             // what a thread holds while it multiplies
        Session() {}
        ~Session() {}
    };

    // c[rows][kColumns] += a[rows][steps] b[steps][kColumns], rows <= kRows. a's rows lie `stride` elements apart;
    // steps is a multiple of kStepMultiple. Rows of a and c up to kRows must be memory of the caller.
    static void multiply(const Elem* a, int64_t stride, int rows, const Elem* b, int64_t steps, float* c) {
        tile_kernel_for<Mac, kVectors>(rows)(a, stride, kPair, b, steps, c);
    }
};

}  // namespace qlora::QLORA_ISA
