// The asynchronous proxy's view of shared memory.
#include "cuda_host/async_proxy.h"

#include <cstring>

#include "cuda_host/async_copy.h"

namespace cuda_host {

AsyncProxy& async_proxy() {
    static AsyncProxy instance;
    return instance;
}

uint8_t* AsyncProxy::visible(uint32_t address) {
    if (visible_.empty()) visible_.assign(kDescriptorBytes, uint8_t(kPoison));
    return &visible_[address];
}

CUDA_HOST_UNCHECKED void AsyncProxy::written(uint32_t address, size_t bytes) {
    if (address + bytes > kDescriptorBytes || !bytes) return;  // no descriptor reaches it
    memcpy(visible(address), machine().shared_pointer(address, bytes), bytes);
}

CUDA_HOST_UNCHECKED void AsyncProxy::fence() {
    IgnoreAccesses ignore;
    machine().for_each_shared([this](uint32_t address, size_t bytes) { written(address, bytes); });
}

CUDA_HOST_UNCHECKED bool AsyncProxy::sees(uint32_t address, size_t bytes) {
    return memcmp(visible(address), machine().shared_pointer(address, bytes), bytes) == 0;
}

}  // namespace cuda_host
