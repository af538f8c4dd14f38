// libcudart.so.13, memory and copies.
#include <cstring>

#include "runtime.h"

namespace {

CUmemLocation driver_location(cudaMemLocation where) {
    CUmemLocation location{};
    location.type = static_cast<CUmemLocationType>(where.type);
    location.id = where.id;
    return location;
}
CUdeviceptr address(const void* pointer) { return reinterpret_cast<CUdeviceptr>(pointer); }

}  // namespace

FAKE_CUDA_API cudaError_t cudaMalloc(void** pointer, size_t bytes) {
    FAKE_CUDA_DRIVER(cuMemAlloc(reinterpret_cast<CUdeviceptr*>(pointer), bytes));
}
FAKE_CUDA_API cudaError_t cudaMallocManaged(void** pointer, size_t bytes, unsigned flags) {
    FAKE_CUDA_DRIVER(cuMemAllocManaged(reinterpret_cast<CUdeviceptr*>(pointer), bytes, flags));
}
FAKE_CUDA_API cudaError_t cudaFree(void* pointer) { FAKE_CUDA_DRIVER(cuMemFree(address(pointer))); }
FAKE_CUDA_API cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned flags) {
    FAKE_CUDA_DRIVER(cuMemHostAlloc(pointer, bytes, flags));
}
FAKE_CUDA_API cudaError_t cudaMallocHost(void** pointer, size_t bytes) {
    FAKE_CUDA_DRIVER(cuMemHostAlloc(pointer, bytes, 0));
}
FAKE_CUDA_API cudaError_t cudaFreeHost(void* pointer) { FAKE_CUDA_DRIVER(cuMemFreeHost(pointer)); }
FAKE_CUDA_API cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned flags) {
    FAKE_CUDA_DRIVER(cuMemHostGetDevicePointer(reinterpret_cast<CUdeviceptr*>(device), host, flags));
}
FAKE_CUDA_API cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total) {
    FAKE_CUDA_DRIVER(cuMemGetInfo(free_bytes, total));
}
FAKE_CUDA_API cudaError_t cudaMemAdvise(const void* pointer, size_t bytes, cudaMemoryAdvise advice,
                                        cudaMemLocation where) {
    FAKE_CUDA_DRIVER(cuMemAdvise(address(pointer), bytes, static_cast<CUmem_advise>(advice), driver_location(where)));
}
FAKE_CUDA_API cudaError_t cudaMemPrefetchAsync(const void* pointer, size_t bytes, cudaMemLocation where, unsigned flags,
                                               cudaStream_t stream) {
    FAKE_CUDA_DRIVER(cuMemPrefetchAsync(address(pointer), bytes, driver_location(where), flags, stream));
}
FAKE_CUDA_API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
    FAKE_CUDA_BEGIN();
    memset(attributes, 0, sizeof *attributes);
    unsigned type = 0, managed = 0;
    CUpointer_attribute names[] = {CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_POINTER_ATTRIBUTE_IS_MANAGED,
                                   CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, CU_POINTER_ATTRIBUTE_DEVICE_POINTER,
                                   CU_POINTER_ATTRIBUTE_HOST_POINTER};
    void* values[] = {&type, &managed, &attributes->device, &attributes->devicePointer, &attributes->hostPointer};
    const CUresult result = cuPointerGetAttributes(5, names, values, address(pointer));
    if (type == 0) {
        attributes->type = cudaMemoryTypeUnregistered;
        attributes->hostPointer = const_cast<void*>(pointer);
    } else {
        attributes->type = managed ? cudaMemoryTypeManaged : static_cast<cudaMemoryType>(type);
    }
    return fake_cuda::finish(result);
}

FAKE_CUDA_API cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
    FAKE_CUDA_DRIVER(cuMemcpy(address(to), address(from), bytes));
}
FAKE_CUDA_API cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t s) {
    FAKE_CUDA_DRIVER(cuMemcpyAsync(address(to), address(from), bytes, s));
}
FAKE_CUDA_API cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes, cudaStream_t s) {
    FAKE_CUDA_DRIVER(cuMemcpyAsync(address(to), address(from), bytes, s));
}
FAKE_CUDA_API cudaError_t cudaMemset(void* pointer, int value, size_t bytes) {
    FAKE_CUDA_DRIVER(cuMemsetD8(address(pointer), static_cast<unsigned char>(value), bytes));
}
FAKE_CUDA_API cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t s) {
    FAKE_CUDA_DRIVER(cuMemsetD8Async(address(pointer), static_cast<unsigned char>(value), bytes, s));
}
