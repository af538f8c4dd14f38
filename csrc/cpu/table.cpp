// The table of one instruction set's kernels; compiled once per instruction set.
#include "ops.h"

namespace qlora::QLORA_ISA {

extern const Kernels kKernels;

const Kernels kKernels = {
    quantize_nf4,
    quantize_absmax,
    dequantize_nf4,
    linear_nf4,
    linear_nf4_grad_x,
    linear_nf4_lora,
    linear_nf4_lora_backward,
    linear_nf4_lora_group,
    linear_nf4_lora_group_backward,
    dropout_bits,
    adamw_step,
    linear_cross_entropy,
    rms_norm,
    add_residual,
    rms_norm_backward,
    rope,
    glu,
    glu_backward,
    attention,
    attention_backward,
};

}  // namespace qlora::QLORA_ISA
