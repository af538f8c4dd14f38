// cuTensorMapEncodeTiled, recorded and with failures to inject, and the runtime's way to find it.
#include "cuda_host/tensor_map.h"

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>

#include "cuda_host/machine.h"
#include "runtime_log.h"

namespace cuda_host {
namespace {

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* dim,
                      const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* element_strides,
                      CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill fill) {
    runtime_log().record("cuTensorMapEncodeTiled", {long(type), long(rank), long(swizzle)});
    const cudaError_t injected = runtime_log().injected("cuTensorMapEncodeTiled");
    if (injected != cudaSuccess) return CUresult(injected);
    const char* reason =
        encode_map(map, type, rank, address, dim, strides, box, element_strides, interleave, swizzle, fill);
    if (reason) {
        machine().error = std::string("cuTensorMapEncodeTiled: ") + reason;
        return CUDA_ERROR_INVALID_VALUE;
    }
    return CUDA_SUCCESS;
}

}  // namespace
}  // namespace cuda_host

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned version,
                                                        unsigned long long, cudaDriverEntryPointQueryResult* result) {
    using cuda_host::runtime_log;
    runtime_log().record("cudaGetDriverEntryPointByVersion", {long(version)}, symbol);
    const cudaError_t injected = runtime_log().injected("cudaGetDriverEntryPointByVersion");
    const bool known = injected == cudaSuccess && strcmp(symbol, "cuTensorMapEncodeTiled") == 0;
    const bool old = version < 12000;
    *function = known && !old ? reinterpret_cast<void*>(cuda_host::encode_tiled) : nullptr;
    if (result) {
        *result = !known ? cudaDriverEntryPointSymbolNotFound
                  : old  ? cudaDriverEntryPointVersionNotSufficent
                         : cudaDriverEntryPointSuccess;
    }
    return runtime_log().finish(injected);
}
