// glu: activation(gate) * up, and its gradients (qlora_kernels/ops/glu.py).
//
// Both activations are gate * sigmoid(u): u = gate for silu, and u = 2 sqrt(2 / pi) (gate + 0.044715 gate^3) for
// gelu_tanh, because (1 + tanh(z)) / 2 = sigmoid(2 z). The op is bound by memory with long vectors, otherwise by the
// division.
#include "exp.h"
#include "ops.h"
#include "qlora/parallel.h"
#include "simd.h"

namespace qlora::QLORA_ISA {
namespace {

constexpr int64_t kGrain = 1 << 12;

// The exponential of a larger argument overflows, or is 0.
constexpr float kLargestExponent = 86.0f;

// Above this magnitude the sigmoid of gelu_tanh's u is 0 or 1 in fp32; much larger cubes would overflow.
constexpr float kSaturated = 32.0f;
constexpr float kLinear = 1.59576912f;   // 2 sqrt(2 / pi)
constexpr float kCubic = 0.0713548162f;  // 2 sqrt(2 / pi) 0.044715

struct Sigmoid {
    F32 value, complement;  // 1 - value without cancellation
};

static inline Sigmoid sigmoid(F32 u) {
    const F32 e = exp_vector(clamp(mul(u, set1(-1.0f)), kLargestExponent));
    const F32 quotient = set1(1.0f) / add(set1(1.0f), e);
    // Zero if e no longer equals e^-u, because its remainder times a large gate would not be negligible.
    const F32 value = u > set1(-kLargestExponent) ? quotient : zero();
    const F32 complement = u < set1(kLargestExponent) ? mul(e, quotient) : zero();
    return {value, complement};
}

struct Silu {
    static inline F32 argument(F32 gate) { return gate; }
    static inline F32 slope(F32) { return set1(1.0f); }
};

struct GeluTanh {
    static inline F32 argument(F32 gate) {
        const F32 g = clamp(gate, kSaturated);
        return mul(g, fma(mul(g, g), set1(kCubic), set1(kLinear)));
    }
    static inline F32 slope(F32 gate) {
        const F32 g = clamp(gate, kSaturated);
        return fma(mul(g, g), set1(3.0f * kCubic), set1(kLinear));
    }
};

template <class Act, class T>
void forward(int64_t n, const T* gate, const T* up, T* y) {
    parallel_ranges(n, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += kLanes) {
            const int count = static_cast<int>(end - i < kLanes ? end - i : kLanes);
            const F32 g = load_n(gate + i, count);
            const F32 activated = mul(g, sigmoid(Act::argument(g)).value);
            store_sum_n(y + i, mul(activated, load_n(up + i, count)), count);
        }
    });
}

// f' = sigmoid + gate u' sigmoid (1 - sigmoid)
template <class Act, class T>
void backward(int64_t n, const T* grad_y, const T* gate, const T* up, T* grad_gate, T* grad_up) {
    parallel_ranges(n, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += kLanes) {
            const int count = static_cast<int>(end - i < kLanes ? end - i : kLanes);
            const F32 g = load_n(gate + i, count), grad = load_n(grad_y + i, count);
            const Sigmoid s = sigmoid(Act::argument(g));
            const F32 activated = mul(g, s.value);
            const F32 slope = fma(mul(activated, s.complement), Act::slope(g), s.value);
            store_sum_n(grad_gate + i, mul(mul(grad, load_n(up + i, count)), slope), count);
            store_sum_n(grad_up + i, mul(grad, activated), count);
        }
    });
}

// run(activation, null pointer of the element type)
template <class Run>
void with_types(Activation activation, DType dtype, const Run& run) {
    const auto with_dtype = [&](auto act) {
        switch (dtype) {
            case DType::kFloat32:
                return run(act, static_cast<float*>(nullptr));
            case DType::kBfloat16:
                return run(act, static_cast<Bf16*>(nullptr));
            case DType::kFloat16:
                return run(act, static_cast<Fp16*>(nullptr));
        }
    };
    activation == Activation::kSilu ? with_dtype(Silu{}) : with_dtype(GeluTanh{});
}

}  // namespace

void glu(Activation activation, DType dtype, int64_t n, const void* gate, const void* up, void* y) {
    with_types(activation, dtype, [&]<class Act, class T>(Act, T*) {
        forward<Act>(n, static_cast<const T*>(gate), static_cast<const T*>(up), static_cast<T*>(y));
    });
}

void glu_backward(Activation activation, DType dtype, int64_t n, const void* grad_y, const void* gate, const void* up,
                  void* grad_gate, void* grad_up) {
    with_types(activation, dtype, [&]<class Act, class T>(Act, T*) {
        backward<Act>(n, static_cast<const T*>(grad_y), static_cast<const T*>(gate), static_cast<const T*>(up),
                      static_cast<T*>(grad_gate), static_cast<T*>(grad_up));
    });
}

}  // namespace qlora::QLORA_ISA
