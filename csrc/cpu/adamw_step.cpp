// adamw_step: AdamW over many tensors, as defined in qlora_kernels/ops/adamw_step.py.
//
// With fp32 states the step is bound by memory, at 28 bytes per element; with 8-bit states, at 16 bytes, by their
// decoding and encoding. Segments are split into tasks of limited length, so that 448 small tensors and one large one
// keep the threads equally busy. fp32 data is updated in place; 16-bit parameters and 8-bit states pass through fp32
// buffers of one block that stay in L1. The loops over a block are plain C, which every compiler vectorizes; `fma` is
// written where the definition has one.
#include <cmath>
#include <vector>

#include "dynamic_map.h"
#include "ops.h"
#include "philox.h"
#include "qlora/parallel.h"
#include "simd.h"

namespace qlora::QLORA_ISA {
namespace {

constexpr int kBlock = kStateBlocksize;

// Elements per task. Each task restarts seven streams, so tasks are long (with 64 blocks, one tensor of 80 M took 10 %
// longer than with 1024), but there are enough of them for the threads to finish together.
constexpr int64_t kShortest = 64 * kBlock;
constexpr int64_t kLongest = 1024 * kBlock;
constexpr int64_t kTasksPerThread = 8;

struct Scalars {
    float grad_multiplier, decay, beta1_weight, beta2, beta2_weight, step, root_correction, eps;
    bool lerp_from_grad;
};

// Computes in double, as Python does, and rounds once, as torch does for its kernels.
Scalars scalars_of(const AdamWStep& s, double t) {
    Scalars c{};
    c.grad_multiplier = s.grad_multiplier;
    c.decay = static_cast<float>(1.0 - s.lr * s.weight_decay);  // exactly 1 without decay
    c.beta1_weight = static_cast<float>(1.0 - s.beta1);
    c.lerp_from_grad = c.beta1_weight >= 0.5f;
    if (c.lerp_from_grad) c.beta1_weight -= 1.0f;
    c.beta2 = static_cast<float>(s.beta2);
    c.beta2_weight = static_cast<float>(1.0 - s.beta2);
    c.step = static_cast<float>(-(s.lr / (1.0 - std::pow(s.beta1, t))));
    c.root_correction = static_cast<float>(std::pow(1.0 - std::pow(s.beta2, t), 0.5));
    c.eps = static_cast<float>(s.eps);
    return c;
}

template <bool kLerpFromGrad>
inline void update(float* __restrict p, const float* __restrict g, float* __restrict m, float* __restrict v, int64_t n,
                   const Scalars& c) {
    for (int64_t i = 0; i < n; ++i) {
        const float grad = g[i] * c.grad_multiplier;
        m[i] = __builtin_fmaf(c.beta1_weight, grad - m[i], kLerpFromGrad ? grad : m[i]);
        v[i] = __builtin_fmaf(c.beta2_weight * grad, grad, v[i] * c.beta2);
        const float denominator = __builtin_sqrtf(v[i]) / c.root_correction + c.eps;
        p[i] = p[i] * c.decay + c.step * m[i] / denominator;
    }
}

inline void update(float* p, const float* g, float* m, float* v, int64_t n, const Scalars& c) {
    c.lerp_from_grad ? update<true>(p, g, m, v, n, c) : update<false>(p, g, m, v, n, c);
}

template <class T>
void widen(const T* source, float* target, int n) {
    for (int i = 0; i < n; i += kLanes) store(target + i, load_n(source + i, n - i < kLanes ? n - i : kLanes));
}

template <class T>
void narrow(const float* source, T* target, int n) {
    for (int i = 0; i < n; i += kLanes) store_n(target + i, load(source + i), n - i < kLanes ? n - i : kLanes);
}

// Adds 16 random bits below the bf16 mantissa and truncates. NaN is kept, because it could overflow to a number.
void narrow_stochastic(const float* source, Bf16* target, int n, uint64_t seed, uint64_t counter) {
    alignas(64) uint32_t words[4 * kPhiloxCalls];
    for (int begin = 0; begin < n; begin += 8 * kPhiloxCalls) {
        philox(seed, (counter + static_cast<uint64_t>(begin)) >> 3, words);
        const int end = n - begin < 8 * kPhiloxCalls ? n - begin : 8 * kPhiloxCalls;
        for (int i = 0; i < end; ++i) {
            const uint32_t draw = words[i >> 1] >> (16 * (i & 1)) & 0xffff;
            const uint32_t bits = float_bits(source[begin + i]);
            const uint32_t rounded = (bits & 0x7fffffff) > 0x7f800000 ? bits | 0x400000 : bits + draw;
            target[begin + i].bits = static_cast<uint16_t>(rounded >> 16);
        }
    }
}

struct States {
    uint8_t *m, *v;              // fp32, or 8-bit indices
    float *m_absmax, *v_absmax;  // null: fp32
};

// Copies a short block's indices and pads them with zeros.
template <bool kSigned>
const uint8_t* padded(const uint8_t* q, int n, uint8_t* space) {
    memset(space, DynamicMap<kSigned>::kOrigin, kBlock);
    memcpy(space, q, static_cast<size_t>(n));
    return space;
}

bool is_finite(float x) { return (float_bits(x) & 0x7f800000) != 0x7f800000; }

// 8-bit codes have no NaN, and a non-finite absmax would affect the whole block. An element whose moments are not
// finite therefore restarts from zero. Its parameter becomes NaN, or is unchanged if the root is infinite.
void restart_nonfinite(float* m, float* v, F32& largest_m, F32& largest_v) {
    for (int i = 0; i < kBlock; ++i) {
        if (!is_finite(m[i]) || !is_finite(v[i])) m[i] = v[i] = 0.0f;
    }
    largest_m = largest_v = zero();
    collect_largest(m, kBlock, largest_m);
    collect_largest(v, kBlock, largest_v);
}

// Updates one block with 8-bit states. It is decoded in pieces, so that the divisions of one piece overlap with the
// lookups of the next, and encoded once the block's largest values are known.
void step_quantized(float* p, const float* g, const States& states, int n, const Scalars& c) {
    alignas(64) float m[kBlock], v[kBlock];
    alignas(64) uint8_t m_space[kBlock], v_space[kBlock];
    const bool whole = n == kBlock;
    const uint8_t* m_index = whole ? states.m : padded<true>(states.m, n, m_space);
    const uint8_t* v_index = whole ? states.v : padded<false>(states.v, n, v_space);
    F32 largest_m = zero(), largest_v = zero();
    for (int i = 0; i < kBlock; i += kPiece) {
        decode_piece<true>(m_index + i, *states.m_absmax, m + i);
        decode_piece<false>(v_index + i, *states.v_absmax, v + i);
        if (i + kPiece <= n) {
            update(p + i, g + i, m + i, v + i, kPiece, c);
        } else if (i < n) {
            update(p + i, g + i, m + i, v + i, n - i, c);
        }
        collect_largest(m + i, kPiece, largest_m);
        collect_largest(v + i, kPiece, largest_v);
    }
    if (!is_finite(largest_lane(largest_m)) || !is_finite(largest_lane(largest_v))) {
        restart_nonfinite(m, v, largest_m, largest_v);
    }
    *states.m_absmax = encode_block<true>(m, largest_m, states.m, n);
    *states.v_absmax = encode_block<false>(v, largest_v, states.v, n);
}

// Updates one block; data that is not fp32 in memory passes through buffers.
template <class T>
void step_block(T* param, const T* grad, const States& states, int n, const Scalars& c, const uint64_t* seed,
                uint64_t counter) {
    alignas(64) float p_buffer[kBlock], g_buffer[kBlock];
    float* p = p_buffer;
    const float* g = g_buffer;
    if constexpr (std::is_same_v<T, float>) {
        p = param;
        g = grad;
    } else {
        widen(param, p_buffer, n);
        widen(grad, g_buffer, n);
    }
    if (states.m_absmax) {
        step_quantized(p, g, states, n, c);
    } else {
        update(p, g, reinterpret_cast<float*>(states.m), reinterpret_cast<float*>(states.v), n, c);
    }
    if constexpr (std::is_same_v<T, Bf16>) {
        if (seed) return narrow_stochastic(p, param, n, *seed, counter);
    }
    if constexpr (!std::is_same_v<T, float>) narrow(p, param, n);
}

template <class T>
void step_range(const AdamWStep& s, const AdamWSegment& segment, const AdamWParam& param, int64_t begin, int64_t end) {
    const Scalars c = scalars_of(s, param.step);
    T* values = static_cast<T*>(param.data) + segment.start;
    const T* grads = static_cast<const T*>(param.grad) + segment.start;
    const bool quantized = segment.exp_avg_absmax >= 0;
    const int64_t width = quantized ? 1 : sizeof(float);
    uint8_t* m = s.arena + segment.exp_avg;
    uint8_t* v = s.arena + segment.exp_avg_sq;
    if constexpr (std::is_same_v<T, float>) {
        if (!quantized) {
            update(values + begin, grads + begin, reinterpret_cast<float*>(m) + begin,
                   reinterpret_cast<float*>(v) + begin, end - begin, c);
            return;
        }
    }
    for (int64_t i = begin; i < end; i += kBlock) {
        States states{m + i * width, v + i * width, nullptr, nullptr};
        if (quantized) {
            states.m_absmax = reinterpret_cast<float*>(s.arena + segment.exp_avg_absmax) + i / kBlock;
            states.v_absmax = reinterpret_cast<float*>(s.arena + segment.exp_avg_sq_absmax) + i / kBlock;
        }
        const int n = static_cast<int>(end - i < kBlock ? end - i : kBlock);
        step_block(values + i, grads + i, states, n, c, s.seed, static_cast<uint64_t>(segment.counter + i));
    }
}

struct Task {
    int64_t segment, begin, end;
};

}  // namespace

void adamw_step(const AdamWStep& s) {
    int64_t total = 0;
    for (int64_t i = 0; i < s.n_segments; ++i) total += s.segments[i].numel;
    const int64_t even = total / (kTasksPerThread * num_threads()) / kBlock * kBlock;
    const int64_t length = even < kShortest ? kShortest : even > kLongest ? kLongest : even;
    std::vector<Task> tasks;
    for (int64_t i = 0; i < s.n_segments; ++i) {
        const AdamWSegment& segment = s.segments[i];
        if (!s.params[segment.param].grad) continue;
        for (int64_t begin = 0; begin < segment.numel; begin += length) {
            tasks.push_back({i, begin, begin + length < segment.numel ? begin + length : segment.numel});
        }
    }
    parallel_tasks(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
        const Task& task = tasks[static_cast<size_t>(i)];
        const AdamWSegment& segment = s.segments[task.segment];
        const AdamWParam& param = s.params[segment.param];
        switch (param.dtype) {
            case DType::kFloat32:
                return step_range<float>(s, segment, param, task.begin, task.end);
            case DType::kBfloat16:
                return step_range<Bf16>(s, segment, param, task.begin, task.end);
            case DType::kFloat16:
                return step_range<Fp16>(s, segment, param, task.begin, task.end);
        }
    });
}

}  // namespace qlora::QLORA_ISA
