#include <cmath>
#include <vector>

#include "cpu_tensors.h"

namespace qlora::bindings {
namespace {

// The scaling and the dropout of an adapter, without its factors.
Lora dropout_of(const CpuArguments& arguments, const OptionalTensor& seed, double scaling, double dropout_p) {
    Lora lora{};
    lora.scaling = static_cast<float>(scaling);
    if (dropout_p > 0.0) {
        require(dropout_p < 1.0 - 0x1p-17, "linear_nf4_lora: dropout_p must be below 1 - 2**-17, got ", dropout_p);
        // nearbyint rounds halves to even, as Python's round does, so that the mask depends only on (seed, p).
        lora.threshold = static_cast<uint32_t>(std::nearbyint(dropout_p * 65536.0));
        lora.seed = static_cast<uint64_t>(arguments.only<int64_t>(seed, "seed"));
    }
    return lora;
}

Lora lora_of(const CpuArguments& arguments, const Tensor& lora_A, const Tensor& lora_B, const OptionalTensor& seed,
             double scaling, double dropout_p, int64_t N, int64_t K) {
    Lora lora = dropout_of(arguments, seed, scaling, dropout_p);
    lora.r = arguments.matrix(lora_A, "lora_A").rows;
    lora.A = arguments.any_float(lora_A, "lora_A", arguments.product(lora.r, K, "lora_A"));
    lora.B = arguments.any_float(lora_B, "lora_B", arguments.product(N, lora.r, "lora_B"));
    return lora;
}

std::tuple<Tensor, Tensor> linear_nf4_lora(Tensor x, Tensor packed, OptionalTensor absmax, OptionalTensor absmax_q,
                                           OptionalTensor absmax_scale, OptionalTensor absmax_offset,
                                           OptionalTensor bias, Tensor lora_A, Tensor lora_B, OptionalTensor seed,
                                           double scaling, double dropout_p, int64_t blocksize, int64_t out_features) {
    const CpuArguments arguments("linear_nf4_lora");
    const auto [M, K] = arguments.matrix(x, "x");
    const int64_t N = arguments.positive(out_features, "the weight");
    const AnyFloat rows = arguments.any_float(x, "x", M * K), summand = arguments.any_float(bias, "bias", N);
    const NF4Weight weight = arguments.weight(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, N, K);
    const Lora lora = lora_of(arguments, lora_A, lora_B, seed, scaling, dropout_p, N, K);
    Tensor y = empty({M, N}, x.scalar_type());
    Tensor s = empty({M, lora.r}, x.scalar_type());
    cpu_kernels().linear_nf4_lora({weight, rows.dtype, M}, lora, rows.data, summand, y.mutable_data_ptr(),
                                  s.mutable_data_ptr());
    return {y, s};
}

std::tuple<Tensor, Tensor, Tensor> linear_nf4_lora_backward(Tensor grad_y, Tensor x, Tensor s, Tensor packed,
                                                            OptionalTensor absmax, OptionalTensor absmax_q,
                                                            OptionalTensor absmax_scale, OptionalTensor absmax_offset,
                                                            Tensor lora_A, Tensor lora_B, OptionalTensor seed,
                                                            double scaling, double dropout_p, int64_t blocksize,
                                                            bool need_grad_x, bool need_grad_A, bool need_grad_B) {
    const CpuArguments arguments("linear_nf4_lora_backward");
    const auto [M, K] = arguments.matrix(x, "x");
    const int64_t N = arguments.matrix(grad_y, "grad_y").columns;
    const DType dtype = arguments.float_type(x, "x");
    const NF4Weight weight = arguments.weight(packed, absmax, absmax_q, absmax_scale, absmax_offset, blocksize, N, K);
    const Lora lora = lora_of(arguments, lora_A, lora_B, seed, scaling, dropout_p, N, K);
    const void* rows = arguments.floats(x, "x", M * K, dtype);
    const void* grad_rows = arguments.floats(grad_y, "grad_y", arguments.product(M, N, "grad_y"), dtype);
    const void* down = arguments.floats(s, "s", arguments.product(M, lora.r, "s"), dtype);
    Tensor grad_x = need_grad_x ? empty({M, K}, x.scalar_type()) : empty({0}, x.scalar_type());
    Tensor grad_A = need_grad_A ? empty({lora.r, K}, ScalarType::Float) : empty({0}, ScalarType::Float);
    Tensor grad_B = need_grad_B ? empty({N, lora.r}, ScalarType::Float) : empty({0}, ScalarType::Float);
    cpu_kernels().linear_nf4_lora_backward({weight, dtype, M}, lora, grad_rows, rows, down,
                                           need_grad_x ? grad_x.mutable_data_ptr() : nullptr,
                                           need_grad_A ? static_cast<float*>(grad_A.mutable_data_ptr()) : nullptr,
                                           need_grad_B ? static_cast<float*>(grad_B.mutable_data_ptr()) : nullptr);
    return {grad_x, grad_A, grad_B};
}

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<OptionalTensor>;

// The arguments of several linears on one x, in lists with an entry for each linear.
struct GroupArguments {
    Tensors packed;
    OptionalTensors absmax, absmax_q, absmax_scale, absmax_offset;
    Tensor lora_A;  // the factors of all linears, one below the other
    Tensors lora_B;
    OptionalTensor seed;
    std::vector<double> scalings;
    double dropout_p;
    std::vector<int64_t> blocksizes;

    // The members of the group for weights [N_i, K]. R: set to the sum of their ranks.
    std::vector<GroupMember> members(const CpuArguments& arguments, const std::vector<int64_t>& N, int64_t K,
                                     int64_t& R) const {
        const size_t count = packed.size();
        require(count > 0, "linear_nf4_lora_group: a group must have at least one linear, got none");
        for (const size_t size : {absmax.size(), absmax_q.size(), absmax_scale.size(), absmax_offset.size(),
                                  lora_B.size(), scalings.size(), blocksizes.size(), N.size()}) {
            require(size == count, "linear_nf4_lora_group: every linear must have each of its arguments, got lists of ",
                    count, " and ", size);
        }
        require(lora_A.dim() == 2, "linear_nf4_lora_group: lora_A must have two dimensions, got ", lora_A.dim());
        R = lora_A.size(0);
        AnyFloat A = arguments.any_float(lora_A, "lora_A", arguments.product(R, K, "lora_A"));
        int64_t ranks = 0;
        std::vector<GroupMember> members;
        members.reserve(count);
        for (size_t i = 0; i < count; ++i) {
            Lora lora = dropout_of(arguments, seed, scalings[i], dropout_p);
            require(lora_B[i].dim() == 2, "linear_nf4_lora_group: lora_B must have two dimensions each, got ",
                    lora_B[i].dim());
            lora.r = lora_B[i].size(1);
            require(lora.r <= R - ranks, "linear_nf4_lora_group: lora_A must have as many rows as lora_B have columns");
            ranks += lora.r;
            lora.B = arguments.any_float(lora_B[i], "lora_B", arguments.product(N[i], lora.r, "lora_B"));
            lora.A = A;
            A.data = static_cast<const char*>(A.data) + lora.r * K * (A.dtype == DType::kFloat32 ? 4 : 2);
            members.push_back({arguments.weight(packed[i], absmax[i], absmax_q[i], absmax_scale[i], absmax_offset[i],
                                                blocksizes[i], N[i], K),
                               lora});
        }
        require(ranks == R, "linear_nf4_lora_group: lora_A must have as many rows as lora_B have columns");
        return members;
    }
};

std::tuple<Tensors, Tensor> linear_nf4_lora_group(Tensor x, Tensors packed, OptionalTensors absmax,
                                                  OptionalTensors absmax_q, OptionalTensors absmax_scale,
                                                  OptionalTensors absmax_offset, OptionalTensors biases, Tensor lora_A,
                                                  Tensors lora_B, OptionalTensor seed, std::vector<double> scalings,
                                                  double dropout_p, std::vector<int64_t> blocksizes,
                                                  std::vector<int64_t> out_features) {
    const CpuArguments arguments("linear_nf4_lora_group");
    const auto [M, K] = arguments.matrix(x, "x");
    const AnyFloat rows = arguments.any_float(x, "x", M * K);
    for (const int64_t N : out_features) arguments.positive(N, "the weight");
    int64_t R = 0;
    const GroupArguments group{packed, absmax, absmax_q, absmax_scale, absmax_offset, lora_A,
                               lora_B, seed,   scalings, dropout_p,    blocksizes};
    const std::vector<GroupMember> members = group.members(arguments, out_features, K, R);
    require(biases.size() == members.size(), "linear_nf4_lora_group: biases must be one for each linear");
    Tensors ys;
    std::vector<AnyFloat> summands;
    std::vector<void*> outputs;
    for (size_t i = 0; i < members.size(); ++i) {
        const int64_t N = members[i].weight.N;
        summands.push_back(arguments.any_float(biases[i], "bias", N));
        ys.push_back(empty({M, N}, x.scalar_type()));
        outputs.push_back(ys.back().mutable_data_ptr());
    }
    Tensor s = empty({M, R}, x.scalar_type());
    cpu_kernels().linear_nf4_lora_group({members.data(), static_cast<int64_t>(members.size()), rows.dtype, M, K, R},
                                        rows.data, summands.data(), outputs.data(), s.mutable_data_ptr());
    return {ys, s};
}

std::tuple<Tensor, Tensor, Tensors> linear_nf4_lora_group_backward(
    Tensors grad_ys, Tensor x, Tensor s, Tensors packed, OptionalTensors absmax, OptionalTensors absmax_q,
    OptionalTensors absmax_scale, OptionalTensors absmax_offset, Tensor lora_A, Tensors lora_B, OptionalTensor seed,
    std::vector<double> scalings, double dropout_p, std::vector<int64_t> blocksizes, bool need_grad_x, bool need_grad_A,
    bool need_grad_B) {
    const CpuArguments arguments("linear_nf4_lora_group_backward");
    const auto [M, K] = arguments.matrix(x, "x");
    const DType dtype = arguments.float_type(x, "x");
    const void* rows = arguments.floats(x, "x", M * K, dtype);
    std::vector<int64_t> N;
    std::vector<const void*> grad_rows;
    for (const Tensor& grad_y : grad_ys) {
        N.push_back(arguments.matrix(grad_y, "grad_y").columns);
        grad_rows.push_back(arguments.floats(grad_y, "grad_y", arguments.product(M, N.back(), "grad_y"), dtype));
    }
    int64_t R = 0;
    const GroupArguments group{packed, absmax, absmax_q, absmax_scale, absmax_offset, lora_A,
                               lora_B, seed,   scalings, dropout_p,    blocksizes};
    const std::vector<GroupMember> members = group.members(arguments, N, K, R);
    const void* down = arguments.floats(s, "s", arguments.product(M, R, "s"), dtype);
    Tensor grad_x = need_grad_x ? empty({M, K}, x.scalar_type()) : empty({0}, x.scalar_type());
    Tensor grad_A = need_grad_A ? empty({R, K}, ScalarType::Float) : empty({0}, ScalarType::Float);
    Tensors grads_B;
    std::vector<float*> outputs;
    for (const auto& [weight, lora] : members) {
        grads_B.push_back(need_grad_B ? empty({weight.N, lora.r}, ScalarType::Float) : empty({0}, ScalarType::Float));
        outputs.push_back(need_grad_B ? static_cast<float*>(grads_B.back().mutable_data_ptr()) : nullptr);
    }
    cpu_kernels().linear_nf4_lora_group_backward(
        {members.data(), static_cast<int64_t>(members.size()), dtype, M, K, R}, grad_rows.data(), rows, down,
        need_grad_x ? grad_x.mutable_data_ptr() : nullptr,
        need_grad_A ? static_cast<float*>(grad_A.mutable_data_ptr()) : nullptr, outputs.data());
    return {grad_x, grad_A, grads_B};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def(
        "cpu_linear_nf4_lora(Tensor x, Tensor packed, Tensor? absmax, Tensor? absmax_q, Tensor? absmax_scale, "
        "Tensor? absmax_offset, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor? seed, float scaling, "
        "float dropout_p, int blocksize, int out_features) -> (Tensor, Tensor)");
    m.def(
        "cpu_linear_nf4_lora_backward(Tensor grad_y, Tensor x, Tensor s, Tensor packed, Tensor? absmax, "
        "Tensor? absmax_q, Tensor? absmax_scale, Tensor? absmax_offset, Tensor lora_A, Tensor lora_B, Tensor? seed, "
        "float scaling, float dropout_p, int blocksize, bool need_grad_x, bool need_grad_A, bool need_grad_B) -> "
        "(Tensor, Tensor, Tensor)");
    m.def(
        "cpu_linear_nf4_lora_group(Tensor x, Tensor[] packed, Tensor?[] absmax, Tensor?[] absmax_q, "
        "Tensor?[] absmax_scale, Tensor?[] absmax_offset, Tensor?[] biases, Tensor lora_A, Tensor[] lora_B, "
        "Tensor? seed, float[] scalings, float dropout_p, int[] blocksizes, int[] out_features) -> (Tensor[], Tensor)");
    m.def(
        "cpu_linear_nf4_lora_group_backward(Tensor[] grad_ys, Tensor x, Tensor s, Tensor[] packed, Tensor?[] absmax, "
        "Tensor?[] absmax_q, Tensor?[] absmax_scale, Tensor?[] absmax_offset, Tensor lora_A, Tensor[] lora_B, "
        "Tensor? seed, float[] scalings, float dropout_p, int[] blocksizes, bool need_grad_x, bool need_grad_A, bool "
        "need_grad_B) -> "
        "(Tensor, Tensor, Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CPU, m) {
    m.impl("cpu_linear_nf4_lora", TORCH_BOX(&linear_nf4_lora));
    m.impl("cpu_linear_nf4_lora_backward", TORCH_BOX(&linear_nf4_lora_backward));
    m.impl("cpu_linear_nf4_lora_group", TORCH_BOX(&linear_nf4_lora_group));
    m.impl("cpu_linear_nf4_lora_group_backward", TORCH_BOX(&linear_nf4_lora_group_backward));
}

}  // namespace qlora::bindings
