// gated_mlp: x + down(f(gate(n)) * up(n)) with n = norm(x), or without norm and addition
// (qlora_kernels/ops/gated_mlp.py).
#include "cpu_block.h"

namespace qlora::bindings {
namespace {

constexpr char kOp[] = "gated_mlp", kBackwardOp[] = "gated_mlp_backward";

void check_width(const char* op, const LinearsOfInput& gate_up, const LinearsOfInput& down) {
    require(gate_up.N(0) == gate_up.N(1) && down.K() == gate_up.N(0), op, ": gate, up and down must have one size");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gated_mlp(
    Tensor x, OptionalTensor norm_weight, double eps, double weight_offset, Tensors packed, OptionalTensors absmax,
    OptionalTensors absmax_q, OptionalTensors absmax_scale, OptionalTensors absmax_offset, Sizes blocksizes, Sizes N,
    Sizes K, OptionalTensors biases, OptionalTensors lora_A, OptionalTensors lora_B, std::vector<double> scalings,
    std::string activation) {
    const CpuArguments arguments(kOp);
    const int64_t M = arguments.matrix(x, "x").rows;
    const Linears linears{packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksizes,
                          N,      K,      lora_A,   lora_B,       scalings};
    linears.check_count(arguments, kOp, 3);
    const DType dtype = arguments.float_type(x, "x");
    const LinearsOfInput gate_up(arguments, linears, 0, 2, dtype, M), down(arguments, linears, 2, 3, dtype, M);
    check_width(kOp, gate_up, down);
    const void* rows = arguments.floats(x, "x", arguments.product(M, gate_up.K(), "x"), dtype);
    const std::vector<AnyFloat> summands = biases_of(arguments, biases, N);

    const BlockNorm norm(arguments, x, norm_weight, weight_offset);
    const auto [n, scale] = norm.forward(eps);
    const auto [ys, s] = gate_up.forward(norm_weight ? n.const_data_ptr() : rows, summands.data(), x.scalar_type());
    Tensor h = empty({M, down.K()}, x.scalar_type());
    cpu_kernels().glu(activation_of(activation), dtype, h.numel(), ys[0].const_data_ptr(), ys[1].const_data_ptr(),
                      h.mutable_data_ptr());
    auto [y, s_h] = down.forward(h.const_data_ptr(), summands.data() + 2, x.scalar_type());
    norm.add_input(y[0]);
    return {y[0], n, scale, ys[0], ys[1], s, h, s_h};
}

std::tuple<Tensor, Tensor, Tensors, Tensors> gated_mlp_backward(
    Tensor grad_y, Tensor x, OptionalTensor norm_weight, double weight_offset, OptionalTensor n, OptionalTensor scale,
    Tensor gate, Tensor up, Tensor s, OptionalTensor h, Tensor s_h, Tensors packed, OptionalTensors absmax,
    OptionalTensors absmax_q, OptionalTensors absmax_scale, OptionalTensors absmax_offset, Sizes blocksizes, Sizes N,
    Sizes K, OptionalTensors lora_A, OptionalTensors lora_B, std::vector<double> scalings, std::string activation,
    bool need_grad_x, bool need_grad_weight, Sizes need_grads_A, Sizes need_grads_B) {
    const CpuArguments arguments(kBackwardOp);
    const int64_t M = arguments.matrix(x, "x").rows;
    const Linears linears{packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksizes,
                          N,      K,      lora_A,   lora_B,       scalings};
    linears.check_count(arguments, kBackwardOp, 3);
    require(need_grads_A.size() == 2 && need_grads_B.size() == 3, kBackwardOp, ": needs must be 2 and 3 flags");
    const DType dtype = arguments.float_type(x, "x");
    const LinearsOfInput gate_up(arguments, linears, 0, 2, dtype, M), down(arguments, linears, 2, 3, dtype, M);
    check_width(kBackwardOp, gate_up, down);
    const BlockNorm norm(arguments, x, norm_weight, weight_offset);
    norm.check_output(down.N(0));
    const auto floats = [&](const Tensor& tensor, const char* name, int64_t columns) {
        return arguments.floats(tensor, name, arguments.product(M, columns, name), dtype);
    };
    const int64_t width = down.K();
    const void* grad_rows = floats(grad_y, "grad_y", down.N(0));
    const void *gates = floats(gate, "gate", width), *ups = floats(up, "up", width);
    const void* rows = norm_weight ? floats(norm.kept(n, "n"), "n", gate_up.K()) : floats(x, "x", gate_up.K());
    require(down.R() == 0 || h.has_value(), kBackwardOp, ": h must be given where down has an adapter");
    const void* products = h ? floats(*h, "h", width) : nullptr;

    auto of_down = down.backward({grad_rows}, products, floats(s_h, "s_h", down.R()), x.scalar_type(), true,
                                 need_grads_A[1] != 0, need_grads_B.data() + 2);
    Tensor grad_gate = empty({M, width}, x.scalar_type());
    void* grad_up = of_down.x.mutable_data_ptr();  // overwrites the gradient of h
    cpu_kernels().glu_backward(activation_of(activation), dtype, grad_gate.numel(), grad_up, gates, ups,
                               grad_gate.mutable_data_ptr(), grad_up);
    const bool need_input = need_grad_x || need_grad_weight;
    auto of_input = gate_up.backward({grad_gate.const_data_ptr(), grad_up}, rows, floats(s, "s", gate_up.R()),
                                     x.scalar_type(), need_input, need_grads_A[0] != 0, need_grads_B.data());
    Tensor grad_weight = empty({0}, ScalarType::Float);
    if (need_input) grad_weight = norm.backward(arguments, grad_rows, scale, need_grad_weight, of_input.x);
    return {of_input.x, grad_weight, {of_input.A, of_down.A}, {of_input.B[0], of_input.B[1], of_down.B[0]}};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def(
        "cpu_gated_mlp(Tensor x, Tensor? norm_weight, float eps, float weight_offset, Tensor[] packed, "
        "Tensor?[] absmax, Tensor?[] absmax_q, Tensor?[] absmax_scale, Tensor?[] absmax_offset, int[] blocksizes, "
        "int[] out_features, int[] in_features, Tensor?[] biases, Tensor?[] lora_A, Tensor?[] lora_B, "
        "float[] scalings, str activation) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "cpu_gated_mlp_backward(Tensor grad_y, Tensor x, Tensor? norm_weight, float weight_offset, Tensor? n, "
        "Tensor? scale, Tensor gate, Tensor up, Tensor s, Tensor? h, Tensor s_h, Tensor[] packed, Tensor?[] absmax, "
        "Tensor?[] absmax_q, Tensor?[] absmax_scale, Tensor?[] absmax_offset, int[] blocksizes, int[] out_features, "
        "int[] in_features, Tensor?[] lora_A, Tensor?[] lora_B, float[] scalings, str activation, bool need_grad_x, "
        "bool need_grad_weight, int[] need_grads_A, int[] need_grads_B) -> (Tensor, Tensor, Tensor[], Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CPU, m) {
    m.impl("cpu_gated_mlp", TORCH_BOX(&gated_mlp));
    m.impl("cpu_gated_mlp_backward", TORCH_BOX(&gated_mlp_backward));
}

}  // namespace qlora::bindings
