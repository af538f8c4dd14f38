// CUDA's declaration qualifiers for a host compiler, and shared memory.
#pragma once

#include <cuda_runtime.h>

#include "machine.h"

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __managed__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __managed__
#define __launch_bounds__(...)
#define __grid_constant__

// Blocks run one at a time in one operating-system thread, so a static is a block's. The section lets the runtime
// poison it between blocks. g++ 12 leaves the statics of templates out of the section: kernels that are templates take
// their shared memory from block_shared (qlora/shared_memory.cuh), which is stricter besides.
#define __shared__ static __attribute__((section("cuda_host_shared")))
__attribute__((section("cuda_host_shared"), used)) static char cuda_host_shared_anchor;

namespace cuda_host {

// One T per block and type, on the heap in its exact size: AddressSanitizer guards both ends.
template <typename T>
T& block_shared() {
    static char key;
    return *static_cast<T*>(machine().block_shared(&key, sizeof(T)));
}

inline void* dynamic_shared() { return machine().dynamic_shared; }

}  // namespace cuda_host
