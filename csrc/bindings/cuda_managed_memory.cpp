// Unified and page-locked memory as tensors that free it. The stable ABI of torch 2.10 has no tensor with a deleter, so
// ownership is passed through DLPack's C structure, which torch has supported since 1.0.
#include <cstring>

#include "cuda_tensors.h"

namespace qlora::cuda_bindings {
namespace {

// The published layout of DLPack 0.x.
struct DLTensor {
    void* data;
    struct {
        int32_t type, id;
    } device;
    int32_t ndim;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};
struct DLManagedTensor {
    DLTensor tensor;
    void* context;
    void (*deleter)(DLManagedTensor*);
};
constexpr int32_t kDLCPU = 1, kDLCUDA = 2;
constexpr uint8_t kDLUInt = 1;

struct OwnedTensor {
    DLManagedTensor dlpack;
    int64_t shape[1];
    int32_t device;  // on whose streams the memory is used
};

void free_managed(DLManagedTensor* tensor) {
    if (managed_free(tensor->tensor.data) != cudaSuccess) cudaGetLastError();  // a deleter cannot report an error
    delete static_cast<OwnedTensor*>(tensor->context);
}

// Waits for the device first: its streams may still copy from and to the memory.
void free_page_locked(DLManagedTensor* tensor) {
    auto* owner = static_cast<OwnedTensor*>(tensor->context);
    int current = owner->device;
    if (tensor->tensor.data) {
        const bool freed = cudaGetDevice(&current) == cudaSuccess && cudaSetDevice(owner->device) == cudaSuccess &&
                           cudaDeviceSynchronize() == cudaSuccess && cudaFreeHost(tensor->tensor.data) == cudaSuccess;
        if (cudaSetDevice(current) != cudaSuccess || !freed) cudaGetLastError();
    }
    delete owner;
}

// The address of a DLManagedTensor of uint8 [nbytes] at `memory`, for a "dltensor" capsule.
int64_t owned(void* memory, int32_t device_type, int32_t device, int64_t nbytes, void (*free)(DLManagedTensor*)) {
    const int32_t id = device_type == kDLCPU ? 0 : device;
    auto* owner = new OwnedTensor{
        {{memory, {device_type, id}, 1, {kDLUInt, 8, 1}, nullptr, nullptr, 0}, nullptr, free}, {nbytes}, device};
    owner->dlpack.tensor.shape = owner->shape;
    owner->dlpack.context = owner;
    return reinterpret_cast<int64_t>(&owner->dlpack);
}

// Returns the address of a DLManagedTensor of uint8 [nbytes], zeroed on `stream_of`'s current stream, for a "dltensor"
// capsule.
int64_t allocate(Tensor stream_of, int64_t nbytes) {
    bindings::require(nbytes >= 0, "managed_alloc: nbytes must be >= 0, got ", nbytes);
    const int32_t device = stream_of.get_device_index();
    const DeviceGuard guard(device);
    void* memory = nullptr;
    check(managed_allocate(&memory, nbytes, current_stream(stream_of)),
          "managed_alloc: " + std::to_string(nbytes) + " bytes of unified memory");
    return owned(memory, kDLCUDA, device, nbytes, free_managed);
}

// Returns the address of a DLManagedTensor of uint8 [nbytes], zeroed, in page-locked host memory of exactly this size.
int64_t allocate_page_locked(Tensor stream_of, int64_t nbytes) {
    bindings::require(nbytes >= 0, "page_locked_alloc: nbytes must be >= 0, got ", nbytes);
    const int32_t device = stream_of.get_device_index();
    const DeviceGuard guard(device);
    void* memory = nullptr;
    if (nbytes) {
        check(cudaMallocHost(&memory, static_cast<size_t>(nbytes)),
              "page_locked_alloc: " + std::to_string(nbytes) + " bytes of page-locked memory");
        memset(memory, 0, static_cast<size_t>(nbytes));
    }
    return owned(memory, kDLCPU, device, nbytes, free_page_locked);
}

void prefer_device(Tensor arena) {
    const DeviceGuard guard(arena.get_device_index());
    auto* bytes = CudaArguments("managed_prefer_device", arena).written<uint8_t>(arena, "arena", arena.numel());
    check(managed_prefer_device(bytes, arena.numel(), arena.get_device_index()), "managed_prefer_device");
}

void prefetch(Tensor arena, int64_t start, int64_t stop) {
    const DeviceGuard guard(arena.get_device_index());
    auto* bytes = CudaArguments("managed_prefetch", arena).written<uint8_t>(arena, "arena", arena.numel());
    bindings::require(0 <= start && start <= stop && stop <= arena.numel(), "managed_prefetch: [", start, ", ", stop,
                      ") must lie in the arena of ", arena.numel(), " bytes");
    check(managed_prefetch(bytes, start, stop, arena.get_device_index(), current_stream(arena)), "managed_prefetch");
}

bool concurrent_access(int64_t device) {
    int supported = 0;
    check(managed_concurrent_access(CudaArguments("managed_concurrent_access").to_int(device, "device"), &supported),
          "managed_concurrent_access");
    return supported != 0;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def("cuda_managed_allocate(Tensor stream_of, int nbytes) -> int");
    m.def("cuda_page_locked_allocate(Tensor stream_of, int nbytes) -> int");
    m.def("cuda_managed_prefer_device(Tensor(a!) arena) -> ()");
    m.def("cuda_managed_prefetch(Tensor(a!) arena, int start, int stop) -> ()");
    m.def("cuda_managed_concurrent_access(int device) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CUDA, m) {
    m.impl("cuda_managed_allocate", TORCH_BOX(&allocate));
    m.impl("cuda_page_locked_allocate", TORCH_BOX(&allocate_page_locked));
    m.impl("cuda_managed_prefer_device", TORCH_BOX(&prefer_device));
    m.impl("cuda_managed_prefetch", TORCH_BOX(&prefetch));
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CompositeExplicitAutograd, m) {
    m.impl("cuda_managed_concurrent_access", TORCH_BOX(&concurrent_access));
}

}  // namespace qlora::cuda_bindings
