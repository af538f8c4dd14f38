// Compares the CPU kernels on ragged shapes with naive loops, in a separate program for sanitizers and emulators of
// other CPUs. Every buffer is a heap block of its exact size, so that any access outside it is an error. Usage: driver
// ISA [CALLERS], where CALLERS threads call the kernels at the same time.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "block_absmax.h"
#include "checks.h"
#include "kernels.h"
#include "qlora/cpu_isa.h"
#include "qlora/parallel.h"

namespace qlora {

int num_threads() { return 3; }

void run_tasks(int64_t tasks, TaskFunction run, const void* context) {
    std::atomic<int64_t> next{0};
    std::vector<std::thread> threads;
    for (int i = 0; i < num_threads(); ++i) {
        threads.emplace_back([&] {
            for (int64_t task = next.fetch_add(1); task < tasks; task = next.fetch_add(1)) run(context, task);
        });
    }
    for (std::thread& thread : threads) thread.join();
}

}  // namespace qlora

namespace checks {

std::atomic<int> failures{0};

void expect(bool ok, const char* what, const char* where) {
    if (ok) return;
    ++failures;
    std::printf("%s differs %s\n", what, where);
}

}  // namespace checks

namespace {

using checks::normal;
using checks::rounded;
using qlora::AnyFloat;
using qlora::DType;

struct Shape {
    int64_t M, N, K, r;
    int block_shift;
};

void expect(bool ok, const char* what, const Shape& s) {
    char where[100];
    std::snprintf(where, sizeof where, "at M%ld N%ld K%ld r%ld shift %d", long(s.M), long(s.N), long(s.K), long(s.r),
                  s.block_shift);
    checks::expect(ok, what, where);
}

constexpr Shape kShapes[] = {{1, 1, 1, 1, 5},     {1, 5, 64, 1, 6},   {7, 33, 96, 3, 6},     {13, 17, 31, 16, 5},
                             {8, 64, 128, 4, 6},  {4, 40, 192, 2, 5}, {27, 130, 257, 20, 7}, {2, 3, 4099, 2, 12},
                             {10, 9, 2112, 2, 6}, {21, 43, 192, 5, 6}};

template <class T>
std::vector<double> exact(const std::vector<T>& values) {
    std::vector<double> result(values.size());
    std::transform(values.begin(), values.end(), result.begin(), [](T v) { return double(qlora::to_float(v)); });
    return result;
}

// c[i, j] = sum_l a(i, l) * b(l, j)
template <class A, class B>
std::vector<double> product(int64_t rows, int64_t columns, int64_t length, const A& a, const B& b) {
    std::vector<double> c(static_cast<size_t>(rows * columns));
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t l = 0; l < length; ++l) {
            for (int64_t j = 0; j < columns; ++j) c[i * columns + j] += a(i, l) * b(l, j);
        }
    }
    return c;
}

bool near(const std::vector<double>& got, const std::vector<double>& want, double tolerance) {
    double largest = 1e-3;
    for (const double w : want) largest = std::max(largest, std::fabs(w));
    for (size_t i = 0; i < want.size(); ++i) {
        if (!(std::fabs(got[i] - want[i]) <= tolerance * largest)) return false;
    }
    return true;
}

template <class T>
void check(const Shape& s, DType dtype, double tolerance, uint32_t threshold) {
    const qlora::Kernels& kernels = qlora::cpu_kernels();
    const int64_t numel = s.N * s.K, M = s.M, N = s.N, K = s.K, r = s.r;
    const int64_t blocks = (numel + (int64_t{1} << s.block_shift) - 1) >> s.block_shift;
    const std::vector<T> w = rounded<T>(normal(numel, 1));
    std::vector<uint8_t> packed(static_cast<size_t>((numel + 1) / 2)), absmax_q(static_cast<size_t>(blocks));
    std::vector<float> absmax(static_cast<size_t>(blocks)), scale(static_cast<size_t>((blocks + 255) / 256));
    kernels.quantize_nf4(w.data(), dtype, numel, s.block_shift, packed.data(), absmax.data());
    const float offset = absmax[0] * 0.9f;
    kernels.quantize_absmax(absmax.data(), blocks, offset, absmax_q.data(), scale.data());

    const qlora::NF4Weight weight{packed.data(), nullptr, absmax_q.data(), scale.data(), &offset, N, K, s.block_shift};
    std::vector<T> decoded(static_cast<size_t>(numel));
    kernels.dequantize_nf4(weight, dtype, decoded.data());
    bool same = true;
    for (int64_t i = 0; i < numel; ++i) {
        const int q = i % 2 ? packed[i / 2] & 0xf : packed[i / 2] >> 4;
        const T want = qlora::from_float<T>(qlora::kCode[q] * qlora::block_absmax(weight, i >> s.block_shift));
        same = same && memcmp(&want, &decoded[i], sizeof want) == 0;
    }
    expect(same, "dequantize_nf4", s);

    const std::vector<double> wd = exact(decoded);
    const std::vector<T> x = rounded<T>(normal(M * K, 2)), g = rounded<T>(normal(M * N, 3));
    const std::vector<float> a = normal(r * K, 4), b = normal(N * r, 5), bias = normal(N, 6);
    const std::vector<double> xd = exact(x), gd = exact(g), ad = exact(rounded<T>(a)), bd = exact(rounded<T>(b));
    const AnyFloat any_bias{bias.data(), DType::kFloat32};
    const qlora::LinearProblem problem{weight, dtype, M};
    std::vector<T> y(static_cast<size_t>(M * N)), grad_x(static_cast<size_t>(M * K)), low(static_cast<size_t>(M * r));
    kernels.linear_nf4(problem, x.data(), any_bias, y.data());
    std::vector<double> want = product(
        M, N, K, [&](int64_t m, int64_t k) { return xd[m * K + k]; },
        [&](int64_t k, int64_t n) { return wd[n * K + k]; });
    for (int64_t i = 0; i < M * N; ++i) want[i] += bias[i % N];
    expect(near(exact(y), want, tolerance), "linear_nf4", s);
    kernels.linear_nf4_grad_x(problem, g.data(), grad_x.data());
    const std::vector<double> want_x = product(
        M, K, N, [&](int64_t m, int64_t n) { return gd[m * N + n]; },
        [&](int64_t n, int64_t k) { return wd[n * K + k]; });
    expect(near(exact(grad_x), want_x, tolerance), "linear_nf4_grad_x", s);

    const qlora::Lora lora{{a.data(), DType::kFloat32}, {b.data(), DType::kFloat32}, r, 0.5f, threshold, 77};
    std::vector<uint8_t> bits(static_cast<size_t>((M * K + 7) / 8));
    kernels.dropout_bits(lora.seed, threshold, M * K, bits.data());
    const double keep = 65536.0 / (65536 - threshold);
    const auto mask = [&](int64_t i) { return threshold == 0 ? 1.0 : (bits[i / 8] >> (i % 8) & 1) * keep; };
    kernels.linear_nf4_lora(problem, lora, x.data(), any_bias, y.data(), low.data());
    const std::vector<double> sd = exact(low);
    const std::vector<double> want_s = product(
        M, r, K, [&](int64_t m, int64_t k) { return mask(m * K + k) * xd[m * K + k]; },
        [&](int64_t k, int64_t j) { return ad[j * K + k]; });
    expect(near(sd, want_s, tolerance), "linear_nf4_lora's s", s);
    const std::vector<double> update = product(
        M, N, r, [&](int64_t m, int64_t j) { return sd[m * r + j]; },
        [&](int64_t j, int64_t n) { return bd[n * r + j]; });
    for (int64_t i = 0; i < M * N; ++i) want[i] += 0.5 * update[i];
    expect(near(exact(y), want, tolerance), "linear_nf4_lora", s);

    std::vector<float> grad_A(static_cast<size_t>(r * K)), grad_B(static_cast<size_t>(N * r));
    kernels.linear_nf4_lora_backward(problem, lora, g.data(), x.data(), low.data(), grad_x.data(), grad_A.data(),
                                     grad_B.data());
    const std::vector<double> ds = product(
        M, r, N, [&](int64_t m, int64_t n) { return 0.5 * gd[m * N + n]; },
        [&](int64_t n, int64_t j) { return bd[n * r + j]; });
    const std::vector<double> want_A = product(
        r, K, M, [&](int64_t j, int64_t m) { return ds[m * r + j]; },
        [&](int64_t m, int64_t k) { return mask(m * K + k) * xd[m * K + k]; });
    const std::vector<double> want_B = product(
        N, r, M, [&](int64_t n, int64_t m) { return 0.5 * gd[m * N + n]; },
        [&](int64_t m, int64_t j) { return sd[m * r + j]; });
    std::vector<double> through = product(
        M, K, r, [&](int64_t m, int64_t j) { return ds[m * r + j]; },
        [&](int64_t j, int64_t k) { return ad[j * K + k]; });
    for (int64_t i = 0; i < M * K; ++i) through[i] = through[i] * mask(i) + want_x[i];
    expect(near(exact(grad_A), want_A, tolerance), "grad_A", s);
    expect(near(exact(grad_B), want_B, tolerance), "grad_B", s);
    expect(near(exact(grad_x), through, tolerance), "linear_nf4_lora_backward's grad_x", s);
}

void check_linears_and_codec() {
    for (const Shape& shape : kShapes) {
        for (const uint32_t threshold : {0u, 20000u}) {
            check<float>(shape, DType::kFloat32, 1e-5, threshold);
            check<qlora::Bf16>(shape, DType::kBfloat16, 3e-2, threshold);
            check<qlora::Fp16>(shape, DType::kFloat16, 4e-3, threshold);
        }
    }
    checks::check_linear_groups();
    checks::check_codec();
    checks::check_dropout();
    checks::check_cross_entropy();
    checks::check_model_parts();
    checks::check_attention();
}

}  // namespace

int main(int argc, char** argv) {
    qlora::force_cpu_isa(argc > 1 ? argv[1] : nullptr);
    std::vector<std::thread> callers(argc > 2 ? static_cast<size_t>(std::atoi(argv[2])) : 1);
    for (std::thread& caller : callers) caller = std::thread(check_linears_and_codec);
    for (std::thread& caller : callers) caller.join();
    checks::check_adamw();  // it changes the instruction set of the whole process
    std::printf("%s: %d failures\n", qlora::isa_name(qlora::cpu_isa()), checks::failures.load());
    return checks::failures != 0;
}
