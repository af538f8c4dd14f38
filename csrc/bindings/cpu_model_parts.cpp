#include "cpu_model_parts.h"

#include <string>
#include <vector>

namespace qlora::bindings {
namespace {

// Returns a new contiguous CPU tensor of the shape and dtype of a contiguous one.
Tensor empty_as(const Tensor& like) {
    std::vector<int64_t> sizes, strides;
    for (int64_t dim = 0; dim < like.dim(); ++dim) {
        sizes.push_back(like.size(dim));
        strides.push_back(like.stride(dim));
    }
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(like.dim(), sizes.data(), strides.data(),
                                 torch::stable::detail::to<int32_t>(torch::stable::detail::from(like.scalar_type())),
                                 aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

std::tuple<Tensor, Tensor, Tensor> rms_norm(Tensor x, OptionalTensor residual, Tensor weight, double eps,
                                            double weight_offset) {
    const CpuArguments arguments("rms_norm");
    const auto [p, y_type] = norm_of(arguments, x, "x", weight, weight_offset);
    const int64_t numel = p.rows * p.columns;
    const void* rows = arguments.floats(x, "x", numel, p.dtype);
    const void* added = residual ? arguments.floats(*residual, "residual", numel, p.dtype) : nullptr;
    Tensor s = residual ? empty({p.rows, p.columns}, x.scalar_type()) : empty({0}, x.scalar_type());
    Tensor y = empty({p.rows, p.columns}, y_type), scale = empty({p.rows}, ScalarType::Float);
    cpu_kernels().rms_norm(p, rows, added, static_cast<float>(eps), residual ? s.mutable_data_ptr() : nullptr,
                           y.mutable_data_ptr(), static_cast<float*>(scale.mutable_data_ptr()));
    return {y, s, scale};
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad_y, OptionalTensor grad_s, Tensor s, Tensor weight,
                                             Tensor scale, double weight_offset, bool need_grad_weight) {
    const CpuArguments arguments("rms_norm_backward");
    const RmsNorm p = norm_of(arguments, s, "s", weight, weight_offset).problem;
    const int64_t numel = p.rows * p.columns;
    const void* grad_rows = arguments.floats(grad_y, "grad_y", numel, p.y_dtype);
    const void* added = grad_s ? arguments.floats(*grad_s, "grad_s", numel, p.dtype) : nullptr;
    const void* rows = arguments.floats(s, "s", numel, p.dtype);
    const float* scales = arguments.data<float>(scale, "scale", p.rows);
    Tensor grad_x = empty({p.rows, p.columns}, s.scalar_type());
    Tensor grad_weight = empty({need_grad_weight ? p.columns : 0}, ScalarType::Float);
    cpu_kernels().rms_norm_backward(p, grad_rows, added, rows, scales, grad_x.mutable_data_ptr(),
                                    need_grad_weight ? static_cast<float*>(grad_weight.mutable_data_ptr()) : nullptr);
    return {grad_x, grad_weight};
}

class RopeArguments : public CpuArguments {
  public:
    using CpuArguments::CpuArguments;

    // The address of x [B, heads, T, D] with contiguous heads and with q's dtype, B, T and D. Writes the strides of B,
    // heads and T.
    const void* heads(const Tensor& x, const char* name, const Tensor& q, int64_t (&strides)[3]) const {
        check_device(x, name);
        const DType dtype = float_type(x, name);
        require(dtype == float_type(q, "q"), op_, ": ", name, " must have the dtype of q");
        require(x.dim() == 4, op_, ": ", name, " must have four dimensions, got ", x.dim());
        int64_t last = 0, part = 0;
        for (int64_t dim = 0; dim < 4; ++dim) {
            const int64_t size = positive(x.size(dim), name), stride = x.stride(dim);
            require(dim == 1 || size == q.size(dim), op_, ": ", name, " must have the sizes of q, got ", size,
                    " in dimension ", dim);
            require(stride >= 0 && !__builtin_mul_overflow(size - 1, stride, &part) &&
                        !__builtin_add_overflow(last, part, &last),
                    op_, ": the memory of ", name, " must fit int64");
            if (dim < 3) strides[dim] = stride;
        }
        require(x.stride(3) == 1 || x.size(3) == 1, op_, ": ", name, " must have contiguous heads");
        return address(x, name, last + 1, dtype == DType::kFloat32 ? 4 : 2);
    }
};

RopeOperand operand_of(const RopeArguments& arguments, const Tensor& x, const Tensor& out, const char* name,
                       const Tensor& q) {
    RopeOperand operand{};
    operand.x = arguments.heads(x, name, q, operand.strides);
    arguments.heads(out, name, q, operand.out_strides);
    operand.out = out.mutable_data_ptr();
    operand.heads = x.size(1);
    require(out.size(1) == x.size(1), "rope: the result of ", name, " must have as many heads, got ", out.size(1));
    return operand;
}

void rope(Tensor q, Tensor q_out, Tensor k, Tensor k_out, Tensor cos, Tensor sin, bool inverse) {
    const RopeArguments arguments("rope");
    require(q.dim() == 4 && cos.dim() == 3, "rope: q must have four dimensions and cos three, got ", q.dim(), " and ",
            cos.dim());
    Rope p{};
    p.dtype = arguments.float_type(q, "q");
    p.operands[0] = operand_of(arguments, q, q_out, "q", q);
    p.operands[1] = operand_of(arguments, k, k_out, "k", q);
    p.B = q.size(0);
    p.T = q.size(2);
    p.D = q.size(3);
    require(p.D % 2 == 0, "rope: heads must have an even number of elements, got ", p.D);
    const int64_t table = arguments.product(p.T, p.D, "cos"), tables = cos.size(0);
    require(tables == 1 || tables == p.B, "rope: cos must have one table or one for each of ", p.B, ", got ", tables);
    p.table_stride = tables == 1 ? 0 : table;
    p.cos = arguments.floats(cos, "cos", tables * table, p.dtype);
    p.sin = arguments.floats(sin, "sin", tables * table, p.dtype);
    p.inverse = inverse;
    cpu_kernels().rope(p);
}

Tensor glu(Tensor gate, Tensor up, std::string activation) {
    const CpuArguments arguments("glu");
    const int64_t numel = gate.numel();
    const AnyFloat gates = arguments.any_float(gate, "gate", numel);
    const void* ups = arguments.floats(up, "up", numel, gates.dtype);
    Tensor y = empty_as(gate);
    cpu_kernels().glu(activation_of(activation), gates.dtype, numel, gates.data, ups, y.mutable_data_ptr());
    return y;
}

std::tuple<Tensor, Tensor> glu_backward(Tensor grad_y, Tensor gate, Tensor up, std::string activation) {
    const CpuArguments arguments("glu_backward");
    const int64_t numel = gate.numel();
    const AnyFloat gates = arguments.any_float(gate, "gate", numel);
    const void* ups = arguments.floats(up, "up", numel, gates.dtype);
    const void* grads = arguments.floats(grad_y, "grad_y", numel, gates.dtype);
    Tensor grad_gate = empty_as(gate), grad_up = empty_as(gate);
    cpu_kernels().glu_backward(activation_of(activation), gates.dtype, numel, grads, gates.data, ups,
                               grad_gate.mutable_data_ptr(), grad_up.mutable_data_ptr());
    return {grad_gate, grad_up};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def(
        "cpu_rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps, float weight_offset) "
        "-> (Tensor, Tensor, Tensor)");
    m.def(
        "cpu_rms_norm_backward(Tensor grad_y, Tensor? grad_s, Tensor s, Tensor weight, Tensor scale, "
        "float weight_offset, bool need_grad_weight) -> (Tensor, Tensor)");
    m.def(
        "cpu_rope(Tensor q, Tensor(a!) q_out, Tensor k, Tensor(b!) k_out, Tensor cos, Tensor sin, bool inverse) "
        "-> ()");
    m.def("cpu_glu(Tensor gate, Tensor up, str activation) -> Tensor");
    m.def("cpu_glu_backward(Tensor grad_y, Tensor gate, Tensor up, str activation) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CPU, m) {
    m.impl("cpu_rms_norm", TORCH_BOX(&rms_norm));
    m.impl("cpu_rms_norm_backward", TORCH_BOX(&rms_norm_backward));
    m.impl("cpu_rope", TORCH_BOX(&rope));
    m.impl("cpu_glu", TORCH_BOX(&glu));
    m.impl("cpu_glu_backward", TORCH_BOX(&glu_backward));
}

}  // namespace qlora::bindings
