// Unified memory for optimizer states: allocate, advise, prefetch, free. Host code alone; CUDA 13's locations.
#include "launchers.h"

namespace {

cudaMemLocation location(cudaMemLocationType type, int id) {
    cudaMemLocation result{};
    result.type = type;
    result.id = id;
    return result;
}

}  // namespace

cudaError_t managed_concurrent_access(int device, int* supported) {
    *supported = 0;
    return cudaDeviceGetAttribute(supported, cudaDevAttrConcurrentManagedAccess, device);
}

cudaError_t managed_allocate(void** memory, int64_t bytes, cudaStream_t stream) {
    *memory = nullptr;
    if (bytes == 0) return cudaSuccess;
    cudaError_t error = cudaMallocManaged(memory, static_cast<size_t>(bytes), cudaMemAttachGlobal);
    if (error != cudaSuccess) {
        cudaGetLastError();  // an allocation that failed leaves the device usable; later checks must not see the error
        *memory = nullptr;
        return error;
    }
    error = cudaMemsetAsync(*memory, 0, static_cast<size_t>(bytes), stream);
    if (error != cudaSuccess) {
        cudaFree(*memory);
        *memory = nullptr;
    }
    return error;
}

cudaError_t managed_prefer_device(void* memory, int64_t bytes, int device) {
    if (bytes == 0) return cudaSuccess;
    const cudaError_t error = cudaMemAdvise(memory, static_cast<size_t>(bytes), cudaMemAdviseSetPreferredLocation,
                                            location(cudaMemLocationTypeDevice, device));
    if (error != cudaSuccess) return error;
    return cudaMemAdvise(memory, static_cast<size_t>(bytes), cudaMemAdviseSetAccessedBy,
                         location(cudaMemLocationTypeHost, 0));
}

cudaError_t managed_prefetch(void* memory, int64_t start, int64_t stop, int device, cudaStream_t stream) {
    if (stop <= start) return cudaSuccess;
    return cudaMemPrefetchAsync(static_cast<char*>(memory) + start, static_cast<size_t>(stop - start),
                                location(cudaMemLocationTypeDevice, device), 0, stream);
}

cudaError_t managed_free(void* memory) { return memory ? cudaFree(memory) : cudaSuccess; }
