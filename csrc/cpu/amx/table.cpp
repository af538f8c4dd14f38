// The kernels of amx_bf16: the linear ops on tiles, and all others from avx512_bf16. This is a function, because a
// table that copies entries of another table would depend on the order of static initialization.
#include "ops.h"

namespace qlora::QLORA_ISA {

const Kernels& kernels();

// lora.h calls this function in this namespace.
void dropout_bits(uint64_t seed, uint32_t threshold, int64_t numel, uint8_t* bits) {
    avx512_bf16::kKernels.dropout_bits(seed, threshold, numel, bits);
}

const Kernels& kernels() {
    static const Kernels table = [] {
        Kernels made = avx512_bf16::kKernels;
        made.linear_nf4 = linear_nf4;
        made.linear_nf4_grad_x = linear_nf4_grad_x;
        made.linear_nf4_lora = linear_nf4_lora;
        made.linear_nf4_lora_backward = linear_nf4_lora_backward;
        made.linear_nf4_lora_group = linear_nf4_lora_group;
        made.linear_nf4_lora_group_backward = linear_nf4_lora_group_backward;
        made.linear_cross_entropy = linear_cross_entropy;
        made.attention = attention;
        made.attention_backward = attention_backward;
        return made;
    }();
    return table;
}

}  // namespace qlora::QLORA_ISA
