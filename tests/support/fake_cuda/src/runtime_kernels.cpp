// libcudart.so.13, kernels: what nvcc's host code registers when a library is loaded, and launches.
#include <cstring>
#include <mutex>
#include <unordered_map>

#include "runtime.h"

namespace {

using fake_cuda::finish;

struct FatBinary {
    const void* image;
    CUmodule module = nullptr;
};

// A kernel, by the address of its host stub, or a variable (bytes > 0), by the address of its host copy.
struct Symbol {
    const char* name;
    FatBinary* binary;
    size_t bytes;
    CUfunction function = nullptr;
    CUdeviceptr memory = 0;
};

std::mutex table_lock;
std::unordered_map<const void*, Symbol>& table() {
    static auto& symbols = *new std::unordered_map<const void*, Symbol>;
    return symbols;
}

Symbol* find(const void* host) {
    const std::lock_guard guard(table_lock);
    const auto found = table().find(host);
    return found == table().end() ? nullptr : &found->second;
}

void add(const void* host, const Symbol& symbol) {
    const std::lock_guard guard(table_lock);
    table().insert_or_assign(host, symbol);
}

CUfunction kernel(const void* host) {
    Symbol* const symbol = find(host);
    if (!symbol || symbol->bytes) return nullptr;
    if (!symbol->function) {
        if (fake_cuda::enter_device()) return nullptr;
        if (!symbol->binary->module) cuModuleLoadData(&symbol->binary->module, symbol->binary->image);
        cuModuleGetFunction(&symbol->function, symbol->binary->module, symbol->name);
    }
    return symbol->function;
}

cudaError_t launch(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t s) {
    const CUfunction function = kernel(host);
    if (!function) return finish(cudaErrorInvalidDeviceFunction);
    if (const CUresult entered = fake_cuda::enter_device()) return finish(entered);
    return finish(cuLaunchKernel(function, grid.x, grid.y, grid.z, block.x, block.y, block.z,
                                 static_cast<unsigned>(shared), s, arguments, nullptr));
}

struct Configuration {
    dim3 grid, block;
    size_t shared;
    cudaStream_t stream;
};
thread_local Configuration pushed;  // between a <<<>>> and the stub that it calls

}  // namespace

FAKE_CUDA_API void** __cudaRegisterFatBinary(void* image) { return reinterpret_cast<void**>(new FatBinary{image}); }
FAKE_CUDA_API void __cudaRegisterFatBinaryEnd(void**) {}
FAKE_CUDA_API void __cudaUnregisterFatBinary(void**) {}
FAKE_CUDA_API char __cudaInitModule(void**) { return 1; }
FAKE_CUDA_API void __cudaRegisterFunction(void** binary, const char* host, char*, const char* name, int, uint3*, uint3*,
                                          dim3*, dim3*, int*) {
    add(host, {name, reinterpret_cast<FatBinary*>(binary), 0});
}
FAKE_CUDA_API void __cudaRegisterVar(void** binary, char* host, char*, const char* name, int, size_t bytes, int, int) {
    add(host, {name, reinterpret_cast<FatBinary*>(binary), bytes});
}

FAKE_CUDA_API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
    pushed = {grid, block, shared, stream};
    return 0;
}
FAKE_CUDA_API cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *static_cast<cudaStream_t*>(stream) = pushed.stream;
    return cudaSuccess;
}

FAKE_CUDA_API cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void** arguments, size_t shared,
                                           cudaStream_t s) {
    FAKE_CUDA_BEGIN();
    return launch(host, grid, block, arguments, shared, s);
}
FAKE_CUDA_API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* host, void** arguments) {
    FAKE_CUDA_BEGIN();
    return launch(host, c->gridDim, c->blockDim, arguments, c->dynamicSmemBytes, c->stream);
}
FAKE_CUDA_API cudaError_t __cudaGetKernel(cudaKernel_t* handle, const void* host) {
    *handle = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
    return find(host) ? cudaSuccess : finish(cudaErrorInvalidDeviceFunction);
}
FAKE_CUDA_API cudaError_t __cudaLaunchKernel(cudaKernel_t handle, dim3 grid, dim3 block, void** arguments,
                                             size_t shared, cudaStream_t s) {
    FAKE_CUDA_BEGIN();
    return launch(handle, grid, block, arguments, shared, s);
}
FAKE_CUDA_API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* host) {
    FAKE_CUDA_BEGIN();
    const CUfunction function = kernel(host);
    if (!function) return finish(cudaErrorInvalidDeviceFunction);
    memset(attributes, 0, sizeof *attributes);
    cuFuncGetAttribute(&attributes->maxThreadsPerBlock, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK, function);
    cuFuncGetAttribute(&attributes->numRegs, CU_FUNC_ATTRIBUTE_NUM_REGS, function);
    cuFuncGetAttribute(&attributes->binaryVersion, CU_FUNC_ATTRIBUTE_BINARY_VERSION, function);
    return cudaSuccess;
}
FAKE_CUDA_API cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute name, int value) {
    FAKE_CUDA_BEGIN();
    const CUfunction function = kernel(host);
    if (!function) return finish(cudaErrorInvalidDeviceFunction);
    return finish(cuFuncSetAttribute(function, static_cast<CUfunction_attribute>(name), value));
}
FAKE_CUDA_API cudaError_t cudaGetSymbolAddress(void** address, const void* host) {
    Symbol* const variable = find(host);
    if (!variable || !variable->bytes) return finish(cudaErrorInvalidSymbol);
    CUresult result = fake_cuda::enter_device();
    if (!result && !variable->memory) result = cuMemAlloc(&variable->memory, variable->bytes);
    *address = reinterpret_cast<void*>(variable->memory);
    return finish(result);
}
