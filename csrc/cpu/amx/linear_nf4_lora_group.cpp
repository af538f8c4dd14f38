// linear_nf4_lora_group and its gradients on AMX tiles, for bf16: the kernels of single linears, one member after the
// other. Each of them packs x into tiles again; grad_x is rounded once for each member.
#include "low_rank.h"
#include "ops.h"

namespace qlora::QLORA_ISA {
namespace {

bool runs_on_tiles(const LinearGroup& group) { return group.dtype == DType::kBfloat16 && group.M > 1; }

// Copies M rows of r elements between matrices of different row lengths.
void copy_rows(const Bf16* from, int64_t from_length, int64_t M, int64_t r, Bf16* to, int64_t to_length) {
    for (int64_t m = 0; m < M; ++m) memcpy(to + m * to_length, from + m * from_length, static_cast<size_t>(r) * 2);
}

// sum[i] += term[i]
void add_all(const Bf16* term, int64_t size, Bf16* sum) {
    parallel_ranges(size, 4096, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; i += kLanes) {
            const int n = static_cast<int>(end - i < kLanes ? end - i : kLanes);
            store_n(sum + i, add(load_n(sum + i, n), load_n(term + i, n)), n);
        }
    });
}

}  // namespace

void linear_nf4_lora_group(const LinearGroup& group, const void* x, const AnyFloat* biases, void* const* ys, void* s) {
    if (!runs_on_tiles(group)) return avx512_bf16::kKernels.linear_nf4_lora_group(group, x, biases, ys, s);
    const int64_t M = group.M, R = group.R;
    Bf16* columns = static_cast<Bf16*>(s);
    for (int64_t i = 0; i < group.count; ++i) {
        const auto& [weight, lora] = group.members[i];
        const LinearProblem p{weight, group.dtype, M};
        if (lora.r == 0) {
            linear_nf4(p, x, biases[i], ys[i]);
            continue;
        }
        Array<Bf16> own(M * lora.r);
        linear_nf4_lora(p, lora, x, biases[i], ys[i], own.data());
        copy_rows(own.data(), lora.r, M, lora.r, columns, R);
        columns += lora.r;
    }
}

void linear_nf4_lora_group_backward(const LinearGroup& group, const void* const* grad_ys, const void* x, const void* s,
                                    void* grad_x, float* grad_A, float* const* grads_B) {
    if (!runs_on_tiles(group)) {
        return avx512_bf16::kKernels.linear_nf4_lora_group_backward(group, grad_ys, x, s, grad_x, grad_A, grads_B);
    }
    const int64_t M = group.M, K = group.K, R = group.R;
    const Bf16* columns = static_cast<const Bf16*>(s);
    Array<Bf16> term(grad_x && group.count > 1 ? M * K : 0);
    for (int64_t i = 0; i < group.count; ++i) {
        const auto& [weight, lora] = group.members[i];
        const LinearProblem p{weight, group.dtype, M};
        void* own_grad_x = !grad_x ? nullptr : i == 0 ? grad_x : term.data();
        if (lora.r > 0) {
            Array<Bf16> own(M * lora.r);
            copy_rows(columns, R, M, lora.r, own.data(), lora.r);
            linear_nf4_lora_backward(p, lora, grad_ys[i], x, own.data(), own_grad_x, grad_A, grads_B[i]);
            columns += lora.r;
            if (grad_A) grad_A += lora.r * K;
        } else if (grad_x) {
            linear_nf4_grad_x(p, grad_ys[i], own_grad_x);
        }
        if (grad_x && i > 0) add_all(term.data(), M * K, static_cast<Bf16*>(grad_x));
    }
}

}  // namespace qlora::QLORA_ISA
