// cuTensorMapEncodeTiled, with the checks that the driver's header documents, and the runtime's way to find it.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>

#include "cuda_host/tensor_copy.h"
#include "runtime_log.h"

namespace cuda_host {
namespace {

constexpr int kElementBytes[] = {1, 2, 4, 4, 8, 8, 2,
                                 4, 8, 2, 4, 4, 4};  // by CUtensorMapDataType, packed ones left out
constexpr int kSwizzleBytes[] = {0, 32, 64, 128};    // by CUtensorMapSwizzle, other atoms left out

bool is_float(CUtensorMapDataType type) { return type >= CU_TENSOR_MAP_DATA_TYPE_FLOAT16; }

// The reason for which the driver refuses the arguments, or the emulator does not model them; null where they are fine.
const char* refusal(const CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, const void* address,
                    const cuuint64_t* dim, const cuuint64_t* strides, const cuuint32_t* box,
                    const cuuint32_t* element_strides, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                    CUtensorMapFloatOOBfill fill) {
    if (!map || reinterpret_cast<uintptr_t>(map) % 64) return "the tensor map must be aligned to 64 bytes";
    if (unsigned(type) >= std::size(kElementBytes)) return "this data type is not modelled";
    if (rank < 1 || rank > TensorMap::kMaxRank) return "the rank must be 1 to 5";
    if (!address || reinterpret_cast<uintptr_t>(address) % 16) return "the global address must be aligned to 16 bytes";
    if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return "interleaved layouts are not modelled";
    if (unsigned(swizzle) >= std::size(kSwizzleBytes)) return "this swizzle is not modelled";
    if (fill && !is_float(type)) return "only floating-point types can be filled with NaN";
    for (cuuint32_t d = 0; d < rank; d++) {
        if (dim[d] < 1 || dim[d] > cuuint64_t(1) << 32) return "each size of the tensor must be 1 to 2^32";
        if (box[d] < 1 || box[d] > 256) return "each size of the box must be 1 to 256";
        if (d && (strides[d - 1] % 16 || strides[d - 1] >= cuuint64_t(1) << 40)) {
            return "each stride must be a multiple of 16 bytes, and less than 2^40";
        }
        if (d && (element_strides[d] < 1 || element_strides[d] > 8)) return "each element stride must be 1 to 8";
        if (d && element_strides[d] != 1) return "element strides other than 1 are not modelled";
    }
    const int inner = int(box[0]) * kElementBytes[type], span = kSwizzleBytes[swizzle];
    if (inner % 16) return "the inner size of the box must be a multiple of 16 bytes";
    if (span && inner > span) return "the inner size of the box must not exceed the swizzle";
    if (span && inner < span) return "an inner size of the box below the swizzle is not modelled";
    return nullptr;
}

CUresult encode_tiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* dim,
                      const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* element_strides,
                      CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                      CUtensorMapFloatOOBfill fill) {
    runtime_log().record("cuTensorMapEncodeTiled", {long(type), long(rank), long(swizzle)});
    const cudaError_t injected = runtime_log().injected("cuTensorMapEncodeTiled");
    if (injected != cudaSuccess) return CUresult(injected);
    const char* reason =
        refusal(map, type, rank, address, dim, strides, box, element_strides, interleave, swizzle, fill);
    if (reason) {
        machine().error = std::string("cuTensorMapEncodeTiled: ") + reason;
        return CUDA_ERROR_INVALID_VALUE;
    }
    TensorMap encoded{};
    encoded.mark = TensorMap::kMark;
    encoded.address = reinterpret_cast<uint64_t>(address);
    encoded.rank = uint8_t(rank);
    encoded.element_bytes = uint8_t(kElementBytes[type]);
    encoded.element_type = uint8_t(type);
    encoded.swizzle = uint8_t(kSwizzleBytes[swizzle]);
    encoded.fill_nan = fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA;
    for (cuuint32_t d = 0; d < rank; d++) {
        encoded.last[d] = uint32_t(dim[d] - 1);
        encoded.box[d] = uint16_t(box[d]);
        if (d) encoded.stride_bytes[d - 1] = strides[d - 1];
    }
    memset(map, 0, sizeof *map);
    memcpy(map, &encoded, sizeof encoded);
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
