#include <cmath>

#include "cpu_tensors.h"

namespace qlora::bindings {
namespace {

class AttentionArguments : public CpuArguments {
  public:
    using CpuArguments::CpuArguments;

    // A tensor [B, heads, T, D] with a contiguous last dimension and any other strides.
    HeadsView heads(const Tensor& tensor, const char* name, int64_t B, int64_t heads, int64_t T, int64_t D,
                    ScalarType dtype) const {
        check_device(tensor, name);
        require(tensor.scalar_type() == dtype, op_, ": ", name, " must have the dtype of q");
        const bool fits = tensor.dim() == 4 && tensor.size(0) == B && tensor.size(1) == heads && tensor.size(2) == T &&
                          tensor.size(3) == D;
        require(fits, op_, ": ", name, " must have shape [", B, ", ", heads, ", ", T, ", ", D, "]");
        require(D == 1 || tensor.stride(3) == 1, op_, ": ", name, " must have a contiguous last dimension");
        int64_t last = D;
        for (int dim = 0; dim < 3; ++dim) {
            int64_t reach = 0;
            const bool small = tensor.stride(dim) >= 0 &&
                               !__builtin_mul_overflow(tensor.size(dim) - 1, tensor.stride(dim), &reach) &&
                               !__builtin_add_overflow(last, reach, &last);
            require(small, op_, ": ", name, " must have strides that are not negative and fit int64");
        }
        return {address(tensor, name, last, dtype == ScalarType::Float ? 4 : 2), tensor.stride(0), tensor.stride(1),
                tensor.stride(2)};
    }

    AttentionProblem problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& starts,
                             const Tensor& ends, double scale, double softcap) const {
        require(q.dim() == 4 && k.dim() == 4, op_, ": q and k must have four dimensions");
        AttentionProblem p{};
        p.B = positive(q.size(0), "q"), p.H = positive(q.size(1), "q"), p.Tq = positive(q.size(2), "q");
        p.D = positive(q.size(3), "q"), p.KV = positive(k.size(1), "k"), p.Tk = positive(k.size(2), "k");
        require(p.H % p.KV == 0, op_, ": q must have a multiple of k's ", p.KV, " heads, got ", p.H);
        p.dtype = float_type(q, "q");
        p.q = heads(q, "q", p.B, p.H, p.Tq, p.D, q.scalar_type());
        p.k = heads(k, "k", p.B, p.KV, p.Tk, p.D, q.scalar_type());
        p.v = heads(v, "v", p.B, p.KV, p.Tk, p.D, q.scalar_type());
        const int64_t queries = product(p.B, p.Tq, "q");
        p.starts = data<int64_t>(starts, "starts", queries);
        p.ends = data<int64_t>(ends, "ends", queries);
        for (int64_t i = 0; i < queries; ++i) {
            require(p.starts[i] >= 0 && p.ends[i] <= p.Tk, op_, ": starts and ends must lie in [0, ", p.Tk, "], got ",
                    p.starts[i], " and ", p.ends[i]);
        }
        require(std::isfinite(scale) && std::isfinite(softcap) && softcap >= 0.0, op_,
                ": scale and softcap must be finite and softcap not negative, got ", scale, " and ", softcap);
        p.scale = static_cast<float>(scale), p.softcap = static_cast<float>(softcap);
        return p;
    }
};

std::tuple<Tensor, Tensor> attention(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor ends, double scale,
                                     double softcap) {
    const AttentionProblem p = AttentionArguments("attention").problem(q, k, v, starts, ends, scale, softcap);
    Tensor out = empty({p.B, p.Tq, p.H, p.D}, q.scalar_type());
    Tensor log_sums = empty({p.B, p.H, p.Tq}, ScalarType::Float);
    cpu_kernels().attention(p, {out.mutable_data_ptr(), static_cast<float*>(log_sums.mutable_data_ptr())});
    return {out, log_sums};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out,
                                                      Tensor log_sums, Tensor starts, Tensor ends, double scale,
                                                      double softcap) {
    const AttentionArguments arguments("attention_backward");
    const AttentionProblem p = arguments.problem(q, k, v, starts, ends, scale, softcap);
    const int64_t rows = arguments.product(arguments.product(p.B, p.Tq, "q"), p.H, "q");
    AttentionGradients gradients{};
    gradients.out = arguments.floats(out, "out", arguments.product(rows, p.D, "q"), p.dtype);
    gradients.log_sums = arguments.data<float>(log_sums, "log_sums", rows);
    const void* grad = arguments.floats(grad_out, "grad_out", arguments.product(rows, p.D, "q"), p.dtype);
    gradients.grad_out = {grad, p.Tq * p.H * p.D, p.D, p.H * p.D};
    Tensor grad_q = empty({p.B, p.Tq, p.H, p.D}, q.scalar_type());
    Tensor grad_k = empty({p.B, p.Tk, p.KV, p.D}, q.scalar_type());
    Tensor grad_v = empty({p.B, p.Tk, p.KV, p.D}, q.scalar_type());
    gradients.grad_q = grad_q.mutable_data_ptr();
    gradients.grad_k = grad_k.mutable_data_ptr();
    gradients.grad_v = grad_v.mutable_data_ptr();
    cpu_kernels().attention_backward(p, gradients);
    return {grad_q, grad_k, grad_v};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def(
        "cpu_attention(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor ends, float scale, float softcap) "
        "-> (Tensor, Tensor)");
    m.def(
        "cpu_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor log_sums, "
        "Tensor starts, Tensor ends, float scale, float softcap) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CPU, m) {
    m.impl("cpu_attention", TORCH_BOX(&attention));
    m.impl("cpu_attention_backward", TORCH_BOX(&attention_backward));
}

}  // namespace qlora::bindings
