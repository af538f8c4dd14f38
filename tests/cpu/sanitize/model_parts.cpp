// Compares rms_norm, rope and glu with their formulas in double precision.
#include <cmath>
#include <cstdio>
#include <type_traits>

#include "checks.h"
#include "kernels.h"

namespace checks {
namespace {

using qlora::Activation;
using qlora::Bf16;
using qlora::DType;
using qlora::Fp16;

template <class T>
constexpr DType dtype_of() {
    if constexpr (std::is_same_v<T, float>) return DType::kFloat32;
    return std::is_same_v<T, Bf16> ? DType::kBfloat16 : DType::kFloat16;
}

template <class T>
constexpr double tolerance_of() {
    if constexpr (std::is_same_v<T, float>) return 2e-5;
    return std::is_same_v<T, Bf16> ? 1.5e-2 : 2e-3;
}

template <class T>
std::vector<T> random(int64_t n, unsigned seed) {
    return rounded<T>(normal(n, seed));
}

template <class T>
void compare(const std::vector<T>& got, const std::vector<double>& want, const char* what, int64_t size) {
    double largest = 1.0;
    bool close = true;
    for (const double w : want) largest = std::max(largest, std::fabs(w));
    for (size_t i = 0; i < want.size(); ++i) {
        close = close && std::fabs(qlora::to_float(got[i]) - want[i]) <= tolerance_of<T>() * largest;
    }
    char where[60];
    std::snprintf(where, sizeof where, "at %ld, element type %d", long(size), int(dtype_of<T>()));
    expect(close, what, where);
}

template <class T>
void check_rms_norm(int64_t rows, int64_t C, float offset) {
    const int64_t n = rows * C;
    const std::vector<T> x = random<T>(n, 1), residual = random<T>(n, 2), weight = random<T>(C, 3);
    const std::vector<T> grad_y = random<T>(n, 4), grad_s = random<T>(n, 5);
    std::vector<T> s(x.size()), y(x.size()), grad_x(x.size());
    std::vector<float> scale(static_cast<size_t>(rows)), grad_weight(static_cast<size_t>(C));
    const qlora::RmsNorm p{rows, C, dtype_of<T>(), dtype_of<T>(), {weight.data(), dtype_of<T>()}, offset};
    qlora::cpu_kernels().rms_norm(p, x.data(), residual.data(), 1e-5f, s.data(), y.data(), scale.data());
    qlora::cpu_kernels().rms_norm_backward(p, grad_y.data(), grad_s.data(), s.data(), scale.data(), grad_x.data(),
                                           grad_weight.data());
    std::vector<double> want_s(x.size()), want_y(x.size()), want_x(x.size()), want_weight(static_cast<size_t>(C));
    const auto at = [](const std::vector<T>& values, int64_t i) { return double(qlora::to_float(values[i])); };
    for (int64_t r = 0; r < rows; ++r) {
        double squares = 0.0, dot = 0.0;
        for (int64_t i = r * C; i < (r + 1) * C; ++i) {
            want_s[i] = at(x, i) + at(residual, i);
            squares += at(s, i) * at(s, i);
        }
        const double inverse = 1.0 / std::sqrt(squares / C + 1e-5);
        for (int64_t c = 0; c < C; ++c) dot += at(grad_y, r * C + c) * (at(weight, c) + offset) * at(s, r * C + c);
        for (int64_t c = 0; c < C; ++c) {
            const int64_t i = r * C + c;
            const double normalized = at(s, i) * inverse, factor = at(weight, c) + offset;
            want_y[i] = normalized * factor;
            want_x[i] = at(grad_s, i) + inverse * (at(grad_y, i) * factor - normalized * dot * inverse / C);
            want_weight[c] += at(grad_y, i) * normalized;
        }
    }
    compare(s, want_s, "rms_norm's sum", C);
    std::vector<T> sum = x;
    qlora::cpu_kernels().add_residual(dtype_of<T>(), rows * C, sum.data(), residual.data(), sum.data());
    compare(sum, want_s, "add_residual", C);
    compare(y, want_y, "rms_norm", C);
    compare(grad_x, want_x, "rms_norm_backward", C);
    compare(grad_weight, want_weight, "rms_norm_backward's grad_weight", C);
}

// q [B, T, H, D], the layout of projections, and k [B, H, T, D]; each head has exactly its elements.
template <class T>
void check_rope(int64_t D, bool inverse) {
    constexpr int64_t B = 2, L = 5, H = 3;
    const int64_t n = B * L * H * D;
    const std::vector<T> q = random<T>(n, 1), k = random<T>(n, 2), cos = random<T>(L * D, 3), sin = random<T>(L * D, 4);
    std::vector<T> q_out(q.size()), k_out(k.size());
    const qlora::RopeOperand by_token{q.data(), q_out.data(), H, {L * H * D, D, H * D}, {L * H * D, D, H * D}};
    const qlora::RopeOperand by_head{k.data(), k_out.data(), H, {H * L * D, L * D, D}, {H * L * D, L * D, D}};
    qlora::cpu_kernels().rope({dtype_of<T>(), B, L, D, cos.data(), sin.data(), 0, inverse, {by_token, by_head}});
    const auto check = [&](const std::vector<T>& x, const std::vector<T>& out, const int64_t (&strides)[3]) {
        std::vector<double> want(x.size());
        const auto at = [](const std::vector<T>& values, int64_t i) { return double(qlora::to_float(values[i])); };
        for (int64_t b = 0; b < B; ++b) {
            for (int64_t t = 0; t < L; ++t) {
                for (int64_t i = 0; i < H * D / 2; ++i) {
                    const int64_t d = i % (D / 2), e = d + D / 2;
                    const int64_t first = b * strides[0] + i / (D / 2) * strides[1] + t * strides[2] + d;
                    const int64_t second = first + D / 2;
                    const double to_a = inverse ? at(sin, t * D + e) : -at(sin, t * D + d);
                    const double to_b = inverse ? -at(sin, t * D + d) : at(sin, t * D + e);
                    want[first] = at(x, first) * at(cos, t * D + d) + at(x, second) * to_a;
                    want[second] = at(x, second) * at(cos, t * D + e) + at(x, first) * to_b;
                }
            }
        }
        compare(out, want, "rope", D);
    };
    check(q, q_out, by_token.strides);
    check(k, k_out, by_head.strides);
}

template <class T>
void check_glu(int64_t n, Activation activation) {
    std::vector<float> wide = normal(n, 1);
    for (float& value : wide) value *= 4.0f;
    const std::vector<T> gate = rounded<T>(wide), up = random<T>(n, 2), grad_y = random<T>(n, 3);
    std::vector<T> y(gate.size()), grad_gate(gate.size()), grad_up(gate.size());
    qlora::cpu_kernels().glu(activation, dtype_of<T>(), n, gate.data(), up.data(), y.data());
    qlora::cpu_kernels().glu_backward(activation, dtype_of<T>(), n, grad_y.data(), gate.data(), up.data(),
                                      grad_gate.data(), grad_up.data());
    std::vector<double> want_y(gate.size()), want_gate(gate.size()), want_up(gate.size());
    for (size_t i = 0; i < gate.size(); ++i) {
        const double g = qlora::to_float(gate[i]), u = qlora::to_float(up[i]), d = qlora::to_float(grad_y[i]);
        const double root = std::sqrt(2.0 / M_PI), tanh = std::tanh(root * (g + 0.044715 * g * g * g));
        const bool silu = activation == Activation::kSilu;
        const double sigmoid = silu ? 1.0 / (1.0 + std::exp(-g)) : 0.5 * (1.0 + tanh);
        const double inner = silu ? 1.0 : 2.0 * root * (1.0 + 3.0 * 0.044715 * g * g);
        want_y[i] = g * sigmoid * u;
        want_up[i] = d * g * sigmoid;
        want_gate[i] = d * u * (sigmoid + g * inner * sigmoid * (1.0 - sigmoid));
    }
    compare(y, want_y, "glu", n);
    compare(grad_gate, want_gate, "glu_backward's grad_gate", n);
    compare(grad_up, want_up, "glu_backward's grad_up", n);
}

template <class T>
void check_type() {
    for (const int64_t columns : {1, 15, 64, 201}) {
        check_rms_norm<T>(3, columns, 0.0f);
        check_rms_norm<T>(90, columns, 1.0f);
    }
    for (const int64_t D : {2, 14, 64}) {
        check_rope<T>(D, false);
        check_rope<T>(D, true);
    }
    for (const int64_t n : {1, 33, 9001}) {
        check_glu<T>(n, Activation::kSilu);
        check_glu<T>(n, Activation::kGeluTanh);
    }
}

}  // namespace

void check_model_parts() {
    check_type<float>();
    check_type<Bf16>();
    check_type<Fp16>();
}

}  // namespace checks
