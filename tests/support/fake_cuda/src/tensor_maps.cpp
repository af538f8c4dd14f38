// Tensor maps, which kernels of sm_90 are launched with: what the emulator's TMA copies read.
#include <cstdio>

#include "cuda_host/tensor_map.h"
#include "model.h"

using namespace fake_cuda;

FAKE_CUDA_API CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank,
                                              void* address, const cuuint64_t* dim, const cuuint64_t* strides,
                                              const cuuint32_t* box, const cuuint32_t* element_strides,
                                              CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
    if (model().capability_major < 9) return CUDA_ERROR_NOT_SUPPORTED;
    const char* reason =
        cuda_host::encode_map(map, type, rank, address, dim, strides, box, element_strides, interleave, swizzle, fill);
    if (!reason) return CUDA_SUCCESS;
    fprintf(stderr, "fake_cuda: cuTensorMapEncodeTiled: %s\n", reason);
    return CUDA_ERROR_INVALID_VALUE;
}
