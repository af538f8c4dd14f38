// Device memory is mapped host memory. Every allocation ends, to within 256 bytes, on a page that faults; so does
// memory that was freed.
#include <sys/mman.h>

#include <cstring>

#include "model.h"

namespace fake_cuda {
namespace {

constexpr size_t kAlignment = 256;
constexpr unsigned char kUnwritten = 0xA5;  // what nobody wrote must not look like zeros

constexpr size_t round_up(size_t bytes, size_t to) { return (bytes + to - 1) / to * to; }

CUresult pointer_attribute(void* value, CUpointer_attribute attribute, const void* pointer) {
    const Block* block = find_block(pointer);
    void* const address = const_cast<void*>(pointer);
    const bool on_host = block && (block->device == kHost || block->managed);
    switch (attribute) {
        case CU_POINTER_ATTRIBUTE_CONTEXT:
            *static_cast<CUcontext*>(value) =
                block && block->device != kHost ? &model().contexts[block->device] : nullptr;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
            *static_cast<unsigned*>(value) =
                !block ? 0 : (block->device == kHost ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE);
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
            *static_cast<void**>(value) = block ? address : nullptr;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_HOST_POINTER:
            *static_cast<void**>(value) = on_host ? address : nullptr;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_BUFFER_ID:
            *static_cast<unsigned long long*>(value) = block ? block->id : 0;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_IS_MANAGED:
            *static_cast<unsigned*>(value) = block && block->managed;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
            *static_cast<int*>(value) = !block ? -2 : (block->device == kHost ? 0 : block->device);
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
            *static_cast<void**>(value) = block ? block->start : nullptr;
            return CUDA_SUCCESS;
        case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
            *static_cast<size_t*>(value) = block ? block->bytes : 0;
            return CUDA_SUCCESS;
        default:
            return CUDA_ERROR_NOT_SUPPORTED;
    }
}

// Advice and prefetches are for managed memory; where its pages are is not modelled.
CUresult check_managed(CUdeviceptr pointer, size_t bytes) {
    const Guard guard(model().lock);
    const char* first = reinterpret_cast<const char*>(pointer);
    const Block* block = find_block(first);
    const bool inside = block && block->managed && first + bytes <= block->start + block->bytes;
    return inside ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult allocate_on_current_device(CUdeviceptr* pointer, size_t bytes, bool managed) {
    if (!current_context()) return CUDA_ERROR_INVALID_CONTEXT;
    if (forbidden_during_capture()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    return allocate(reinterpret_cast<void**>(pointer), bytes, current_context()->device, managed);
}

}  // namespace

Block* find_block(const void* pointer) {
    auto& blocks = model().blocks;
    auto after = blocks.upper_bound(static_cast<const char*>(pointer));
    if (after == blocks.begin()) return nullptr;
    Block& block = std::prev(after)->second;
    return static_cast<const char*>(pointer) < block.start + block.bytes ? &block : nullptr;
}

CUresult allocate(void** pointer, size_t bytes, int device, bool managed) {
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    const Guard guard(model().lock);
    Model& m = model();
    const size_t mapped = round_up(bytes, kPage);
    size_t* used = device == kHost ? nullptr : managed ? &m.managed_used : &m.used[device];
    if (used && *used + mapped > (managed ? m.managed_bytes : m.device_bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
    void* mapping = mmap(nullptr, mapped + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
    char* const usable = static_cast<char*>(mapping) + kPage;
    mprotect(usable, mapped, PROT_READ | PROT_WRITE);
    char* const start = usable + mapped - round_up(bytes, kAlignment);
    memset(start, kUnwritten, bytes);
    m.blocks[start] = {start, static_cast<char*>(mapping), bytes, mapped, device, managed, m.next_id++};
    if (used) *used += mapped;
    *pointer = start;
    return CUDA_SUCCESS;
}

CUresult release(void* pointer) {
    if (!pointer) return CUDA_SUCCESS;
    const Guard guard(model().lock);
    if (forbidden_during_capture()) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    synchronize_device(kHost);  // freeing waits for the work that uses the memory
    Model& m = model();
    const auto found = m.blocks.find(static_cast<const char*>(pointer));
    if (found == m.blocks.end()) return CUDA_ERROR_INVALID_VALUE;
    const Block& block = found->second;
    munmap(block.mapping, block.mapped + 2 * kPage);
    if (block.managed)
        m.managed_used -= block.mapped;
    else if (block.device != kHost)
        m.used[block.device] -= block.mapped;
    m.blocks.erase(found);
    return CUDA_SUCCESS;
}

}  // namespace fake_cuda

using namespace fake_cuda;

FAKE_CUDA_API int fake_cuda_owner(const void* pointer) {
    const Guard guard(model().lock);
    const Block* block = find_block(pointer);
    return block && !block->managed ? block->device : kHost;
}

FAKE_CUDA_API CUresult cuMemAlloc(CUdeviceptr* pointer, size_t bytes) {
    return allocate_on_current_device(pointer, bytes, false);
}
FAKE_CUDA_API CUresult cuMemAllocManaged(CUdeviceptr* pointer, size_t bytes, unsigned) {
    return allocate_on_current_device(pointer, bytes, true);
}
FAKE_CUDA_API CUresult cuMemFree(CUdeviceptr pointer) { return release(reinterpret_cast<void*>(pointer)); }
FAKE_CUDA_API CUresult cuMemHostAlloc(void** pointer, size_t bytes, unsigned) {
    return allocate(pointer, bytes, kHost, false);
}
FAKE_CUDA_API CUresult cuMemFreeHost(void* pointer) { return release(pointer); }
FAKE_CUDA_API CUresult cuMemHostGetDevicePointer(CUdeviceptr* device, void* host, unsigned) {
    *device = reinterpret_cast<CUdeviceptr>(host);
    return CUDA_SUCCESS;
}
FAKE_CUDA_API CUresult cuMemGetInfo(size_t* free_bytes, size_t* total) {
    if (!current_context()) return CUDA_ERROR_INVALID_CONTEXT;
    *total = model().device_bytes;
    *free_bytes = *total - model().used[current_context()->device];
    return CUDA_SUCCESS;
}
FAKE_CUDA_API CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute, CUdeviceptr pointer) {
    const Guard guard(model().lock);
    const void* address = reinterpret_cast<const void*>(pointer);
    return find_block(address) ? pointer_attribute(value, attribute, address) : CUDA_ERROR_INVALID_VALUE;
}
FAKE_CUDA_API CUresult cuPointerGetAttributes(unsigned n, CUpointer_attribute* attributes, void** values,
                                              CUdeviceptr pointer) {
    const Guard guard(model().lock);
    for (unsigned i = 0; i < n; i++)
        pointer_attribute(values[i], attributes[i], reinterpret_cast<const void*>(pointer));
    return CUDA_SUCCESS;
}
FAKE_CUDA_API CUresult cuMemAdvise(CUdeviceptr pointer, size_t bytes, CUmem_advise, CUmemLocation) {
    return check_managed(pointer, bytes);
}
FAKE_CUDA_API CUresult cuMemPrefetchAsync(CUdeviceptr pointer, size_t bytes, CUmemLocation, unsigned, CUstream s) {
    if (resolve(s)->capture) {
        resolve(s)->capture->broken = true;
        return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
    return check_managed(pointer, bytes);
}
