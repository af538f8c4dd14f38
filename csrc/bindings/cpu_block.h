// The linears of a transformer block that runs as one call, and the norm in front of them.
#pragma once

#include <utility>
#include <vector>

#include "cpu_model_parts.h"

namespace qlora::bindings {

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<OptionalTensor>;
using Sizes = std::vector<int64_t>;

// Linears over NF4, in lists with an entry for each. lora_A and lora_B are given for linears with an adapter.
struct Linears {
    const Tensors& packed;
    const OptionalTensors &absmax, &absmax_q, &absmax_scale, &absmax_offset;
    const Sizes &blocksizes, &N, &K;
    const OptionalTensors &lora_A, &lora_B;
    const std::vector<double>& scalings;

    void check_count(const CpuArguments& arguments, const char* op, size_t count) const {
        for (const size_t size :
             {packed.size(), absmax.size(), absmax_q.size(), absmax_scale.size(), absmax_offset.size(),
              blocksizes.size(), N.size(), K.size(), lora_A.size(), lora_B.size(), scalings.size()}) {
            require(size == count, op, ": lists must have one entry for each of the ", count, " linears, got ", size);
        }
        for (size_t i = 0; i < count; ++i) {
            arguments.positive(N[i], "the weight");
            arguments.positive(K[i], "the weight");
        }
    }

    GroupMember member(const CpuArguments& arguments, size_t i) const {
        GroupMember member{arguments.weight(packed[i], absmax[i], absmax_q[i], absmax_scale[i], absmax_offset[i],
                                            blocksizes[i], N[i], K[i]),
                           {}};
        if (!lora_A[i].has_value()) return member;
        Lora& lora = member.lora;
        lora.r = arguments.matrix(*lora_A[i], "lora_A").rows;
        lora.A = arguments.any_float(lora_A[i], "lora_A", arguments.product(lora.r, K[i], "lora_A"));
        lora.B = arguments.any_float(lora_B[i], "lora_B", arguments.product(N[i], lora.r, "lora_B"));
        require(lora.B.data != nullptr, "lora_B must be given with lora_A");
        lora.scaling = static_cast<float>(scalings[i]);
        return member;
    }
};

// Linears [first, last) of `linears`, which read the same rows [M, K].
class LinearsOfInput {
  public:
    LinearsOfInput(const CpuArguments& arguments, const Linears& linears, size_t first, size_t last, DType dtype,
                   int64_t M)
        : group_{nullptr, static_cast<int64_t>(last - first), dtype, M, linears.K[first], 0} {
        for (size_t i = first; i < last; ++i) {
            require(linears.K[i] == group_.K, "linears of one input must have its size, got ", linears.K[i], " and ",
                    group_.K);
            members_.push_back(linears.member(arguments, i));
            group_.R += members_.back().lora.r;
        }
        group_.members = members_.data();
    }
    LinearsOfInput(const LinearsOfInput&) = delete;

    int64_t N(size_t i) const { return members_[i].weight.N; }
    int64_t K() const { return group_.K; }
    int64_t R() const { return group_.R; }

    struct Outputs {
        Tensors ys;
        Tensor s;
    };

    // ys [M, N_i], and s [M, R]. biases: from `first` on, one for each linear.
    Outputs forward(const void* rows, const AnyFloat* biases, ScalarType type) const {
        Outputs outputs{{}, empty({group_.M, group_.R}, type)};
        std::vector<void*> ys;
        for (const GroupMember& member : members_) {
            outputs.ys.push_back(empty({group_.M, member.weight.N}, type));
            ys.push_back(outputs.ys.back().mutable_data_ptr());
        }
        void* s = outputs.s.mutable_data_ptr();
        const auto& [weight, lora] = members_[0];
        if (members_.size() > 1) {
            cpu_kernels().linear_nf4_lora_group(group_, rows, biases, ys.data(), s);
        } else if (lora.r > 0) {
            cpu_kernels().linear_nf4_lora({weight, group_.dtype, group_.M}, lora, rows, biases[0], ys[0], s);
        } else {
            cpu_kernels().linear_nf4({weight, group_.dtype, group_.M}, rows, biases[0], ys[0]);
        }
        return outputs;
    }

    struct Gradients {
        Tensor x;   // or empty
        Tensor A;   // [R, K], the factors of all linears below each other, or empty
        Tensors B;  // [N_i, r_i] each, or empty
    };

    // need_A: of any linear. need_B: from the first linear on, one for each.
    Gradients backward(const std::vector<const void*>& grad_ys, const void* rows, const void* s, ScalarType type,
                       bool need_x, bool need_A, const int64_t* need_B) const {
        const auto [members, count, dtype, M, K, R] = group_;
        need_A = need_A && R > 0;
        Gradients gradients{need_x ? empty({M, K}, type) : empty({0}, type),
                            need_A ? empty({R, K}, ScalarType::Float) : empty({0}, ScalarType::Float),
                            {}};
        std::vector<float*> grads_B;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t N = members[i].weight.N, r = members[i].lora.r;
            const bool need = need_B[i] != 0 && r > 0;
            gradients.B.push_back(need ? empty({N, r}, ScalarType::Float) : empty({0}, ScalarType::Float));
            grads_B.push_back(need ? static_cast<float*>(gradients.B.back().mutable_data_ptr()) : nullptr);
        }
        void* grad_x = need_x ? gradients.x.mutable_data_ptr() : nullptr;
        float* grad_A = need_A ? static_cast<float*>(gradients.A.mutable_data_ptr()) : nullptr;
        const auto& [weight, lora] = members[0];
        if (count > 1) {
            cpu_kernels().linear_nf4_lora_group_backward(group_, grad_ys.data(), rows, s, grad_x, grad_A,
                                                         grads_B.data());
        } else if (lora.r > 0) {
            cpu_kernels().linear_nf4_lora_backward({weight, dtype, M}, lora, grad_ys[0], rows, s, grad_x, grad_A,
                                                   grads_B[0]);
        } else if (need_x) {
            cpu_kernels().linear_nf4_grad_x({weight, dtype, M}, grad_ys[0], grad_x);
        }
        return gradients;
    }

  private:
    std::vector<GroupMember> members_;
    LinearGroup group_;
};

// The norm in front of a block, whose input x is added to the block's result. Without a weight there is neither.
class BlockNorm {
  public:
    BlockNorm(const CpuArguments& arguments, const Tensor& x, const OptionalTensor& weight, double weight_offset)
        : present_(weight.has_value()), x_(x) {
        if (!present_) return;
        norm_ = norm_of(arguments, x, "x", *weight, weight_offset);
        require(norm_.problem.y_dtype == norm_.problem.dtype, "the weight of a block's norm must have the dtype of x");
        rows_ = arguments.floats(x, "x", norm_.problem.rows * norm_.problem.columns, norm_.problem.dtype);
    }

    // (normalized x, scale), or two empty tensors.
    std::pair<Tensor, Tensor> forward(double eps) const {
        if (!present_) return {empty({0}, x_.scalar_type()), empty({0}, ScalarType::Float)};
        const RmsNorm& p = norm_.problem;
        Tensor y = empty({p.rows, p.columns}, x_.scalar_type()), scale = empty({p.rows}, ScalarType::Float);
        cpu_kernels().rms_norm(p, rows_, nullptr, static_cast<float>(eps), nullptr, y.mutable_data_ptr(),
                               static_cast<float*>(scale.mutable_data_ptr()));
        return {y, scale};
    }

    // The input is added to the result, which therefore has as many columns.
    void check_output(int64_t columns) const {
        require(!present_ || columns == norm_.problem.columns,
                "a block with a norm must return as many columns as x has");
    }

    // y += x
    void add_input(Tensor& y) const {
        if (!present_) return;
        check_output(y.size(1));
        void* sum = y.mutable_data_ptr();
        cpu_kernels().add_residual(norm_.problem.dtype, y.numel(), rows_, sum, sum);
    }

    // n or the scale of forward, which backward needs where there is a norm.
    static const Tensor& kept(const OptionalTensor& tensor, const char* name) {
        require(tensor.has_value(), name, " must be given with the weight of a block's norm");
        return *tensor;
    }

    // Replaces the gradient of the normalized x by that of x, and returns the gradient of the weight, or none.
    Tensor backward(const CpuArguments& arguments, const void* grad_y, const OptionalTensor& scale,
                    bool need_grad_weight, Tensor& grad_x) const {
        const RmsNorm& p = norm_.problem;
        Tensor grad_weight = empty({present_ && need_grad_weight ? p.columns : 0}, ScalarType::Float);
        if (!present_) return grad_weight;
        void* grad = grad_x.mutable_data_ptr();
        cpu_kernels().rms_norm_backward(
            p, grad, grad_y, rows_, arguments.data<float>(kept(scale, "scale"), "scale", p.rows), grad,
            need_grad_weight ? static_cast<float*>(grad_weight.mutable_data_ptr()) : nullptr);
        return grad_weight;
    }

  private:
    bool present_;
    const Tensor& x_;
    Norm norm_{};
    const void* rows_ = nullptr;
};

inline std::vector<AnyFloat> biases_of(const CpuArguments& arguments, const OptionalTensors& biases, const Sizes& N) {
    require(biases.size() == N.size(), "biases must be one for each linear");
    std::vector<AnyFloat> summands;
    for (size_t i = 0; i < biases.size(); ++i) summands.push_back(arguments.any_float(biases[i], "bias", N[i]));
    return summands;
}

}  // namespace qlora::bindings
