// y[i] = keep(i) ? x[i] * scale : 0. With `add` the value is added to y[i] in fp32 and the sum is rounded once. The
// mask of qlora_kernels/ops/philox.py is a pure function of (seed, i), so that backward draws the same mask again.
//
// Each thread handles the eight neighbouring elements whose 16-bit draws come from one philox call.
#include "launchers.h"
#include "qlora/floats.cuh"
#include "qlora/launch.cuh"
#include "qlora/philox.cuh"

namespace qlora {

constexpr int kDropoutThreads = 256;

// ADD: y is read and added to. ALIGNED: x and y are 16-byte aligned, so that whole groups of eight take wide accesses.
template <typename T, bool ADD, bool ALIGNED>
__global__ void __launch_bounds__(kDropoutThreads)
    dropout_kernel(const T* __restrict__ x, const int64_t* __restrict__ seed, const uint32_t threshold,
                   const float scale, T* __restrict__ y, const int64_t numel) {
    const int64_t call = int64_t(blockIdx.x) * kDropoutThreads + threadIdx.x;
    const int64_t first = call * kDrawsPerCall;
    if (first >= numel) return;
    bool keep[kDrawsPerCall];
    draw8(keep, *seed, call, threshold);
    if (ALIGNED && first + kDrawsPerCall <= numel) {
        float value[kDrawsPerCall], sum[kDrawsPerCall] = {};
        load8(value, x + first);
        if (ADD) load8(sum, y + first);
#pragma unroll
        for (int j = 0; j < kDrawsPerCall; j++) {
            const float scaled = keep[j] ? __fmul_rn(value[j], scale) : 0.0f;
            sum[j] = ADD ? __fadd_rn(sum[j], scaled) : scaled;
        }
        store8(y + first, sum);
        return;
    }
    for (int j = 0; j < kDrawsPerCall && first + j < numel; j++) {
        const float scaled = keep[j] ? __fmul_rn(to_float(x[first + j]), scale) : 0.0f;
        y[first + j] = round_to<T>(ADD ? __fadd_rn(to_float(y[first + j]), scaled) : scaled);
    }
}

namespace {

template <typename T, bool ADD>
cudaError_t launch_typed(const DropoutArgs& args, cudaStream_t stream) {
    const int64_t blocks = ceil_div<int64_t>(args.numel, int64_t{kDropoutThreads} * kDrawsPerCall);
    const LaunchShape shape{static_cast<unsigned>(blocks), kDropoutThreads, 0, stream};
    const bool aligned = is_aligned(args.x, 16) && is_aligned(args.y, 16);
    const auto kernel = aligned ? dropout_kernel<T, ADD, true> : dropout_kernel<T, ADD, false>;
    return launch(shape, kernel, static_cast<const T*>(args.x), args.seed, static_cast<uint32_t>(args.threshold),
                  args.scale, static_cast<T*>(args.y), args.numel);
}

template <typename T>
cudaError_t launch_typed(const DropoutArgs& args, cudaStream_t stream) {
    return args.add ? launch_typed<T, true>(args, stream) : launch_typed<T, false>(args, stream);
}

}  // namespace
}  // namespace qlora

cudaError_t launch_dropout(const qlora::DropoutArgs* args, cudaStream_t stream) {
    using namespace qlora;
    if (args->numel == 0) return cudaSuccess;
    return with_float_type(args->dtype, [&]<class T>(T*) { return launch_typed<T>(*args, stream); });
}
