// quantize_nf4: per block absmax = max|w|; q = how many boundaries lie strictly below fp32(w * fp32(1 / absmax)).
//
// The search: cut [-1, 1] into 32 cells of 1/16. No cell holds two boundaries (they are at least 0.08 apart), so
//     q = base[cell] + (v > boundary[cell])
// with the cell's own boundary (or +inf) and the number of boundaries below it. v is clamped into the cells' range by
// construction (|v| <= 1 + 1 ulp), and a v that rounds into the neighbouring cell still gets the right answer, because
// no boundary lies within an ulp of a cell's edge (checked when the tables are made).
#include "ops.h"
#include "qlora/parallel.h"
#include "simd.h"

namespace qlora::QLORA_ISA {
namespace {

constexpr int kCells = 32;

struct Search {
    alignas(64) float boundary[kCells];
    alignas(64) int32_t base[kCells];
};

constexpr Search make_search() {
    Search search{};
    for (int cell = 0; cell < kCells; ++cell) {
        const float low = static_cast<float>(cell - kCells / 2) / (kCells / 2);
        const float high = low + 2.0f / kCells;
        int below = 0;
        while (below < 15 && kBoundaries[below] < low) ++below;
        const bool inside = below < 15 && kBoundaries[below] < high;
        search.base[cell] = below;
        search.boundary[cell] = inside ? kBoundaries[below] : 2.0f;
    }
    return search;
}

constexpr bool cells_are_safe() {
    for (int b = 0; b < 15; ++b) {
        const float scaled = (kBoundaries[b] + 1.0f) * (kCells / 2);
        const float fraction = scaled - static_cast<float>(static_cast<int>(scaled));
        if (fraction < 1e-3f || fraction > 1.0f - 1e-3f) return false;
        if (b > 0 && static_cast<int>(scaled) == static_cast<int>((kBoundaries[b - 1] + 1.0f) * (kCells / 2)))
            return false;
    }
    return true;
}

constexpr Search kSearch = make_search();
static_assert(cells_are_safe(), "the boundaries moved: choose another number of cells");

#if defined(__AVX512F__)

// Sixteen indices, one a dword.
__m512i indices(__m512 v) {
    const __m512 scaled = _mm512_fmadd_ps(v, _mm512_set1_ps(kCells / 2), _mm512_set1_ps(kCells / 2));
    const __m512i cell = _mm512_min_epi32(_mm512_cvttps_epi32(scaled), _mm512_set1_epi32(kCells - 1));
    const __m512 boundary =
        _mm512_permutex2var_ps(_mm512_load_ps(kSearch.boundary), cell, _mm512_load_ps(kSearch.boundary + 16));
    const __m512i base =
        _mm512_permutex2var_epi32(_mm512_load_si512(kSearch.base), cell, _mm512_load_si512(kSearch.base + 16));
    return _mm512_mask_add_epi32(base, _mm512_cmp_ps_mask(v, boundary, _CMP_GT_OQ), base, _mm512_set1_epi32(1));
}

// Sixteen values of w * inverse to eight bytes: pairs meet by a shift within the qword, one narrowing store.
template <class T>
void pack16(const T* w, F32 inverse, uint8_t* packed) {
    const __m512i q = indices(mul(load(w), inverse));
    const __m512i pair = _mm512_or_si512(_mm512_slli_epi64(q, 4), _mm512_srli_epi64(q, 32));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(packed), _mm512_cvtepi64_epi8(pair));
}

#elif defined(__AVX2__)

// Two gathers would cost more than counting: v > b is -1 where true, so subtracting the masks counts.
__m256i indices(__m256 v) {
    __m256i count = _mm256_setzero_si256();
#pragma GCC unroll 15
    for (int b = 0; b < 15; ++b) {
        const __m256 above = _mm256_cmp_ps(v, _mm256_set1_ps(kBoundaries[b]), _CMP_GT_OQ);
        count = _mm256_sub_epi32(count, _mm256_castps_si256(above));
    }
    return count;
}

template <class T>
void pack16(const T* w, F32 inverse, uint8_t* packed) {
    const __m256i low = indices(mul(load(w), inverse));
    const __m256i high = indices(mul(load(w + 8), inverse));
    // In each qword: the even index moves to bits 4..7, the odd one comes down to bits 0..3.
    const __m256i a = _mm256_or_si256(_mm256_slli_epi64(low, 4), _mm256_srli_epi64(low, 32));
    const __m256i b = _mm256_or_si256(_mm256_slli_epi64(high, 4), _mm256_srli_epi64(high, 32));
    const __m256i first = _mm256_set_epi8(-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 8, 0, -1, -1, -1, -1,
                                          -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 8, 0);
    const __m256i a2 = _mm256_shuffle_epi8(a, first);
    const __m256i b2 = _mm256_shuffle_epi8(b, first);
    const uint16_t words[4] = {
        static_cast<uint16_t>(_mm256_extract_epi16(a2, 0)), static_cast<uint16_t>(_mm256_extract_epi16(a2, 8)),
        static_cast<uint16_t>(_mm256_extract_epi16(b2, 0)), static_cast<uint16_t>(_mm256_extract_epi16(b2, 8))};
    memcpy(packed, words, sizeof words);
}

#else

int index_of(float v) {
    const int scaled = static_cast<int>(v * (kCells / 2) + kCells / 2);
    const int cell = scaled < kCells - 1 ? scaled : kCells - 1;
    return kSearch.base[cell] + (v > kSearch.boundary[cell]);
}

template <class T>
void pack16(const T* w, F32 inverse, uint8_t* packed) {
    for (int i = 0; i < 8; ++i) {
        const int even = index_of(to_float(w[2 * i]) * inverse[0]);
        packed[i] = static_cast<uint8_t>(even << 4 | index_of(to_float(w[2 * i + 1]) * inverse[0]));
    }
}

#endif

// inf where w has one, NaN where w has one: the caller of the op finds them in absmax.
template <class T>
float max_abs(const T* w, int64_t n) {
    F32 largest = zero();
    for (int64_t i = 0; i < n; i += kLanes) {
        largest = max_magnitude(largest, load_n(w + i, static_cast<int>(n - i < kLanes ? n - i : kLanes)));
    }
    float lanes[kLanes];
    store(lanes, largest);
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits = float_bits(lanes[i]) > bits ? float_bits(lanes[i]) : bits;
    return bits_float(bits);
}

template <class T>
float quantize_block(const T* w, int64_t n, uint8_t* packed) {
    const float absmax = max_abs(w, n);
    const bool finite = float_bits(absmax) < 0x7f800000;
    if (absmax < kSmallestAbsmax || !finite) {
        memset(packed, kZeroIndex << 4 | kZeroIndex, static_cast<size_t>(n + 1) >> 1);
        return finite ? 0.0f : absmax;
    }
    const F32 inverse = set1(1.0f / absmax);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) pack16(w + i, inverse, packed + (i >> 1));
    if (i < n) {
        // The last block's rest. A zero quantizes to kZeroIndex, which is also what an odd tail's missing nibble holds.
        T rest[16] = {};
        uint8_t bytes[8];
        memcpy(rest, w + i, static_cast<size_t>(n - i) * sizeof(T));
        pack16(rest, inverse, bytes);
        memcpy(packed + (i >> 1), bytes, static_cast<size_t>((n - i + 1) >> 1));
    }
    return absmax;
}

template <class T>
void quantize(const T* w, int64_t numel, int block_shift, uint8_t* packed, float* absmax) {
    const int64_t blocks = (numel + (int64_t{1} << block_shift) - 1) >> block_shift;
    const int64_t grain = (int64_t{1} << 15) >> block_shift;
    parallel_ranges(blocks, grain, [&](int64_t block0, int64_t block1) {
        for (int64_t block = block0; block < block1; ++block) {
            const int64_t begin = block << block_shift;
            const int64_t end =
                begin + (int64_t{1} << block_shift) < numel ? begin + (int64_t{1} << block_shift) : numel;
            absmax[block] = quantize_block(w + begin, end - begin, packed + (begin >> 1));
        }
    });
}

}  // namespace

void quantize_nf4(const void* w, DType dtype, int64_t numel, int block_shift, uint8_t* packed, float* absmax) {
    switch (dtype) {
        case DType::kFloat32:
            return quantize(static_cast<const float*>(w), numel, block_shift, packed, absmax);
        case DType::kBfloat16:
            return quantize(static_cast<const Bf16*>(w), numel, block_shift, packed, absmax);
        case DType::kFloat16:
            return quantize(static_cast<const Fp16*>(w), numel, block_shift, packed, absmax);
    }
}

}  // namespace qlora::QLORA_ISA
