// libcudart.so.13, devices: errors, versions, properties.
#include <cstring>
#include <string>
#include <utility>

#include "runtime.h"

namespace fake_cuda {
namespace {

thread_local int current_device = 0;
thread_local cudaError_t last_error = cudaSuccess;

constexpr struct {
    cudaError_t code;
    const char *name, *text;  // without a text: the driver's
} kErrors[] = {
#define FAKE_ERROR(name, text) {name, #name, text}
    FAKE_ERROR(cudaSuccess, nullptr),
    FAKE_ERROR(cudaErrorInvalidValue, nullptr),
    FAKE_ERROR(cudaErrorMemoryAllocation, nullptr),
    FAKE_ERROR(cudaErrorInitializationError, "initialization error"),
    FAKE_ERROR(cudaErrorInsufficientDriver, "CUDA driver version is insufficient for CUDA runtime version"),
    FAKE_ERROR(cudaErrorInvalidDeviceFunction, "invalid device function"),
    FAKE_ERROR(cudaErrorNoDevice, nullptr),
    FAKE_ERROR(cudaErrorInvalidDevice, nullptr),
    FAKE_ERROR(cudaErrorNoKernelImageForDevice, nullptr),
    FAKE_ERROR(cudaErrorUnsupportedPtxVersion, "the provided PTX was compiled with an unsupported toolchain."),
    FAKE_ERROR(cudaErrorInvalidResourceHandle, nullptr),
    FAKE_ERROR(cudaErrorNotReady, nullptr),
    FAKE_ERROR(cudaErrorIllegalAddress, nullptr),
    FAKE_ERROR(cudaErrorLaunchOutOfResources, nullptr),
    FAKE_ERROR(cudaErrorLaunchFailure, nullptr),
    FAKE_ERROR(cudaErrorNotSupported, nullptr),
    FAKE_ERROR(cudaErrorStreamCaptureUnsupported, nullptr),
    FAKE_ERROR(cudaErrorStreamCaptureInvalidated, nullptr),
    FAKE_ERROR(cudaErrorStreamCaptureIsolation, nullptr),
    FAKE_ERROR(cudaErrorCapturedEvent, "operation not permitted on an event last recorded in a capturing stream"),
#undef FAKE_ERROR
};

int attribute(int device, CUdevice_attribute name) {
    int value = 0;
    cuDeviceGetAttribute(&value, name, device);
    return value;
}

}  // namespace

cudaError_t finish(int code) {
    const auto error = static_cast<cudaError_t>(code);  // both enumerations have the same values
    if (error != cudaSuccess && error != cudaErrorNotReady) last_error = error;
    return error;
}

CUresult enter_device() {
    CUcontext context = nullptr;
    static thread_local CUcontext retained[64] = {};
    if (!retained[current_device]) {
        if (const CUresult result = cuDevicePrimaryCtxRetain(&retained[current_device], current_device)) return result;
    }
    context = retained[current_device];
    return cuCtxSetCurrent(context);
}

cudaError_t begin(const char* call, const void* return_address) {
    if (const int injected = fake_cuda_enter(call, return_address)) return finish(injected);
    int driver = 0;
    cuDriverGetVersion(&driver);
    return driver / 1000 < CUDART_VERSION / 1000 ? finish(cudaErrorInsufficientDriver) : cudaSuccess;
}

}  // namespace fake_cuda

using fake_cuda::finish;

FAKE_CUDA_API cudaError_t cudaGetLastError(void) { return std::exchange(fake_cuda::last_error, cudaSuccess); }
FAKE_CUDA_API cudaError_t cudaPeekAtLastError(void) { return fake_cuda::last_error; }
FAKE_CUDA_API const char* cudaGetErrorName(cudaError_t code) {
    for (const auto& error : fake_cuda::kErrors)
        if (error.code == code) return error.name;
    return "unrecognized error code";
}
FAKE_CUDA_API const char* cudaGetErrorString(cudaError_t code) {
    for (const auto& error : fake_cuda::kErrors)
        if (error.code == code && error.text) return error.text;
    const char* text = nullptr;
    cuGetErrorString(static_cast<CUresult>(code), &text);
    return text;
}

FAKE_CUDA_API cudaError_t cudaDriverGetVersion(int* version) { return finish(cuDriverGetVersion(version)); }
FAKE_CUDA_API cudaError_t cudaRuntimeGetVersion(int* version) {
    *version = CUDART_VERSION;
    return cudaSuccess;
}
FAKE_CUDA_API cudaError_t cudaGetDeviceCount(int* count) {
    *count = 0;
    FAKE_CUDA_BEGIN();
    const CUresult result = cuInit(0);
    return finish(result != CUDA_SUCCESS ? result : cuDeviceGetCount(count));
}
FAKE_CUDA_API cudaError_t cudaGetDevice(int* device) {
    FAKE_CUDA_BEGIN();
    *device = fake_cuda::current_device;
    return cudaSuccess;
}
FAKE_CUDA_API cudaError_t cudaSetDevice(int device) {
    FAKE_CUDA_BEGIN();
    int count = 0;
    cuDeviceGetCount(&count);
    if (device < 0 || device >= count) return finish(cudaErrorInvalidDevice);
    fake_cuda::current_device = device;
    return finish(fake_cuda::enter_device());
}
FAKE_CUDA_API cudaError_t cudaSetDeviceFlags(unsigned) { return cudaSuccess; }
FAKE_CUDA_API cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int device) {
    FAKE_CUDA_BEGIN();
    return finish(cuDeviceGetAttribute(value, static_cast<CUdevice_attribute>(name), device));
}
FAKE_CUDA_API cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
    FAKE_CUDA_BEGIN();
    memset(p, 0, sizeof *p);
    if (const CUresult result = cuDeviceGetName(p->name, sizeof p->name, device)) return finish(result);
    cuDeviceGetUuid(reinterpret_cast<CUuuid*>(&p->uuid), device);
    cuDeviceTotalMem(&p->totalGlobalMem, device);
#define FAKE_SET(field, name) p->field = attribute(device, CU_DEVICE_ATTRIBUTE_##name)
    using fake_cuda::attribute;
    FAKE_SET(sharedMemPerBlock, MAX_SHARED_MEMORY_PER_BLOCK);
    FAKE_SET(sharedMemPerBlockOptin, MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
    FAKE_SET(sharedMemPerMultiprocessor, MAX_SHARED_MEMORY_PER_MULTIPROCESSOR);
    FAKE_SET(reservedSharedMemPerBlock, RESERVED_SHARED_MEMORY_PER_BLOCK);
    FAKE_SET(regsPerBlock, MAX_REGISTERS_PER_BLOCK);
    FAKE_SET(regsPerMultiprocessor, MAX_REGISTERS_PER_MULTIPROCESSOR);
    FAKE_SET(warpSize, WARP_SIZE);
    FAKE_SET(memPitch, MAX_PITCH);
    FAKE_SET(maxThreadsPerBlock, MAX_THREADS_PER_BLOCK);
    FAKE_SET(maxThreadsPerMultiProcessor, MAX_THREADS_PER_MULTIPROCESSOR);
    FAKE_SET(maxBlocksPerMultiProcessor, MAX_BLOCKS_PER_MULTIPROCESSOR);
    FAKE_SET(maxThreadsDim[0], MAX_BLOCK_DIM_X);
    FAKE_SET(maxThreadsDim[1], MAX_BLOCK_DIM_Y);
    FAKE_SET(maxThreadsDim[2], MAX_BLOCK_DIM_Z);
    FAKE_SET(maxGridSize[0], MAX_GRID_DIM_X);
    FAKE_SET(maxGridSize[1], MAX_GRID_DIM_Y);
    FAKE_SET(maxGridSize[2], MAX_GRID_DIM_Z);
    FAKE_SET(totalConstMem, TOTAL_CONSTANT_MEMORY);
    FAKE_SET(major, COMPUTE_CAPABILITY_MAJOR);
    FAKE_SET(minor, COMPUTE_CAPABILITY_MINOR);
    FAKE_SET(textureAlignment, TEXTURE_ALIGNMENT);
    FAKE_SET(texturePitchAlignment, TEXTURE_PITCH_ALIGNMENT);
    FAKE_SET(multiProcessorCount, MULTIPROCESSOR_COUNT);
    FAKE_SET(canMapHostMemory, CAN_MAP_HOST_MEMORY);
    FAKE_SET(concurrentKernels, CONCURRENT_KERNELS);
    FAKE_SET(pciBusID, PCI_BUS_ID);
    FAKE_SET(asyncEngineCount, ASYNC_ENGINE_COUNT);
    FAKE_SET(unifiedAddressing, UNIFIED_ADDRESSING);
    FAKE_SET(memoryBusWidth, GLOBAL_MEMORY_BUS_WIDTH);
    FAKE_SET(l2CacheSize, L2_CACHE_SIZE);
    FAKE_SET(streamPrioritiesSupported, STREAM_PRIORITIES_SUPPORTED);
    FAKE_SET(managedMemory, MANAGED_MEMORY);
    FAKE_SET(concurrentManagedAccess, CONCURRENT_MANAGED_ACCESS);
    FAKE_SET(computePreemptionSupported, COMPUTE_PREEMPTION_SUPPORTED);
    FAKE_SET(cooperativeLaunch, COOPERATIVE_LAUNCH);
    FAKE_SET(hostRegisterSupported, HOST_REGISTER_SUPPORTED);
#undef FAKE_SET
    return cudaSuccess;
}
FAKE_CUDA_API cudaError_t cudaDeviceGetPCIBusId(char* id, int length, int device) {
    FAKE_CUDA_BEGIN();
    return finish(cuDeviceGetPCIBusId(id, length, device));
}
FAKE_CUDA_API cudaError_t cudaDeviceCanAccessPeer(int* can, int a, int b) {
    FAKE_CUDA_BEGIN();
    return finish(cuDeviceCanAccessPeer(can, a, b));
}
FAKE_CUDA_API cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
FAKE_CUDA_API cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
    FAKE_CUDA_DRIVER(cuCtxGetStreamPriorityRange(least, greatest));
}
FAKE_CUDA_API cudaError_t cudaDeviceSynchronize(void) { FAKE_CUDA_DRIVER(cuCtxSynchronize()); }
FAKE_CUDA_API cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned version,
                                                           unsigned long long flags,
                                                           cudaDriverEntryPointQueryResult* status) {
    FAKE_CUDA_BEGIN();
    CUdriverProcAddressQueryResult found{};
    cuGetProcAddress(name, function, static_cast<int>(version), flags, &found);
    if (status) *status = static_cast<cudaDriverEntryPointQueryResult>(found);
    return cudaSuccess;
}
FAKE_CUDA_API cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
FAKE_CUDA_API cudaError_t cudaProfilerStop(void) { return cudaSuccess; }
