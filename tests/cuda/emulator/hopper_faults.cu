// The product of hopper_product.cuh with each of its faults. The emulator must catch every one of them.
#include <utility>

#include "hopper_product.cuh"
#include "qlora/ptx_sm90.cuh"

namespace {

using Launch = cudaError_t (*)(const void*, const void*, float*, int);

template <int... FAULT>
cudaError_t launch_one(int fault, std::integer_sequence<int, FAULT...>, const void* a, const void* b, float* y, int K) {
    const Launch launches[] = {hopper::launch_product<__nv_bfloat16, 64, FAULT>...};
    return launches[fault](a, b, y, K);
}

}  // namespace

extern "C" cudaError_t launch_product(int fault, const void* a, const void* b, float* y, int K) {
    return launch_one(fault, std::make_integer_sequence<int, hopper::kFaults>(), a, b, y, K);
}
