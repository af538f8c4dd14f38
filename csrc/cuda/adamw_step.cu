// One AdamW step over many tensors in one launch; the arithmetic, its order and every rounding stand in
// qlora_kernels/ops/adamw_step.py and are followed to the bit.
//
// blockIdx.y names a segment (a run of one parameter), the blocks of a row share its 256-element units, one warp a unit
// and eight neighbouring elements a lane. A unit is one block of 8-bit state, so a warp decodes, updates and encodes it
// with shuffles alone. Everything that changes from step to step (step counts, learning rate, gradient multiplier,
// found_inf, seed) is read from device memory: a captured graph replays with new values.
#include "launchers.h"
#include "qlora/floats.cuh"
#include "qlora/launch.cuh"
#include "qlora/nf4_code.h"
#include "qlora/philox.cuh"
#include "qlora/shared_memory.cuh"

namespace qlora {

constexpr int kAdamWThreads = 256;
constexpr int kAdamWWarps = kAdamWThreads / 32;
// Blocks that share one segment: about one wave of a large GPU. More would each compute the segment's factors again, in
// fp64, which many GPUs run at 1/64 of the fp32 rate.
constexpr int kLargestSegmentRow = 1024;
constexpr unsigned kEveryLane = 0xFFFFFFFFu;

// Columns of `segments`, as ops/adamw_step.py names them.
struct AdamWSegment {
    int64_t param, start, numel, exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax, counter;
};
struct AdamWTensor {
    void* param;
    const void* grad;  // null: the parameter is skipped
    int64_t type, numel;
};
__device__ __forceinline__ const AdamWTensor* tensors_of(const AdamWArgs& p) {
    return static_cast<const AdamWTensor*>(p.tensors);
}

// The 8-bit code of one state.
struct StateCode {
    float value[256], boundary[256];

    __device__ __forceinline__ void fill_signed(int thread) {
        static const float values[256] = {QLORA_ABSMAX_CODE};
        static const float boundaries[256] = {QLORA_ABSMAX_BOUNDARIES, 2.0f};  // the last is never read
        value[thread] = values[thread];
        boundary[thread] = boundaries[thread];
    }
    __device__ __forceinline__ void fill_unsigned(int thread) {
        static const float values[256] = {QLORA_UNSIGNED_CODE};
        static const float boundaries[256] = {QLORA_UNSIGNED_BOUNDARIES, 2.0f};
        value[thread] = values[thread];
        boundary[thread] = boundaries[thread];
    }
    // Midpoints strictly below; the last index for NaN, which is below nothing.
    __device__ __forceinline__ uint32_t index_of(float normalized) const {
        int q = 0;
#pragma unroll
        for (int step = 128; step > 0; step /= 2) q += normalized > boundary[q + step - 1] ? step : 0;
        return normalized != normalized ? 255u : uint32_t(q);
    }
};

// What all elements of a segment share, rounded once from double.
struct AdamWFactors {
    float decay, one_minus_beta1, minus_beta1, beta2, one_minus_beta2, step_size, correction2, eps;
    bool lerp_from_state;
};

struct AdamWShared {
    AdamWFactors factors;
    StateCode exp_avg_code, exp_avg_sq_code;
};

__device__ __forceinline__ double learning_rate(const AdamWArgs& p) {
    if (p.double_lr) return *p.double_lr;
    return p.lr.data ? double(load_any(p.lr, 0)) : p.scalars.lr;
}

// beta^t for t >= 1 by squaring: t is a whole number, and pow() would take a stack frame.
__device__ __forceinline__ double power(double base, float t) {
    double result = 1;
    for (unsigned bits = static_cast<unsigned>(t); bits; bits >>= 1) {
        if (bits & 1) result *= base;
        base *= base;
    }
    return result;
}

// Threads 0 and 32 compute the factors of a segment, one power of beta each: their warps run at the same time.
__device__ __forceinline__ void fill_factors(AdamWFactors& f, const AdamWArgs& p, float t, int thread) {
    const AdamWScalars& s = p.scalars;
    if (thread == 0) {
        const double lr = learning_rate(p);
        f.decay = float(1 - __dmul_rn(lr, s.weight_decay));
        f.step_size = float(-(lr / (1 - power(s.beta1, t))));
        f.lerp_from_state = s.beta1 > 0.5;
        f.one_minus_beta1 = float(1 - s.beta1);
        f.minus_beta1 = float((1 - s.beta1) - 1);
    } else if (thread == 32) {
        f.beta2 = float(s.beta2);
        f.one_minus_beta2 = float(1 - s.beta2);
        f.correction2 = float(sqrt(1 - power(s.beta2, t)));
        f.eps = float(s.eps);
    }
}

template <typename T>
__device__ __forceinline__ void load_elements(float (&to)[8], const void* from, int64_t index, int count) {
    const T* elements = static_cast<const T*>(from) + index;
    if (count == 8 && is_aligned(elements, 16)) {
        load8(to, elements);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) to[i] = i < count ? to_float(elements[i]) : 0.0f;
    }
}
template <typename T>
__device__ __forceinline__ void store_elements(void* to, int64_t index, int count, const float (&from)[8]) {
    T* elements = static_cast<T*>(to) + index;
    if (count == 8 && is_aligned(elements, 16)) {
        store8(elements, from);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (i < count) elements[i] = round_to<T>(from[i]);
        }
    }
}
__device__ __forceinline__ void load_typed(float (&to)[8], const void* from, DType type, int64_t index, int count) {
    if (type == DType::kFloat32) load_elements<float>(to, from, index, count);
    if (type == DType::kBfloat16) load_elements<__nv_bfloat16>(to, from, index, count);
    if (type == DType::kFloat16) load_elements<__half>(to, from, index, count);
}

// value[q] * absmax for eight states: one 64-bit load where all eight exist and are aligned, which the arena's layout
// makes the rule.
__device__ __forceinline__ void decode_states(float (&to)[8], const uint8_t* q, const StateCode& code, float absmax,
                                              int count) {
    if (count == 8 && is_aligned(q, 8)) {
        const uint2 words = *reinterpret_cast<const uint2*>(q);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const uint32_t byte = (i < 4 ? words.x : words.y) >> (8 * (i % 4)) & 0xFF;
            to[i] = __fmul_rn(code.value[byte], absmax);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) to[i] = i < count ? __fmul_rn(code.value[q[i]], absmax) : 0.0f;
    }
}

// Encodes a unit: lanes of the warp agree on the absmax of their 256 elements. Lanes with no element bring zeros.
__device__ __forceinline__ void encode_states(uint8_t* q, float* absmax, const StateCode& code, const float (&from)[8],
                                              int count) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (i < count) bits = max(bits, __float_as_uint(from[i]) & 0x7FFFFFFFu);
    }
    for (int distance = 16; distance > 0; distance /= 2) {
        bits = max(bits, __shfl_xor_sync(kEveryLane, bits, distance));
    }
    float scale = __uint_as_float(bits);
    if (scale < kSmallestAbsmax) scale = 0.0f;
    const float inverse = scale > 0 ? __frcp_rn(scale) : 0.0f;
    uint32_t word[2] = {};
#pragma unroll
    for (int i = 0; i < 8; i++) word[i / 4] |= code.index_of(__fmul_rn(from[i], inverse)) << (8 * (i % 4));
    if (count == 8 && is_aligned(q, 8)) {
        *reinterpret_cast<uint2*>(q) = make_uint2(word[0], word[1]);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (i < count) q[i] = static_cast<uint8_t>(word[i / 4] >> (8 * (i % 4)));
        }
    }
    if (threadIdx.x % 32 == 0) *absmax = scale;
}

// 16 random bits added below the bf16 mantissa, the rest cut off; NaN stays NaN.
__device__ __forceinline__ void store_stochastic(void* to, int64_t index, int count, const float (&from)[8],
                                                 int64_t seed, int64_t counter) {
    const uint4 words = philox(seed, counter >> 3);
    const uint32_t word[4] = {words.x, words.y, words.z, words.w};
    auto* elements = static_cast<uint16_t*>(to) + index;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t bits = __float_as_uint(from[i]) + (word[i / 2] >> (16 * (i & 1)) & 0xFFFF);
        if (i < count) elements[i] = from[i] != from[i] ? uint16_t(0x7FC0) : uint16_t(bits >> 16);
    }
}

__device__ __forceinline__ void update(float& p, float g, float& m, float& v, const AdamWFactors& f, bool decays) {
    if (decays) p = __fmul_rn(p, f.decay);
    const float difference = __fsub_rn(g, m);
    m = f.lerp_from_state ? __fmaf_rn(f.one_minus_beta1, difference, m) : __fmaf_rn(f.minus_beta1, difference, g);
    v = __fmaf_rn(__fmul_rn(f.one_minus_beta2, g), g, __fmul_rn(v, f.beta2));
    const float denominator = __fadd_rn(__fdiv_rn(__fsqrt_rn(v), f.correction2), f.eps);
    p = __fadd_rn(p, __fdiv_rn(__fmul_rn(f.step_size, m), denominator));
}

__device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & 0x7F800000u) != 0x7F800000u; }

__device__ __forceinline__ void update_unit(const AdamWArgs& problem, const AdamWSegment& segment,
                                            const AdamWTensor& tensor, AdamWShared& shared, float multiplier,
                                            int64_t unit) {
    const int64_t offset = unit * kStateBlocksize + threadIdx.x % 32 * 8;
    const int count = static_cast<int>(max(int64_t(0), min(int64_t(8), segment.numel - offset)));
    const DType type = static_cast<DType>(tensor.type);
    const bool eight_bit = segment.exp_avg_absmax >= 0;
    uint8_t* exp_avg = problem.arena + segment.exp_avg;
    uint8_t* exp_avg_sq = problem.arena + segment.exp_avg_sq;
    float* absmax = reinterpret_cast<float*>(problem.arena + segment.exp_avg_absmax) + unit;
    float* sq_absmax = reinterpret_cast<float*>(problem.arena + segment.exp_avg_sq_absmax) + unit;
    float p[8], g[8], m[8], v[8];
    load_typed(p, tensor.param, type, segment.start + offset, count);
    load_typed(g, tensor.grad, type, segment.start + offset, count);
    if (eight_bit) {
        decode_states(m, exp_avg + offset, shared.exp_avg_code, *absmax, count);
        decode_states(v, exp_avg_sq + offset, shared.exp_avg_sq_code, *sq_absmax, count);
        __syncwarp();  // every lane has read the absmax that lane 0 replaces below
    } else {
        load_elements<float>(m, exp_avg, offset, count);
        load_elements<float>(v, exp_avg_sq, offset, count);
    }
    const bool decays = problem.scalars.weight_decay != 0;
#pragma unroll
    for (int i = 0; i < 8; i++) update(p[i], __fmul_rn(g[i], multiplier), m[i], v[i], shared.factors, decays);
    if (eight_bit) {
        // 8-bit codes have no NaN, and an infinite absmax would spread to the whole block: such an element starts anew.
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (!is_finite(m[i]) || !is_finite(v[i])) m[i] = v[i] = 0.0f;
        }
        encode_states(exp_avg + offset, absmax, shared.exp_avg_code, m, count);
        encode_states(exp_avg_sq + offset, sq_absmax, shared.exp_avg_sq_code, v, count);
    } else {
        store_elements<float>(exp_avg, offset, count, m);
        store_elements<float>(exp_avg_sq, offset, count, v);
    }
    const int64_t index = segment.start + offset;
    if (type == DType::kFloat32) store_elements<float>(tensor.param, index, count, p);
    if (type == DType::kFloat16) store_elements<__half>(tensor.param, index, count, p);
    if (type == DType::kBfloat16) {
        if (problem.seed) {
            store_stochastic(tensor.param, index, count, p, *problem.seed, segment.counter + offset);
        } else {
            store_elements<__nv_bfloat16>(tensor.param, index, count, p);
        }
    }
}

__device__ __forceinline__ bool in_arena(const AdamWArgs& p, int64_t offset, int64_t bytes, int64_t alignment) {
    return offset >= 0 && offset % alignment == 0 && offset <= p.arena_bytes && bytes <= p.arena_bytes - offset;
}

// The rows of `segments` are data in device memory, which no host code has checked.
__device__ __forceinline__ bool is_sound(const AdamWArgs& p, const AdamWSegment& segment) {
    if (segment.param < 0 || segment.param >= p.n_params) return false;
    const int64_t numel = tensors_of(p)[segment.param].numel;
    if (segment.start < 0 || segment.start > numel || segment.numel < 0 || segment.numel > numel - segment.start) {
        return false;
    }
    const bool eight_bit = segment.exp_avg_absmax >= 0;
    const int64_t width = eight_bit ? 1 : 4, absmax_bytes = 4 * ceil_div<int64_t>(segment.numel, kStateBlocksize);
    return in_arena(p, segment.exp_avg, segment.numel * width, width) &&
           in_arena(p, segment.exp_avg_sq, segment.numel * width, width) &&
           (!eight_bit || (in_arena(p, segment.exp_avg_absmax, absmax_bytes, 4) &&
                           in_arena(p, segment.exp_avg_sq_absmax, absmax_bytes, 4)));
}

__global__ void __launch_bounds__(kAdamWThreads, 2) adamw_step_kernel(const AdamWArgs problem) {
    AdamWShared& shared = block_shared<AdamWShared>();
    if (problem.found_inf && *problem.found_inf != 0) return;
    const float multiplier = problem.grad_multiplier ? *problem.grad_multiplier : 1.0f;
    const int thread = threadIdx.x;
    bool has_codes = false;
    for (int64_t index = blockIdx.y; index < problem.n_segments; index += gridDim.y) {
        const AdamWSegment& segment = reinterpret_cast<const AdamWSegment*>(problem.segments)[index];
        if (!is_sound(problem, segment)) continue;
        const AdamWTensor& tensor = tensors_of(problem)[segment.param];
        const int64_t units = ceil_div<int64_t>(segment.numel, kStateBlocksize);
        __syncthreads();  // the factors of the segment before are no longer read
        fill_factors(shared.factors, problem, problem.steps[segment.param], thread);
        if (segment.exp_avg_absmax >= 0 && !has_codes) {
            shared.exp_avg_code.fill_signed(thread);
            shared.exp_avg_sq_code.fill_unsigned(thread);
            has_codes = true;
        }
        __syncthreads();
        if (!tensor.grad) continue;
        const int64_t stride = int64_t(gridDim.x) * kAdamWWarps;
        for (int64_t unit = int64_t(blockIdx.x) * kAdamWWarps + thread / 32; unit < units; unit += stride) {
            update_unit(problem, segment, tensor, shared, multiplier, unit);
        }
    }
}

}  // namespace qlora

cudaError_t launch_adamw_step(const qlora::AdamWArgs* args, cudaStream_t stream) {
    using namespace qlora;
    const int64_t n_segments = args->n_segments;
    if (n_segments == 0) return cudaSuccess;
    // Enough blocks a segment for its units, but not so many for all of them that most only find nothing to do.
    const int64_t wanted = ceil_div<int64_t>(args->largest_segment, kStateBlocksize * kAdamWWarps);
    const int64_t share = ceil_div<int64_t>(4 * kLargestSegmentRow, n_segments);
    int64_t row = wanted < share ? wanted : share;
    row = row < 1 ? 1 : row > kLargestSegmentRow ? kLargestSegmentRow : row;
    const dim3 grid(static_cast<unsigned>(row), static_cast<unsigned>(n_segments < 65535 ? n_segments : 65535));
    return launch({grid, kAdamWThreads, 0, stream}, adamw_step_kernel, *args);
}
