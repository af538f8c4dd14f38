// The CUDA runtime functions that launchers call. Memory is the heap, work is done at once, every call is recorded.
#include <cuda_runtime.h>

#include <cstdlib>
#include <cstring>
#include <map>

#include "runtime_log.h"

namespace cuda_host {

RuntimeLog& runtime_log() {
    static RuntimeLog log;
    return log;
}

void RuntimeLog::record(const char* call, std::initializer_list<long> values, const std::string& text) {
    std::string line = call;
    if (!text.empty()) line += " " + text;
    for (long value : values) line += " " + std::to_string(value);
    lines.push_back(line);
}

void RuntimeLog::inject(const std::string& call, cudaError_t error, int after) { injections_[call] = {error, after}; }

cudaError_t RuntimeLog::injected(const char* call) {
    auto found = injections_.find(call);
    if (found == injections_.end() || found->second.after-- > 0) return cudaSuccess;
    const cudaError_t error = found->second.error;
    injections_.erase(found);
    return error;
}

cudaError_t RuntimeLog::finish(cudaError_t error) {
    if (error != cudaSuccess) last_error_ = error;
    return error;
}

cudaError_t RuntimeLog::last_error(bool clear) {
    const cudaError_t error = last_error_;
    if (clear) last_error_ = cudaSuccess;
    return error;
}

cudaError_t RuntimeLog::call(const char* name, std::initializer_list<long> values) {
    record(name, values);
    return finish(injected(name));
}

long RuntimeLog::handle(const void* pointer) {
    if (!pointer) return 0;
    return handles_.emplace(pointer, long(handles_.size()) + 1).first->second;
}

std::map<void*, size_t>& live_allocations() {
    static std::map<void*, size_t> live;
    return live;
}

std::map<int, int>& device_attributes() {
    static std::map<int, int> attributes{
        {cudaDevAttrConcurrentManagedAccess, 1}, {cudaDevAttrManagedMemory, 1},
        {cudaDevAttrMultiProcessorCount, 108},   {cudaDevAttrComputeCapabilityMajor, 8},
        {cudaDevAttrComputeCapabilityMinor, 0},  {cudaDevAttrMaxSharedMemoryPerBlockOptin, 163 * 1024}};
    return attributes;
}

namespace {

cudaError_t allocate(const char* call, void** pointer, size_t bytes) {
    *pointer = nullptr;
    const cudaError_t error = runtime_log().injected(call);
    void* memory = nullptr;
    if (error == cudaSuccess && bytes && posix_memalign(&memory, 512, bytes)) return cudaErrorMemoryAllocation;
    if (memory) {
        memset(memory, 0xFF, bytes);
        live_allocations()[memory] = bytes;
    }
    runtime_log().record(call, {runtime_log().handle(memory), long(bytes)});
    *pointer = memory;
    return runtime_log().finish(error);
}

cudaError_t release(const char* call, void* pointer) {
    runtime_log().record(call, {runtime_log().handle(pointer)});
    if (pointer && !live_allocations().erase(pointer)) return runtime_log().finish(cudaErrorInvalidValue);
    free(pointer);
    return runtime_log().finish(runtime_log().injected(call));
}

template <class Handle>
cudaError_t create(const char* call, Handle* handle) {
    *handle = reinterpret_cast<Handle>(malloc(1));
    return runtime_log().call(call, {runtime_log().handle(*handle)});
}

template <class Handle>
cudaError_t destroy(const char* call, Handle handle) {
    runtime_log().record(call, {runtime_log().handle(handle)});
    free(handle);
    return runtime_log().finish(runtime_log().injected(call));
}

// The live allocation that holds [pointer, pointer + bytes), as managed-memory calls demand.
const void* allocation_of(const void* pointer, size_t bytes) {
    for (const auto& [start, size] : live_allocations()) {
        const char* begin = static_cast<const char*>(start);
        const char* wanted = static_cast<const char*>(pointer);
        if (wanted >= begin && wanted + bytes <= begin + size) return start;
    }
    return nullptr;
}

// Managed-memory hints: handle of the allocation, offset in it, bytes, location type and id, and what else they have.
cudaError_t hint(const char* call, const void* pointer, size_t bytes, cudaMemLocation location, long extra) {
    const void* base = allocation_of(pointer, bytes);
    if (!base) {
        runtime_log().record(call, {-1});
        return runtime_log().finish(cudaErrorInvalidValue);
    }
    const long offset = long(static_cast<const char*>(pointer) - static_cast<const char*>(base));
    return runtime_log().call(
        call, {runtime_log().handle(base), offset, long(bytes), long(location.type), location.id, extra});
}

}  // namespace
}  // namespace cuda_host

using cuda_host::runtime_log;

extern "C" {

cudaError_t cudaGetLastError() { return runtime_log().last_error(true); }
cudaError_t cudaPeekAtLastError() { return runtime_log().last_error(false); }
const char* cudaGetErrorName(cudaError_t error) { return error == cudaSuccess ? "cudaSuccess" : "cudaError"; }
const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "emulated error"; }

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) { return runtime_log().call("cudaSetDevice", {device}); }
cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return runtime_log().finish(runtime_log().injected("cudaGetDeviceCount"));
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = cuda_host::device_attributes()[attribute];
    return runtime_log().finish(runtime_log().injected("cudaDeviceGetAttribute"));
}
cudaError_t cudaDeviceSynchronize() { return runtime_log().call("cudaDeviceSynchronize", {}); }
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
    if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
        runtime_log().allow_dynamic_shared(function, size_t(value));
    }
    return runtime_log().call("cudaFuncSetAttribute", {attribute, value});
}

cudaError_t cudaMalloc(void** pointer, size_t bytes) { return cuda_host::allocate("cudaMalloc", pointer, bytes); }
cudaError_t cudaMallocManaged(void** pointer, size_t bytes, unsigned) {
    return cuda_host::allocate("cudaMallocManaged", pointer, bytes);
}
cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
    return cuda_host::allocate("cudaHostAlloc", pointer, bytes);
}
cudaError_t cudaFree(void* pointer) { return cuda_host::release("cudaFree", pointer); }
cudaError_t cudaFreeHost(void* pointer) { return cuda_host::release("cudaFreeHost", pointer); }

cudaError_t cudaMemAdvise(const void* pointer, size_t bytes, cudaMemoryAdvise advice, cudaMemLocation location) {
    return cuda_host::hint("cudaMemAdvise", pointer, bytes, location, advice);
}
cudaError_t cudaMemPrefetchAsync(const void* pointer, size_t bytes, cudaMemLocation location, unsigned,
                                 cudaStream_t stream) {
    return cuda_host::hint("cudaMemPrefetchAsync", pointer, bytes, location, runtime_log().handle(stream));
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
    const cudaError_t error =
        runtime_log().call("cudaMemcpyAsync", {long(bytes), long(kind), runtime_log().handle(stream)});
    if (error == cudaSuccess && bytes) memcpy(to, from, bytes);
    return error;
}
cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t stream) {
    const cudaError_t error = runtime_log().call("cudaMemsetAsync", {value, long(bytes), runtime_log().handle(stream)});
    if (error == cudaSuccess && bytes) memset(pointer, value, bytes);
    return error;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
    return cuda_host::create("cudaStreamCreateWithFlags", stream);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return cuda_host::destroy("cudaStreamDestroy", stream); }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
    return runtime_log().call("cudaStreamSynchronize", {runtime_log().handle(stream)});
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
    return runtime_log().call("cudaStreamWaitEvent", {runtime_log().handle(stream), runtime_log().handle(event)});
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
    return cuda_host::create("cudaEventCreateWithFlags", event);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) { return cuda_host::destroy("cudaEventDestroy", event); }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    return runtime_log().call("cudaEventRecord", {runtime_log().handle(event), runtime_log().handle(stream)});
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    return runtime_log().call("cudaEventSynchronize", {runtime_log().handle(event)});
}
}
