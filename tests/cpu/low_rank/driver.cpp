// Compares linear_nf4_lora_group of one instruction set, and its gradients, with naive loops in bf16. The test that
// compiles this program plants faults in the kernels' sources. Exit code 1 if a result differs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "ops.h"
#include "qlora/parallel.h"

namespace qlora {

int num_threads() { return 1; }  // so that a task owns several strips

void run_tasks(int64_t tasks, TaskFunction run, const void* context) {
    for (int64_t task = 0; task < tasks; ++task) run(context, task);
}

}  // namespace qlora

namespace {

using namespace qlora;

// Several tiles of rows, several strips of columns, a strip that is not full, and an odd number of outputs.
constexpr int64_t M = 27, K = 96, kN[] = {70, 33}, kRanks[] = {4, 2}, R = 6;
constexpr int kBlockShift = 5;

int failures = 0;
std::mt19937 generator(1);

std::vector<Bf16> random_values(int64_t count) {
    std::normal_distribution<float> normal;
    std::vector<Bf16> values;
    for (int64_t i = 0; i < count; ++i) values.push_back(from_float<Bf16>(normal(generator)));
    return values;
}

std::vector<float> wide(const std::vector<Bf16>& values) {
    std::vector<float> result;
    for (const Bf16 value : values) result.push_back(to_float(value));
    return result;
}

template <class T>
void compare(const char* what, const std::vector<T>& got, const std::vector<double>& want) {
    double largest = 0, worst = 0;
    for (const double value : want) largest = std::max(largest, std::fabs(value));
    for (size_t i = 0; i < want.size(); ++i) {
        const double difference = std::fabs(double(to_float(got[i])) - want[i]);
        worst = difference <= worst ? worst : difference;  // also for NaN
    }
    if (worst <= 2e-2 * largest) return;
    ++failures;
    std::printf("%s differs by %g of %g\n", what, worst, largest);
}

void check(uint32_t threshold) {
    std::vector<uint8_t> packed[2];
    std::vector<float> absmax[2], A = wide(random_values(R * K)), B[2], w[2], grads_B[2];
    std::vector<Bf16> x = random_values(M * K), grad_y[2], y[2], s(M * R), grad_x(M * K);
    std::vector<float> grad_A(R * K), xd = wide(x);
    GroupMember members[2];
    const AnyFloat biases[2] = {};
    for (int i = 0; i < 2; ++i) {
        const int64_t N = kN[i], numel = N * K;
        packed[i].resize(size_t(numel / 2));
        for (uint8_t& byte : packed[i]) byte = uint8_t(generator());
        absmax[i].assign(size_t(numel >> kBlockShift), 0.5f);
        for (int64_t e = 0; e < numel; ++e) {
            const int q = e % 2 ? packed[i][e / 2] & 15 : packed[i][e / 2] >> 4;
            w[i].push_back(to_float(from_float<Bf16>(kCode[q] * 0.5f)));
        }
        B[i] = wide(random_values(N * kRanks[i]));
        grads_B[i].resize(size_t(N * kRanks[i]));
        grad_y[i] = random_values(M * N);
        y[i].resize(size_t(M * N));
        members[i].weight = {packed[i].data(), absmax[i].data(), nullptr, nullptr, nullptr, N, K, kBlockShift};
        members[i].lora = {{A.data() + (i ? kRanks[0] * K : 0), DType::kFloat32},
                           {B[i].data(), DType::kFloat32},
                           kRanks[i],
                           2.0f,
                           threshold,
                           7};
    }
    const LinearGroup group{members, 2, DType::kBfloat16, M, K, R};
    void* const ys[] = {y[0].data(), y[1].data()};
    const void* const grad_ys[] = {grad_y[0].data(), grad_y[1].data()};
    float* const of_B[] = {grads_B[0].data(), grads_B[1].data()};
    QLORA_ISA::linear_nf4_lora_group(group, x.data(), biases, ys, s.data());
    QLORA_ISA::linear_nf4_lora_group_backward(group, grad_ys, x.data(), s.data(), grad_x.data(), grad_A.data(), of_B);

    std::vector<uint8_t> bits(size_t(M * K / 8 + 8), 0xff);
    if (threshold) QLORA_ISA::dropout_bits(7, threshold, M * K, bits.data());
    const double keep = 65536.0 / (65536 - threshold);
    const auto mask = [&](int64_t e) { return threshold ? (bits[e / 8] >> (e % 8) & 1) * keep : 1.0; };
    std::vector<double> want_s(M * R), want_x(M * K), want_A(R * K);
    for (int64_t m = 0; m < M; ++m) {
        for (int64_t j = 0; j < R; ++j) {
            for (int64_t k = 0; k < K; ++k) want_s[m * R + j] += mask(m * K + k) * xd[m * K + k] * A[j * K + k];
        }
    }
    compare("s", s, want_s);
    for (int64_t i = 0, rank = 0; i < 2; rank += kRanks[i++]) {
        const int64_t N = kN[i], r = kRanks[i];
        std::vector<double> want_y(M * N), want_B(N * r), ds(M * r);
        const std::vector<float> g = wide(grad_y[i]);
        for (int64_t m = 0; m < M; ++m) {
            for (int64_t n = 0; n < N; ++n) {
                double sum = 0;
                for (int64_t k = 0; k < K; ++k) sum += double(xd[m * K + k]) * w[i][n * K + k];
                for (int64_t j = 0; j < r; ++j) {
                    const double of_s = to_float(s[m * R + rank + j]);
                    sum += 2.0 * of_s * B[i][n * r + j];
                    want_B[n * r + j] += 2.0 * g[m * N + n] * of_s;
                    ds[m * r + j] += 2.0 * g[m * N + n] * B[i][n * r + j];
                }
                want_y[m * N + n] = sum;
            }
            for (int64_t k = 0; k < K; ++k) {
                double sum = 0, low_rank = 0;
                for (int64_t n = 0; n < N; ++n) sum += double(g[m * N + n]) * w[i][n * K + k];
                for (int64_t j = 0; j < r; ++j) {
                    low_rank += ds[m * r + j] * A[(rank + j) * K + k];
                    want_A[(rank + j) * K + k] += ds[m * r + j] * mask(m * K + k) * xd[m * K + k];
                }
                want_x[m * K + k] += sum + mask(m * K + k) * low_rank;
            }
        }
        compare("y", y[i], want_y);
        compare("grad_B", grads_B[i], want_B);
    }
    compare("grad_A", grad_A, want_A);
    compare("grad_x", grad_x, want_x);
}

}  // namespace

int main() {
    check(0);
    check(20000);
    return failures != 0;
}
