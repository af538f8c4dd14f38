// Arguments of the kernels for the parts between a model's linear layers.
#pragma once

#include <string>

#include "cpu_tensors.h"

namespace qlora::bindings {

struct Norm {
    RmsNorm problem;
    ScalarType y_type;
};

inline Norm norm_of(const CpuArguments& arguments, const Tensor& x, const char* name, const Tensor& weight,
                    double weight_offset) {
    const auto [rows, columns] = arguments.matrix(x, name);
    Norm norm{};
    norm.problem.rows = rows;
    norm.problem.columns = columns;
    norm.problem.dtype = arguments.float_type(x, name);
    norm.problem.weight = arguments.any_float(weight, "weight", columns);
    require(weight_offset == 0.0 || weight_offset == 1.0, "rms_norm: weight_offset must be 0 or 1, got ",
            weight_offset);
    norm.problem.offset = static_cast<float>(weight_offset);
    const bool same = weight_offset != 0.0 || norm.problem.weight.dtype == norm.problem.dtype;
    norm.problem.y_dtype = same ? norm.problem.dtype : DType::kFloat32;
    norm.y_type = same ? x.scalar_type() : ScalarType::Float;
    return norm;
}

inline Activation activation_of(const std::string& name) {
    require(name == "silu" || name == "gelu_tanh", "glu: activation must be silu or gelu_tanh, got ", name);
    return name == "silu" ? Activation::kSilu : Activation::kGeluTanh;
}

}  // namespace qlora::bindings
