// Shared memory as typed storage. Kernels name theirs as one struct, so its size is a constant of the type.
#pragma once

namespace qlora {

#ifdef QLORA_CUDA_HOST

// The block's T: static shared memory, one per type. Uninitialized.
template <typename T>
T& block_shared() {
    return cuda_host::block_shared<T>();
}
// The block's dynamic shared memory, 1024-byte aligned, of the size that the launch gave. Uninitialized.
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
