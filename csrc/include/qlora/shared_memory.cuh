// Shared memory as typed storage. Each kernel uses one struct, so that the size is a constant of its type.
#pragma once

namespace qlora {

#ifdef QLORA_CUDA_HOST

// The block's static shared memory of type T, one per type. Uninitialized.
template <typename T>
T& block_shared() {
    return cuda_host::block_shared<T>();
}
// The block's dynamic shared memory, 1024-byte aligned, of the size given at launch. Uninitialized.
template <typename T>
T& dynamic_shared() {
    return *static_cast<T*>(cuda_host::dynamic_shared());
}

#else

template <typename T>
__device__ __forceinline__ T& block_shared() {
    __shared__ T storage;
    return storage;
}
template <typename T>
__device__ __forceinline__ T& dynamic_shared() {
    extern __shared__ __align__(1024) unsigned char storage[];
    return *reinterpret_cast<T*>(storage);
}

#endif

}  // namespace qlora
