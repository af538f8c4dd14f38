// linear_nf4_lora_group and its gradients against the kernels of single linears, which driver.cpp compares with loops.
#include <cmath>
#include <cstdio>
#include <utility>

#include "checks.h"
#include "kernels.h"

namespace checks {
namespace {

using qlora::AnyFloat;
using qlora::DType;

struct MemberShape {
    int64_t N, r;
    int block_shift;
};

// Odd ranks, a member without an adapter, strips that are not full, and numbers of rows of both parities.
constexpr MemberShape kMembers[] = {{33, 3, 6}, {17, 0, 5}, {40, 16, 6}, {64, 2, 5}};
constexpr int kCount = 4;

struct Quantized {
    std::vector<uint8_t> packed;
    std::vector<float> absmax;
};

template <class T>
bool near(const T* got, const std::vector<double>& want, double tolerance) {
    double largest = 1e-3;
    for (const double w : want) largest = std::max(largest, std::fabs(w));
    for (size_t i = 0; i < want.size(); ++i) {
        if (!(std::fabs(double(qlora::to_float(got[i])) - want[i]) <= tolerance * largest)) return false;
    }
    return true;
}

template <class T>
std::vector<double> exact(const std::vector<T>& values) {
    std::vector<double> result;
    for (const T& value : values) result.push_back(double(qlora::to_float(value)));
    return result;
}

template <class T>
void check(int64_t M, int64_t K, DType dtype, double tolerance, uint32_t threshold) {
    const qlora::Kernels& kernels = qlora::cpu_kernels();
    char where[80];
    std::snprintf(where, sizeof where, "at M%ld K%ld dtype %d threshold %u", long(M), long(K), int(dtype), threshold);
    int64_t R = 0;
    for (const MemberShape& member : kMembers) R += member.r;
    const std::vector<T> x = rounded<T>(normal(M * K, 2));
    const std::vector<float> lora_A = normal(R * K, 4);
    Quantized weights[kCount];
    std::vector<float> lora_B[kCount], biases[kCount], grads_B[kCount];
    std::vector<T> grad_ys[kCount], ys[kCount];
    qlora::GroupMember members[kCount];
    AnyFloat summands[kCount];
    void* outputs[kCount];
    const void* gradients[kCount];
    float* of_B[kCount];
    int64_t rank = 0;
    for (int i = 0; i < kCount; ++i) {
        const auto [N, r, shift] = kMembers[i];
        const int64_t numel = N * K, blocks = (numel + (int64_t{1} << shift) - 1) >> shift;
        const std::vector<T> w = rounded<T>(normal(numel, unsigned(10 + i)));
        weights[i].packed.resize(size_t((numel + 1) / 2));
        weights[i].absmax.resize(size_t(blocks));
        kernels.quantize_nf4(w.data(), dtype, numel, shift, weights[i].packed.data(), weights[i].absmax.data());
        lora_B[i] = normal(N * r, unsigned(20 + i));
        biases[i] = normal(N, unsigned(30 + i));
        grads_B[i].resize(size_t(N * r));
        grad_ys[i] = rounded<T>(normal(M * N, unsigned(40 + i)));
        ys[i].resize(size_t(M * N));
        members[i].weight = {
            weights[i].packed.data(), weights[i].absmax.data(), nullptr, nullptr, nullptr, N, K, shift};
        members[i].lora = {{lora_A.data() + rank * K, DType::kFloat32},
                           {lora_B[i].data(), DType::kFloat32},
                           r,
                           0.5f + float(i),
                           threshold,
                           77};
        summands[i] = i == 2 ? AnyFloat{nullptr, DType::kFloat32} : AnyFloat{biases[i].data(), DType::kFloat32};
        outputs[i] = ys[i].data();
        gradients[i] = grad_ys[i].data();
        of_B[i] = grads_B[i].data();
        rank += r;
    }
    std::vector<T> s(size_t(M * R)), grad_x(size_t(M * K));
    std::vector<float> grad_A(size_t(R * K));
    const qlora::LinearGroup group{members, kCount, dtype, M, K, R};
    kernels.linear_nf4_lora_group(group, x.data(), summands, outputs, s.data());
    kernels.linear_nf4_lora_group_backward(group, gradients, x.data(), s.data(), grad_x.data(), grad_A.data(), of_B);

    std::vector<double> want_x(size_t(M * K));
    rank = 0;
    for (int i = 0; i < kCount; ++i) {
        const auto [N, r, shift] = kMembers[i];
        const qlora::LinearProblem problem{members[i].weight, dtype, M};
        std::vector<T> y(size_t(M * N)), own_s(size_t(M * r)), own_x(size_t(M * K)), columns;
        std::vector<float> own_A(size_t(r * K)), own_B(size_t(N * r));
        if (r == 0) {
            kernels.linear_nf4(problem, x.data(), summands[i], y.data());
            kernels.linear_nf4_grad_x(problem, grad_ys[i].data(), own_x.data());
        } else {
            const qlora::Lora& lora = members[i].lora;
            kernels.linear_nf4_lora(problem, lora, x.data(), summands[i], y.data(), own_s.data());
            kernels.linear_nf4_lora_backward(problem, lora, grad_ys[i].data(), x.data(), own_s.data(), own_x.data(),
                                             own_A.data(), own_B.data());
        }
        for (int64_t m = 0; m < M; ++m) {
            for (int64_t j = 0; j < r; ++j) columns.push_back(s[size_t(m * R + rank + j)]);
        }
        expect(near(ys[i].data(), exact(y), tolerance), "a group's y", where);
        expect(near(columns.data(), exact(own_s), tolerance), "a group's s", where);
        expect(near(grad_A.data() + rank * K, exact(own_A), tolerance), "a group's grad_A", where);
        expect(near(grads_B[i].data(), exact(own_B), tolerance), "a group's grad_B", where);
        for (size_t k = 0; k < want_x.size(); ++k) want_x[k] += double(qlora::to_float(own_x[k]));
        rank += r;
    }
    expect(near(grad_x.data(), want_x, tolerance), "a group's grad_x", where);
    kernels.linear_nf4_lora_group_backward(group, gradients, x.data(), s.data(), nullptr, grad_A.data(), of_B);
}

}  // namespace

void check_linear_groups() {
    for (const auto& [M, K] : {std::pair<int64_t, int64_t>{1, 64}, {8, 128}, {9, 70}, {27, 257}}) {
        for (const uint32_t threshold : {0u, 20000u}) {
            check<float>(M, K, DType::kFloat32, 1e-5, threshold);
            check<qlora::Bf16>(M, K, DType::kBfloat16, 3e-2, threshold);
            check<qlora::Fp16>(M, K, DType::kFloat16, 4e-3, threshold);
        }
    }
}

}  // namespace checks
