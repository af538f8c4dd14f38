// Attention and its gradients compared with double precision; every buffer is a heap block of its exact size.
#include <cmath>
#include <cstdio>

#include "checks.h"
#include "kernels.h"

namespace checks {
namespace {

using qlora::DType;

struct Shape {
    int64_t B, H, KV, Tq, Tk, D;
    bool causal;
};

template <class T>
double difference(const std::vector<T>& got, const std::vector<double>& want) {
    double worst = 0, largest = 1e-3;
    for (const double w : want) largest = std::fmax(largest, std::fabs(w));
    for (size_t i = 0; i < want.size(); ++i) {
        worst = std::fmax(worst, std::fabs(double(qlora::to_float(got[i])) - want[i]) / largest);
        if (!(qlora::to_float(got[i]) == qlora::to_float(got[i]))) return INFINITY;
    }
    return worst;
}

template <class T>
void check(const Shape& s, DType dtype, float softcap, double tolerance) {
    const int64_t of_q = s.B * s.H * s.Tq * s.D, of_k = s.B * s.KV * s.Tk * s.D;
    const std::vector<T> q = rounded<T>(normal(of_q, 1)), k = rounded<T>(normal(of_k, 2));
    const std::vector<T> v = rounded<T>(normal(of_k, 3)), g = rounded<T>(normal(of_q, 4));
    std::vector<int64_t> starts(static_cast<size_t>(s.B * s.Tq)), ends(starts);
    for (int64_t i = 0; i < s.B * s.Tq; ++i) {
        const int64_t t = i % s.Tq;
        starts[i] = s.causal ? t / 40 * 40 : 0;
        ends[i] = s.causal ? t + 1 : s.Tk;
        if (t % 13 == 12) starts[i] = ends[i] = 0;
    }
    const float scale = 0.4f;
    const auto view = [&](const std::vector<T>& data, int64_t heads, int64_t length) {
        return qlora::HeadsView{data.data(), length * heads * s.D, s.D, heads * s.D};
    };
    const qlora::AttentionProblem problem{s.B,
                                          s.H,
                                          s.KV,
                                          s.Tq,
                                          s.Tk,
                                          s.D,
                                          dtype,
                                          scale,
                                          softcap,
                                          starts.data(),
                                          ends.data(),
                                          view(q, s.H, s.Tq),
                                          view(k, s.KV, s.Tk),
                                          view(v, s.KV, s.Tk)};
    std::vector<T> out(q.size()), grad_q(q.size()), grad_k(k.size()), grad_v(k.size());
    std::vector<float> log_sums(static_cast<size_t>(s.B * s.H * s.Tq));
    qlora::cpu_kernels().attention(problem, {out.data(), log_sums.data()});
    qlora::cpu_kernels().attention_backward(
        problem, {out.data(), log_sums.data(), view(g, s.H, s.Tq), grad_q.data(), grad_k.data(), grad_v.data()});

    const auto at = [&](const std::vector<T>& data, int64_t heads, int64_t length, int64_t b, int64_t t, int64_t head) {
        return data.data() + ((b * length + t) * heads + head) * s.D;
    };
    const auto dot = [&](const T* a, const T* b) {
        double sum = 0;
        for (int64_t d = 0; d < s.D; ++d) sum += double(qlora::to_float(a[d])) * qlora::to_float(b[d]);
        return sum;
    };
    std::vector<double> want_out(q.size()), want_q(q.size()), want_k(k.size()), want_v(k.size());
    for (int64_t row = 0; row < s.B * s.H * s.Tq; ++row) {
        const int64_t b = row / (s.H * s.Tq), h = row / s.Tq % s.H, t = row % s.Tq, kv = h / (s.H / s.KV);
        const int64_t first = starts[b * s.Tq + t], last = ends[b * s.Tq + t];
        const int64_t q_at = ((b * s.Tq + t) * s.H + h) * s.D;
        std::vector<double> z(static_cast<size_t>(s.Tk)), p(z), dp(z);
        double total = 0, delta = 0;
        for (int64_t j = first; j < last; ++j) {
            z[j] = scale * dot(at(q, s.H, s.Tq, b, t, h), at(k, s.KV, s.Tk, b, j, kv));
            if (softcap > 0) z[j] = softcap * std::tanh(z[j] / softcap);
            total += std::exp(z[j]);
        }
        for (int64_t j = first; j < last; ++j) {
            p[j] = std::exp(z[j]) / total;
            dp[j] = dot(at(g, s.H, s.Tq, b, t, h), at(v, s.KV, s.Tk, b, j, kv));
            delta += p[j] * dp[j];
        }
        for (int64_t j = first; j < last; ++j) {
            const double slope = softcap > 0 ? 1 - std::pow(z[j] / softcap, 2) : 1.0;
            const double ds = p[j] * (dp[j] - delta) * slope * scale;
            const int64_t k_at = ((b * s.Tk + j) * s.KV + kv) * s.D;
            for (int64_t d = 0; d < s.D; ++d) {
                want_out[q_at + d] += p[j] * qlora::to_float(v[k_at + d]);
                want_q[q_at + d] += ds * qlora::to_float(k[k_at + d]);
                want_k[k_at + d] += ds * qlora::to_float(q[q_at + d]);
                want_v[k_at + d] += p[j] * qlora::to_float(g[q_at + d]);
            }
        }
    }
    const double worst = std::fmax(std::fmax(difference(out, want_out), difference(grad_q, want_q)),
                                   std::fmax(difference(grad_k, want_k), difference(grad_v, want_v)));
    char where[100];
    std::snprintf(where, sizeof where, "at Tq%ld Tk%ld D%ld, by %g", long(s.Tq), long(s.Tk), long(s.D), worst);
    expect(worst <= tolerance, "attention", where);
}

}  // namespace

void check_attention() {
    constexpr Shape kShapes[] = {{1, 1, 1, 1, 1, 1, true},
                                 {2, 4, 2, 37, 37, 24, true},
                                 {1, 3, 1, 130, 130, 80, true},
                                 {1, 2, 2, 5, 101, 7, false},
                                 {1, 2, 1, 100, 3, 40, false}};
    for (const Shape& shape : kShapes) {
        for (const float softcap : {0.0f, 3.0f}) {
            check<float>(shape, DType::kFloat32, softcap, 1e-5);
            check<qlora::Bf16>(shape, DType::kBfloat16, softcap, 3e-2);
            check<qlora::Fp16>(shape, DType::kFloat16, softcap, 4e-3);
        }
    }
}

}  // namespace checks
