// Tensor maps of TMA copies: what the emulator writes into a CUtensorMap, with the checks that the driver's header
// documents. The fake driver (tests/support/fake_cuda) uses it too.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <cstring>
#include <iterator>

namespace cuda_host {

// What the emulator's cuTensorMapEncodeTiled writes into the opaque 128 bytes of a CUtensorMap.
struct TensorMap {
    static constexpr uint64_t kMark = 0x70614D726F736E65ull;
    static constexpr int kMaxRank = 5;
    uint64_t mark;
    uint64_t address;
    uint64_t stride_bytes[kMaxRank - 1];
    uint32_t last[kMaxRank];  // size of each dimension, less one
    uint16_t box[kMaxRank];
    uint8_t rank, element_bytes, swizzle, fill_nan;

    int box_bytes() const {
        int bytes = element_bytes;
        for (int d = 0; d < rank; d++) bytes *= box[d];
        return bytes;
    }
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

inline constexpr int kElementBytes[] = {1, 2, 4, 4, 8, 8, 2,
                                        4, 8, 2, 4, 4, 4};  // by CUtensorMapDataType, packed ones left out
inline constexpr int kSwizzleBytes[] = {0, 32, 64, 128};    // by CUtensorMapSwizzle, other atoms left out

inline bool is_float(CUtensorMapDataType type) { return type >= CU_TENSOR_MAP_DATA_TYPE_FLOAT16; }

// The reason for which the driver refuses the arguments, or the emulator does not model them; null where they are fine.
inline const char* refused_map(const CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, const void* address,
                               const cuuint64_t* dim, const cuuint64_t* strides, const cuuint32_t* box,
                               const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                               CUtensorMapSwizzle swizzle, CUtensorMapFloatOOBfill fill) {
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

// As cuTensorMapEncodeTiled; returns null, or the reason for which `map` was not written.
inline const char* encode_map(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                              const cuuint64_t* dim, const cuuint64_t* strides, const cuuint32_t* box,
                              const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                              CUtensorMapSwizzle swizzle, CUtensorMapFloatOOBfill fill) {
    const char* reason =
        refused_map(map, type, rank, address, dim, strides, box, element_strides, interleave, swizzle, fill);
    if (reason) return reason;
    TensorMap encoded{};
    encoded.mark = TensorMap::kMark;
    encoded.address = reinterpret_cast<uint64_t>(address);
    encoded.rank = uint8_t(rank);
    encoded.element_bytes = uint8_t(kElementBytes[type]);
    encoded.swizzle = uint8_t(kSwizzleBytes[swizzle]);
    encoded.fill_nan = fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA;
    for (cuuint32_t d = 0; d < rank; d++) {
        encoded.last[d] = uint32_t(dim[d] - 1);
        encoded.box[d] = uint16_t(box[d]);
        if (d) encoded.stride_bytes[d - 1] = strides[d - 1];
    }
    memset(map, 0, sizeof *map);
    memcpy(map, &encoded, sizeof encoded);
    return nullptr;
}

}  // namespace cuda_host
