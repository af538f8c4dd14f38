// lora_attention: x + o(attention(rope(q(n)), rope(k(n)), v(n))) with n = norm(x), or without norm and addition
// (qlora_kernels/ops/lora_attention.py).
#include <cmath>

#include "cpu_block.h"

namespace qlora::bindings {
namespace {

constexpr char kOp[] = "lora_attention", kBackwardOp[] = "lora_attention_backward";

// The projections q, k, v and o of a module, and the sizes of its heads.
class Module {
  public:
    Module(const CpuArguments& arguments, const char* op, const Tensor& x, const Linears& linears, int64_t length,
           int64_t head_dim)
        : M_(checked_rows(arguments, op, x, linears)),
          dtype_(arguments.float_type(x, "x")),
          T_(length),
          D_(head_dim),
          qkv_(arguments, linears, 0, 3, dtype_, M_),
          o_(arguments, linears, 3, 4, dtype_, M_) {
        require(T_ > 0 && M_ % T_ == 0, op, ": x must have whole sequences of ", T_, " rows, got ", M_);
        require(D_ > 0 && D_ % 2 == 0 && qkv_.N(0) % D_ == 0 && qkv_.N(1) % D_ == 0 && qkv_.N(0) % qkv_.N(1) == 0 &&
                    qkv_.N(1) == qkv_.N(2) && o_.K() == qkv_.N(0),
                op, ": q, k, v and o must have whole heads of an even size, and q a multiple of k's heads");
    }

    int64_t M() const { return M_; }
    int64_t B() const { return M_ / T_; }
    int64_t T() const { return T_; }
    int64_t D() const { return D_; }
    int64_t heads(size_t i) const { return qkv_.N(i) / D_; }
    DType dtype() const { return dtype_; }
    const LinearsOfInput& qkv() const { return qkv_; }
    const LinearsOfInput& o() const { return o_; }

    // Rotates [M, N] as heads of q and k in place.
    void rotate(const CpuArguments& arguments, const Tensor& cos, const Tensor& sin, bool inverse, void* q,
                void* k) const {
        Rope p{};
        p.dtype = dtype_;
        p.B = B(), p.T = T_, p.D = D_;
        require(cos.dim() == 3, "rope: cos must have three dimensions, got ", cos.dim());
        const int64_t table = arguments.product(T_, D_, "cos"), tables = cos.size(0);
        require(tables == 1 || tables == B(), "rope: cos must have one table or one for each of ", B(), ", got ",
                tables);
        p.table_stride = tables == 1 ? 0 : table;
        p.cos = arguments.floats(cos, "cos", tables * table, dtype_);
        p.sin = arguments.floats(sin, "sin", tables * table, dtype_);
        p.inverse = inverse;
        void* rows[2] = {q, k};
        for (size_t i = 0; i < 2; ++i) {
            const int64_t N = qkv_.N(i);
            p.operands[i] = {rows[i], rows[i], N / D_, {T_ * N, D_, N}, {T_ * N, D_, N}};
        }
        cpu_kernels().rope(p);
    }

    HeadsView view(const void* rows, size_t i) const {
        const int64_t N = qkv_.N(i);
        return {rows, T_ * N, D_, N};
    }

    AttentionProblem problem(const CpuArguments& arguments, const char* op, const Tensor& starts, const Tensor& ends,
                             double scale, double softcap, const void* q, const void* k, const void* v) const {
        AttentionProblem p{};
        p.B = B(), p.H = heads(0), p.KV = heads(1), p.Tq = p.Tk = T_, p.D = D_;
        p.dtype = dtype_;
        p.q = view(q, 0), p.k = view(k, 1), p.v = view(v, 2);
        p.starts = arguments.data<int64_t>(starts, "starts", M_);
        p.ends = arguments.data<int64_t>(ends, "ends", M_);
        for (int64_t i = 0; i < M_; ++i) {
            require(p.starts[i] >= 0 && p.ends[i] <= T_, op, ": starts and ends must lie in [0, ", T_, "], got ",
                    p.starts[i], " and ", p.ends[i]);
        }
        require(std::isfinite(scale) && std::isfinite(softcap) && softcap >= 0.0, op,
                ": scale and softcap must be finite and softcap not negative, got ", scale, " and ", softcap);
        p.scale = static_cast<float>(scale), p.softcap = static_cast<float>(softcap);
        return p;
    }

  private:
    static int64_t checked_rows(const CpuArguments& arguments, const char* op, const Tensor& x,
                                const Linears& linears) {
        linears.check_count(arguments, op, 4);
        return arguments.matrix(x, "x").rows;
    }

    int64_t M_;
    DType dtype_;
    int64_t T_, D_;
    LinearsOfInput qkv_, o_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lora_attention(
    Tensor x, OptionalTensor norm_weight, double eps, double weight_offset, Tensors packed, OptionalTensors absmax,
    OptionalTensors absmax_q, OptionalTensors absmax_scale, OptionalTensors absmax_offset, Sizes blocksizes, Sizes N,
    Sizes K, OptionalTensors biases, OptionalTensors lora_A, OptionalTensors lora_B, std::vector<double> scalings,
    int64_t length, int64_t head_dim, Tensor cos, Tensor sin, Tensor starts, Tensor ends, double scale,
    double softcap) {
    const CpuArguments arguments(kOp);
    const Linears linears{packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksizes,
                          N,      K,      lora_A,   lora_B,       scalings};
    const Module module(arguments, kOp, x, linears, length, head_dim);
    const ScalarType type = x.scalar_type();
    const int64_t M = module.M(), K_x = module.qkv().K();
    const void* rows = arguments.floats(x, "x", arguments.product(M, K_x, "x"), module.dtype());
    const std::vector<AnyFloat> summands = biases_of(arguments, biases, N);

    const BlockNorm norm(arguments, x, norm_weight, weight_offset);
    const auto [n, inverse_rms] = norm.forward(eps);
    auto [qkv, s] = module.qkv().forward(norm_weight ? n.const_data_ptr() : rows, summands.data(), type);
    module.rotate(arguments, cos, sin, false, qkv[0].mutable_data_ptr(), qkv[1].mutable_data_ptr());
    Tensor out = empty({M, module.o().K()}, type);
    Tensor log_sums = empty({module.B(), module.heads(0), module.T()}, ScalarType::Float);
    cpu_kernels().attention(module.problem(arguments, kOp, starts, ends, scale, softcap, qkv[0].const_data_ptr(),
                                           qkv[1].const_data_ptr(), qkv[2].const_data_ptr()),
                            {out.mutable_data_ptr(), static_cast<float*>(log_sums.mutable_data_ptr())});
    auto [y, s_o] = module.o().forward(out.const_data_ptr(), summands.data() + 3, type);
    norm.add_input(y[0]);
    return {y[0], n, inverse_rms, qkv[0], qkv[1], qkv[2], out, log_sums, s, s_o};
}

std::tuple<Tensor, Tensor, Tensors, Tensors> lora_attention_backward(
    Tensor grad_y, Tensor x, OptionalTensor norm_weight, double weight_offset, OptionalTensor n,
    OptionalTensor inverse_rms, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sums, Tensor s, Tensor s_o,
    Tensors packed, OptionalTensors absmax, OptionalTensors absmax_q, OptionalTensors absmax_scale,
    OptionalTensors absmax_offset, Sizes blocksizes, Sizes N, Sizes K, OptionalTensors lora_A, OptionalTensors lora_B,
    std::vector<double> scalings, int64_t length, int64_t head_dim, Tensor cos, Tensor sin, Tensor starts, Tensor ends,
    double scale, double softcap, bool need_grad_x, bool need_grad_weight, Sizes need_grads_A, Sizes need_grads_B) {
    const CpuArguments arguments(kBackwardOp);
    const Linears linears{packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksizes,
                          N,      K,      lora_A,   lora_B,       scalings};
    const Module module(arguments, kBackwardOp, x, linears, length, head_dim);
    require(need_grads_A.size() == 2 && need_grads_B.size() == 4, kBackwardOp, ": needs must be 2 and 4 flags");
    const ScalarType type = x.scalar_type();
    const LinearsOfInput &qkv = module.qkv(), &o = module.o();
    const int64_t M = module.M();
    const BlockNorm norm(arguments, x, norm_weight, weight_offset);
    norm.check_output(o.N(0));
    const auto floats = [&](const Tensor& tensor, const char* name, int64_t columns) {
        return arguments.floats(tensor, name, arguments.product(M, columns, name), module.dtype());
    };
    const void* grad_rows = floats(grad_y, "grad_y", o.N(0));
    const void* rows = norm_weight ? floats(norm.kept(n, "n"), "n", qkv.K()) : floats(x, "x", qkv.K());
    const AttentionProblem p =
        module.problem(arguments, kBackwardOp, starts, ends, scale, softcap, floats(q, "q", qkv.N(0)),
                       floats(k, "k", qkv.N(1)), floats(v, "v", qkv.N(2)));
    AttentionGradients gradients{};
    gradients.out = floats(out, "out", o.K());
    gradients.log_sums = arguments.data<float>(log_sums, "log_sums", M * module.heads(0));

    auto of_o = o.backward({grad_rows}, gradients.out, floats(s_o, "s_o", o.R()), type, true, need_grads_A[1] != 0,
                           need_grads_B.data() + 3);
    Tensor grad_q = empty({M, qkv.N(0)}, type), grad_k = empty({M, qkv.N(1)}, type),
           grad_v = empty({M, qkv.N(2)}, type);
    gradients.grad_out = module.view(of_o.x.const_data_ptr(), 0);
    gradients.grad_q = grad_q.mutable_data_ptr();
    gradients.grad_k = grad_k.mutable_data_ptr();
    gradients.grad_v = grad_v.mutable_data_ptr();
    cpu_kernels().attention_backward(p, gradients);
    module.rotate(arguments, cos, sin, true, gradients.grad_q, gradients.grad_k);
    const bool need_input = need_grad_x || need_grad_weight;
    auto of_input = qkv.backward({gradients.grad_q, gradients.grad_k, gradients.grad_v}, rows, floats(s, "s", qkv.R()),
                                 type, need_input, need_grads_A[0] != 0, need_grads_B.data());
    Tensor grad_weight = empty({0}, ScalarType::Float);
    if (need_input) grad_weight = norm.backward(arguments, grad_rows, inverse_rms, need_grad_weight, of_input.x);
    return {of_input.x, grad_weight, {of_input.A, of_o.A}, {of_input.B[0], of_input.B[1], of_input.B[2], of_o.B[0]}};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def(
        "cpu_lora_attention(Tensor x, Tensor? norm_weight, float eps, float weight_offset, Tensor[] packed, "
        "Tensor?[] absmax, Tensor?[] absmax_q, Tensor?[] absmax_scale, Tensor?[] absmax_offset, int[] blocksizes, "
        "int[] out_features, int[] in_features, Tensor?[] biases, Tensor?[] lora_A, Tensor?[] lora_B, "
        "float[] scalings, int length, int head_dim, Tensor cos, Tensor sin, Tensor starts, Tensor ends, float scale, "
        "float softcap) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "cpu_lora_attention_backward(Tensor grad_y, Tensor x, Tensor? norm_weight, float weight_offset, Tensor? n, "
        "Tensor? inverse_rms, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sums, Tensor s, Tensor s_o, "
        "Tensor[] packed, Tensor?[] absmax, Tensor?[] absmax_q, Tensor?[] absmax_scale, Tensor?[] absmax_offset, "
        "int[] blocksizes, int[] out_features, int[] in_features, Tensor?[] lora_A, Tensor?[] lora_B, "
        "float[] scalings, int length, int head_dim, Tensor cos, Tensor sin, Tensor starts, Tensor ends, float scale, "
        "float softcap, bool need_grad_x, bool need_grad_weight, int[] need_grads_A, int[] need_grads_B) -> "
        "(Tensor, Tensor, Tensor[], Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CPU, m) {
    m.impl("cpu_lora_attention", TORCH_BOX(&lora_attention));
    m.impl("cpu_lora_attention_backward", TORCH_BOX(&lora_attention_backward));
}

}  // namespace qlora::bindings
