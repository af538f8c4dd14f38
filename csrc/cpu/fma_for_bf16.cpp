// The kernels of avx512_bf16_fma: those of avx512_bf16, except that linear ops on many bf16 tokens use the fp32 FMAs of
// avx512, for processors whose vdpbf16ps has half their rate. Few tokens are bound by reading and decoding the weight,
// for which avx512_bf16 needs half the instructions.
//
// Both compute the product of the same rounded operands with fp32 sums.
#ifdef QLORA_X86_KERNELS

#include "kernels.h"

namespace qlora {

namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512_bf16 {
extern const Kernels kKernels;
}

namespace avx512_bf16_fma {
namespace {

// At 8 tokens, vdpbf16ps at half rate takes as long as decoding a weight; this is an estimate from instruction counts.
constexpr int64_t kFewTokens = 8;

// p: a LinearProblem, LinearGroup or CrossEntropyProblem.
template <class Problem>
const Kernels& table_for(const Problem& p) {
    return p.dtype == DType::kBfloat16 && p.M > kFewTokens ? avx512::kKernels : avx512_bf16::kKernels;
}

const Kernels& attention_table(const AttentionProblem& p) {
    return p.dtype == DType::kBfloat16 ? avx512::kKernels : avx512_bf16::kKernels;
}

}  // namespace

const Kernels& kernels();

const Kernels& kernels() {
    static const Kernels table = [] {
        Kernels made = avx512_bf16::kKernels;
        made.linear_nf4 = [](const LinearProblem& p, const void* x, AnyFloat bias, void* y) {
            table_for(p).linear_nf4(p, x, bias, y);
        };
        made.linear_nf4_grad_x = [](const LinearProblem& p, const void* grad_y, void* grad_x) {
            table_for(p).linear_nf4_grad_x(p, grad_y, grad_x);
        };
        made.linear_nf4_lora = [](const LinearProblem& p, const Lora& lora, const void* x, AnyFloat bias, void* y,
                                  void* s) { table_for(p).linear_nf4_lora(p, lora, x, bias, y, s); };
        made.linear_nf4_lora_backward = [](const LinearProblem& p, const Lora& lora, const void* grad_y, const void* x,
                                           const void* s, void* grad_x, float* grad_A, float* grad_B) {
            table_for(p).linear_nf4_lora_backward(p, lora, grad_y, x, s, grad_x, grad_A, grad_B);
        };
        made.linear_nf4_lora_group = [](const LinearGroup& group, const void* x, const AnyFloat* biases,
                                        void* const* ys,
                                        void* s) { table_for(group).linear_nf4_lora_group(group, x, biases, ys, s); };
        made.linear_nf4_lora_group_backward = [](const LinearGroup& group, const void* const* grad_ys, const void* x,
                                                 const void* s, void* grad_x, float* grad_A, float* const* grads_B) {
            table_for(group).linear_nf4_lora_group_backward(group, grad_ys, x, s, grad_x, grad_A, grads_B);
        };
        made.linear_cross_entropy = [](const CrossEntropyProblem& p, const void* hidden,
                                       const CrossEntropyResults& results) {
            table_for(p).linear_cross_entropy(p, hidden, results);
        };
        made.attention = [](const AttentionProblem& p, const AttentionOutputs& outputs) {
            attention_table(p).attention(p, outputs);
        };
        made.attention_backward = [](const AttentionProblem& p, const AttentionGradients& gradients) {
            attention_table(p).attention_backward(p, gradients);
        };
        return made;
    }();
    return table;
}

}  // namespace avx512_bf16_fma
}  // namespace qlora

#endif
