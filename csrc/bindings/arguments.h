// The memory-safety checks of an op's arguments, shared by the CPU and the CUDA library. Every address that a kernel
// receives is checked here, so that no tensor can make a kernel read or write outside its memory.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <bit>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>

#include "qlora/nf4_weight.h"

namespace qlora::bindings {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

template <class T>
constexpr ScalarType kScalarTypeOf = ScalarType::Undefined;
template <>
inline constexpr ScalarType kScalarTypeOf<float> = ScalarType::Float;
template <>
inline constexpr ScalarType kScalarTypeOf<double> = ScalarType::Double;
template <>
inline constexpr ScalarType kScalarTypeOf<uint8_t> = ScalarType::Byte;
template <>
inline constexpr ScalarType kScalarTypeOf<int64_t> = ScalarType::Long;

// For a >= 0 and b > 0, also if a + b exceeds int64.
inline int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

enum class Device { kCpu, kCuda };

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
}

template <class... Parts>
void require(bool condition, const Parts&... parts) {
    if (!condition) fail(parts...);
}

// The arguments of one op on one device. Each method raises `<op>: <argument> must <rule>, got <value>`.
template <Device kDevice>
class Arguments {
  public:
    explicit Arguments(const char* op) : op_(op) {}
    Arguments(const char* op, const Tensor& on_device) : op_(op), device_index_(on_device.get_device_index()) {}

    struct Matrix {
        int64_t rows, columns;
    };

    // The sizes of a matrix, both positive, because kernels do not support empty products.
    Matrix matrix(const Tensor& tensor, const char* name) const {
        require(tensor.dim() == 2, op_, ": ", name, " must have two dimensions, got ", tensor.dim());
        const Matrix sizes{tensor.size(0), tensor.size(1)};
        positive(sizes.rows, name);
        positive(sizes.columns, name);
        return sizes;
    }

    int64_t positive(int64_t size, const char* name) const {
        require(size > 0, op_, ": sizes of ", name, " must be positive, got ", size);
        return size;
    }

    int64_t product(int64_t a, int64_t b, const char* name) const {
        int64_t result = 0;
        require(a >= 0 && b >= 0 && !__builtin_mul_overflow(a, b, &result), op_, ": the size of ", name,
                " must fit int64, got ", a, " * ", b);
        return result;
    }

    int block_shift(int64_t blocksize) const {
        require(blocksize >= 32 && blocksize <= 4096 && std::has_single_bit(static_cast<uint64_t>(blocksize)), op_,
                ": blocksize must be a power of two from 32 to 4096, got ", blocksize);
        return std::countr_zero(static_cast<uint64_t>(blocksize));
    }

    // The address of `numel` contiguous elements of T.
    template <class T>
    const T* data(const Tensor& tensor, const char* name, int64_t numel) const {
        check_dtype<T>(tensor, name);
        check_contiguous(tensor, name, numel);
        return static_cast<const T*>(address(tensor, name, numel, sizeof(T)));
    }

    template <class T>
    const T* data(const OptionalTensor& tensor, const char* name, int64_t numel) const {
        return tensor.has_value() ? data<T>(*tensor, name, numel) : nullptr;
    }

    template <class T>
    T* written(const Tensor& tensor, const char* name, int64_t numel) const {
        data<T>(tensor, name, numel);
        return static_cast<T*>(tensor.mutable_data_ptr());
    }

    DType float_type(const Tensor& tensor, const char* name) const {
        switch (tensor.scalar_type()) {
            case ScalarType::Float:
                return DType::kFloat32;
            case ScalarType::BFloat16:
                return DType::kBfloat16;
            case ScalarType::Half:
                return DType::kFloat16;
            default:
                fail(op_, ": ", name, " must be float32, bfloat16 or float16");
        }
    }

    AnyFloat any_float(const Tensor& tensor, const char* name, int64_t numel) const {
        const DType dtype = float_type(tensor, name);
        check_contiguous(tensor, name, numel);
        return {address(tensor, name, numel, dtype == DType::kFloat32 ? 4 : 2), dtype};
    }

    AnyFloat any_float(const OptionalTensor& tensor, const char* name, int64_t numel) const {
        return tensor.has_value() ? any_float(*tensor, name, numel) : AnyFloat{nullptr, DType::kFloat32};
    }

    // The address of `numel` contiguous elements of `dtype`, the dtype of x or grad_y; null for no tensor.
    const void* floats(const Tensor& tensor, const char* name, int64_t numel, DType dtype) const {
        const AnyFloat elements = any_float(tensor, name, numel);
        require(elements.dtype == dtype, op_, ": ", name, " must have the dtype of the op's other activations");
        return elements.data;
    }

    const void* floats(const OptionalTensor& tensor, const char* name, int64_t numel, DType dtype) const {
        return tensor.has_value() ? floats(*tensor, name, numel, dtype) : nullptr;
    }

    void* written_floats(const Tensor& tensor, const char* name, int64_t numel, DType dtype) const {
        floats(tensor, name, numel, dtype);
        return tensor.mutable_data_ptr();
    }

    struct WrittenRows {
        void* data;
        int64_t stride;  // elements from one row to the next
    };

    // A matrix [rows, columns] of `dtype` to write, whose rows may have a stride.
    WrittenRows written_rows(const Tensor& tensor, const char* name, int64_t rows, int64_t columns, DType dtype) const {
        check_device(tensor, name);
        require(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, op_, ": ", name,
                " must have shape [", rows, ", ", columns, "]");
        require(float_type(tensor, name) == dtype, op_, ": ", name,
                " must have the dtype of the op's other activations");
        const int64_t stride = rows == 1 ? columns : tensor.stride(0);
        require((columns == 1 || tensor.stride(1) == 1) && stride >= columns, op_, ": ", name,
                " must have contiguous rows that do not overlap");
        const int64_t elements = rows == 0 ? 0 : product(rows - 1, stride, name) + columns;
        address(tensor, name, elements, dtype == DType::kFloat32 ? 4 : 2);
        return {tensor.mutable_data_ptr(), stride};
    }

    NF4Weight weight(const Tensor& packed, const OptionalTensor& absmax, const OptionalTensor& absmax_q,
                     const OptionalTensor& absmax_scale, const OptionalTensor& absmax_offset, int64_t blocksize,
                     int64_t N, int64_t K) const {
        NF4Weight weight{};
        weight.block_shift = block_shift(blocksize);
        weight.N = N;
        weight.K = K;
        const int64_t numel = product(N, K, "the weight"), blocks = ceil_div(numel, blocksize);
        weight.packed = data<uint8_t>(packed, "packed", ceil_div(numel, 2));
        if (absmax.has_value()) {
            weight.absmax = data<float>(*absmax, "absmax", blocks);
            return weight;
        }
        given(absmax_q, "absmax, or absmax_q");
        given(absmax_scale, "absmax_scale");
        given(absmax_offset, "absmax_offset");
        weight.absmax_q = data<uint8_t>(*absmax_q, "absmax_q", blocks);
        weight.absmax_scale = data<float>(*absmax_scale, "absmax_scale", ceil_div(blocks, kNestedBlocksize));
        weight.absmax_offset = data<float>(*absmax_offset, "absmax_offset", 1);
        return weight;
    }

  protected:
    void given(const OptionalTensor& tensor, const char* name) const {
        require(tensor.has_value(), op_, ": ", name, " must be given");
    }

    template <class T>
    void check_dtype(const Tensor& tensor, const char* name) const {
        require(tensor.scalar_type() == kScalarTypeOf<T>, op_, ": ", name, " has the wrong dtype");
    }

    void check_contiguous(const Tensor& tensor, const char* name, int64_t numel) const {
        check_device(tensor, name);
        require(tensor.is_contiguous(), op_, ": ", name, " must be contiguous");
        require(tensor.numel() == numel, op_, ": ", name, " must have ", numel, " elements, got ", tensor.numel());
    }

    void check_device(const Tensor& tensor, const char* name) const {
        if constexpr (kDevice == Device::kCpu) {
            require(tensor.is_cpu(), op_, ": ", name, " must be a CPU tensor");
        } else {
            require(tensor.is_cuda() && tensor.get_device_index() == device_index_, op_, ": ", name,
                    " must be a CUDA tensor on device ", device_index_);
        }
    }

    // The tensor's address, after a check that its storage has `elements` elements from there on. A view may outlive
    // its storage's memory (untyped_storage().resize_(0), by which FSDP frees parameters), and a wrapper may have no
    // memory.
    const void* address(const Tensor& tensor, const char* name, int64_t elements, int64_t item_size) const {
        if (elements == 0) return nullptr;
        int64_t storage_bytes = 0, last = 0, needed = 0;
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &storage_bytes));
        const bool fits = !__builtin_add_overflow(tensor.storage_offset(), elements, &last) &&
                          !__builtin_mul_overflow(last, item_size, &needed) && needed <= storage_bytes;
        require(fits, op_, ": ", name, " must have memory for its ", elements, " elements of ", item_size,
                " bytes, got a storage of ", storage_bytes, " bytes; was it freed?");
        const void* data = tensor.const_data_ptr();
        require(data != nullptr, op_, ": ", name,
                " must have memory of its own, got none; pass the tensor inside the wrapper or fake tensor");
        require(reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(item_size) == 0, op_, ": ", name,
                " must be aligned to its element size of ", item_size, " bytes; pass a clone");
        return data;
    }

    const char* op_;

  private:
    int32_t device_index_ = -1;
};

}  // namespace qlora::bindings
