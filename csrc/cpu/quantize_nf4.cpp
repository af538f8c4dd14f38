// quantize_nf4: absmax = max|w| per block; q = number of boundaries strictly below fp32(w * fp32(1 / absmax)).
//
// With tables of 32 entries in registers, the search divides [-1, 1] into 32 cells. No cell has two boundaries (they
// are at least 0.08 apart), so
//
//     q = below[cell] + (v > boundary[cell])
//
// with the cell's own boundary (or 2) and the number of boundaries below it. A v that rounds into the neighbouring cell
// still gets the right index, because no boundary is near a cell's edge (checked when the tables are made).
#include "ops.h"
#include "qlora/parallel.h"
#include "simd.h"

namespace qlora::QLORA_ISA {
namespace {

constexpr int kCells = 32;

// round(v * kCellsPerOne + 16) is the cell, 1 .. 31 for |v| <= 1 + 1 ulp. Adding 2^23 rounds it to an integer in the
// low bits of the sum.
constexpr float kCellsPerOne = 15.2f;
[[maybe_unused]] constexpr float kCellOrigin = 0x1p23f + 16.0f;

struct CellTable {
    alignas(64) float boundary[kCells];
    alignas(64) int32_t low[kCells], high[kCells];  // boundaries below the cell; the same, four bits up
};

constexpr CellTable make_cell_table() {
    CellTable table{};
    for (int cell = 0; cell < kCells; ++cell) {
        const float low = (static_cast<float>(cell) - 16.5f) / kCellsPerOne;
        const float high = (static_cast<float>(cell) - 15.5f) / kCellsPerOne;
        int below = 0;
        while (below < 15 && kBoundaries[below] < low) ++below;
        const bool inside = below < 15 && kBoundaries[below] < high;
        table.low[cell] = below;
        table.high[cell] = below << 4;
        table.boundary[cell] = inside ? kBoundaries[below] : 2.0f;
    }
    return table;
}

constexpr bool cells_are_safe() {
    int before = -1;
    for (const float boundary : kBoundaries) {
        const float position = boundary * kCellsPerOne + 16.5f;
        const int cell = static_cast<int>(position);
        const float fraction = position - static_cast<float>(cell);
        if (fraction < 1e-3f || fraction > 1.0f - 1e-3f || cell == before) return false;
        before = cell;
    }
    return true;
}

[[maybe_unused]] constexpr CellTable kCellTable = make_cell_table();
static_assert(cells_are_safe(), "the boundaries moved: choose another number of cells");

// 2 * kLanes weights, split into those of even and those of odd index.
template <class T>
struct Pairs {
    F32 even, odd;
};

#if defined(__AVX512F__)

Pairs<float> load_pairs(const float* w) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const F32 first = load(w), second = load(w + kLanes);
    return {_mm512_permutex2var_ps(first, even, second), _mm512_permutex2var_ps(first, odd, second)};
}

Pairs<Bf16> load_pairs(const Bf16* w) {
    const __m512i words = _mm512_loadu_si512(w);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(words, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000))))};
}

Pairs<Fp16> load_pairs(const Fp16* w) {
    const __m512i words = _mm512_loadu_si512(w);
    return {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)),
            _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(words, 16)))};
}

// The tables in registers. The asm hides their values, because compilers reload constants for each use.
struct IndexSearch {
    __m512 boundary[2];
    __m512i low[2], high[2];

    IndexSearch() {
        for (int i = 0; i < 2; ++i) {
            boundary[i] = _mm512_load_ps(kCellTable.boundary + 16 * i);
            low[i] = _mm512_load_si512(kCellTable.low + 16 * i);
            high[i] = _mm512_load_si512(kCellTable.high + 16 * i);
            asm("" : "+v"(boundary[i]), "+v"(low[i]), "+v"(high[i]));
        }
    }

    // Four bits of index in each lane, shifted left by kShift.
    template <int kShift>
    __m512i indices(__m512 v) const {
        // The sum is rounded to an integer in the low bits; the permutes use the lowest five of these, the cell.
        const __m512 sum = _mm512_fmadd_ps(v, _mm512_set1_ps(kCellsPerOne), _mm512_set1_ps(kCellOrigin));
        const __m512i cell = _mm512_castps_si512(sum);
        const __mmask16 above =
            _mm512_cmp_ps_mask(v, _mm512_permutex2var_ps(boundary[0], cell, boundary[1]), _CMP_GT_OQ);
        const __m512i below = kShift ? _mm512_permutex2var_epi32(high[0], cell, high[1])
                                     : _mm512_permutex2var_epi32(low[0], cell, low[1]);
        return _mm512_mask_add_epi32(below, above, below, _mm512_set1_epi32(1 << kShift));
    }
};

#elif defined(__AVX2__)

Pairs<float> load_pairs(const float* w) {
    const F32 first = load(w), second = load(w + kLanes);
    const auto in_order = [](F32 v) { return _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(v), 0xd8)); };
    return {in_order(_mm256_shuffle_ps(first, second, 0x88)), in_order(_mm256_shuffle_ps(first, second, 0xdd))};
}

Pairs<Bf16> load_pairs(const Bf16* w) {
    const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(words, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000))))};
}

Pairs<Fp16> load_pairs(const Fp16* w) {
    float values[2 * kLanes];
    store(values, load(w));
    store(values + kLanes, load(w + kLanes));
    const Pairs<float> pairs = load_pairs(values);
    return {pairs.even, pairs.odd};
}

// A binary search in registers: the boundary of each step is looked up by the bits found so far.
struct IndexSearch {
    template <int kShift>
    __m256i indices(__m256 v) const {
        const auto above = [&](__m256 boundary) { return _mm256_castps_si256(_mm256_cmp_ps(v, boundary, _CMP_GT_OQ)); };
        const auto doubled_plus = [](__m256i index, __m256i mask) {
            return _mm256_sub_epi32(_mm256_add_epi32(index, index), mask);
        };
        __m256i index = _mm256_sub_epi32(_mm256_setzero_si256(), above(_mm256_set1_ps(kBoundaries[7])));
        const __m256 second = _mm256_setr_ps(kBoundaries[3], kBoundaries[11], 0, 0, 0, 0, 0, 0);
        index = doubled_plus(index, above(_mm256_permutevar8x32_ps(second, index)));
        const __m256 third =
            _mm256_setr_ps(kBoundaries[1], kBoundaries[5], kBoundaries[9], kBoundaries[13], 0, 0, 0, 0);
        index = doubled_plus(index, above(_mm256_permutevar8x32_ps(third, index)));
        const __m256 fourth = _mm256_setr_ps(kBoundaries[0], kBoundaries[2], kBoundaries[4], kBoundaries[6],
                                             kBoundaries[8], kBoundaries[10], kBoundaries[12], kBoundaries[14]);
        return _mm256_slli_epi32(doubled_plus(index, above(_mm256_permutevar8x32_ps(fourth, index))), kShift);
    }
};

#elif defined(QLORA_NEON)

Pairs<float> load_pairs(const float* w) {
    const float32x4x2_t pairs = vld2q_f32(w);
    return {pairs.val[0], pairs.val[1]};
}

Pairs<Bf16> load_pairs(const Bf16* w) {
    const uint32x4_t words = vreinterpretq_u32_u16(vld1q_u16(reinterpret_cast<const uint16_t*>(w)));
    return {vreinterpretq_f32_u32(vshlq_n_u32(words, 16)),
            vreinterpretq_f32_u32(vandq_u32(words, vdupq_n_u32(0xffff0000)))};
}

Pairs<Fp16> load_pairs(const Fp16* w) {
    const uint16x4x2_t words = vld2_u16(reinterpret_cast<const uint16_t*>(w));
    return {vcvt_f32_f16(vreinterpret_f16_u16(words.val[0])), vcvt_f32_f16(vreinterpret_f16_u16(words.val[1]))};
}

// A binary search in registers, as for AVX2: the boundary of each step is looked up by the bits found so far.
struct IndexSearch {
    template <int kShift>
    uint32x4_t indices(F32 v) const {
        const auto doubled_plus = [](uint32x4_t index, uint32x4_t mask) {
            return vsubq_u32(vaddq_u32(index, index), mask);
        };
        const F32 second = {kBoundaries[3], kBoundaries[11], 0.0f, 0.0f};
        const F32 third = {kBoundaries[1], kBoundaries[5], kBoundaries[9], kBoundaries[13]};
        const F32 fourth_low = {kBoundaries[0], kBoundaries[2], kBoundaries[4], kBoundaries[6]};
        const F32 fourth_high = {kBoundaries[8], kBoundaries[10], kBoundaries[12], kBoundaries[14]};
        const uint8x16x2_t fourth = {{vreinterpretq_u8_f32(fourth_low), vreinterpretq_u8_f32(fourth_high)}};
        const auto above = [&](uint8x16_t boundary) { return vcgtq_f32(v, vreinterpretq_f32_u8(boundary)); };
        uint32x4_t index = vsubq_u32(vdupq_n_u32(0), vcgtq_f32(v, vdupq_n_f32(kBoundaries[7])));
        index = doubled_plus(index, above(vqtbl1q_u8(vreinterpretq_u8_f32(second), dword_bytes(index))));
        index = doubled_plus(index, above(vqtbl1q_u8(vreinterpretq_u8_f32(third), dword_bytes(index))));
        index = doubled_plus(index, above(vqtbl2q_u8(fourth, dword_bytes(index))));
        return vshlq_n_u32(index, kShift);
    }
};

#else

template <class T>
Pairs<T> load_pairs(const T* w) {
    Pairs<T> pairs;
    for (int i = 0; i < kLanes; ++i) {
        pairs.even[i] = to_float(w[2 * i]);
        pairs.odd[i] = to_float(w[2 * i + 1]);
    }
    return pairs;
}

struct IndexSearch {
    template <int kShift>
    I32 indices(F32 v) const {
        I32 result;
        for (int i = 0; i < kLanes; ++i) {
            const float cell = v[i] * kCellsPerOne + kCellOrigin;
            const uint32_t c = float_bits(cell) % kCells;
            result[i] = (kCellTable.low[c] + (v[i] > kCellTable.boundary[c])) << kShift;
        }
        return result;
    }
};

#endif

// Quantizes 2 * kLanes values of w * inverse to kLanes bytes.
template <class T>
inline void pack_pairs(const IndexSearch& search, const T* w, F32 inverse, uint8_t* packed) {
    const Pairs<T> pairs = load_pairs(w);
    const auto high = search.indices<4>(mul(pairs.even, inverse));
    const auto low = search.indices<0>(mul(pairs.odd, inverse));
    store_bytes(packed, reinterpret_cast<I32>(high) | reinterpret_cast<I32>(low));
}

// The result is inf or NaN if w has one; the op's caller detects this in absmax.
template <class T>
float max_abs(const T* w, int64_t n) {
    F32 largest = zero();
    for (int64_t i = 0; i < n; i += kLanes) {
        largest = max_magnitude(largest, load_n(w + i, static_cast<int>(n - i < kLanes ? n - i : kLanes)));
    }
    return largest_lane(largest);
}

#if defined(__AVX2__) || defined(QLORA_NEON)
// For 16-bit floats without conversion: magnitudes order as their bits do. Needs at least 32 words.
template <class T>
float max_abs_words(const T* w, int64_t n) {
#ifdef QLORA_NEON
    uint16x8_t largest = vdupq_n_u16(0);
    for (int64_t i = 0; i < n; i += 8) {
        const uint16x8_t words = vld1q_u16(reinterpret_cast<const uint16_t*>(w + i));
        largest = vmaxq_u16(largest, vandq_u16(words, vdupq_n_u16(0x7fff)));
    }
    return to_float(T{vmaxvq_u16(largest)});
#else
#ifdef __AVX512BW__
    __m512i all = _mm512_setzero_si512();
    for (int64_t i = 0; i < n; i += 32) {
        const __m512i words = _mm512_loadu_si512(w + i);
        all = _mm512_max_epu16(all, _mm512_and_si512(words, _mm512_set1_epi16(0x7fff)));
    }
    const __m256i half = _mm256_max_epu16(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
#else
    __m256i half = _mm256_setzero_si256();
    for (int64_t i = 0; i < n; i += 16) {
        const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + i));
        half = _mm256_max_epu16(half, _mm256_and_si256(words, _mm256_set1_epi16(0x7fff)));
    }
#endif
    const __m128i eight = _mm_max_epu16(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    // The instruction finds the minimum, so the bits are inverted.
    const __m128i smallest = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1)));
    return to_float(T{static_cast<uint16_t>(~_mm_cvtsi128_si32(smallest))});
#endif
}

float max_abs(const Bf16* w, int64_t n) { return n % 32 == 0 ? max_abs_words(w, n) : max_abs<Bf16>(w, n); }
float max_abs(const Fp16* w, int64_t n) { return n % 32 == 0 ? max_abs_words(w, n) : max_abs<Fp16>(w, n); }
#endif

template <class T>
inline void pack_block(const IndexSearch& search, const T* w, int64_t n, float absmax, float inverse, uint8_t* packed) {
    constexpr int kStep = 2 * kLanes;
    if (absmax == 0.0f || float_bits(absmax) >= 0x7f800000) {
        memset(packed, kZeroIndex << 4 | kZeroIndex, static_cast<size_t>(n + 1) >> 1);
        return;
    }
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) pack_pairs(search, w + i, set1(inverse), packed + (i >> 1));
    if (i < n) {
        // The tail of the last block. A zero quantizes to kZeroIndex, which also pads the missing nibble of an odd
        // tail.
        T tail[kStep] = {};
        uint8_t bytes[kStep / 2];
        memcpy(tail, w + i, static_cast<size_t>(n - i) * sizeof(T));
        pack_pairs(search, tail, set1(inverse), bytes);
        memcpy(packed + (i >> 1), bytes, static_cast<size_t>((n - i + 1) >> 1));
    }
}

// Number of blocks whose constants are computed before any is packed: the maximum, reciprocal and products of one block
// form a dependency chain that is longer than a core's reorder window.
constexpr int64_t kBlocksAtOnce = 16;

template <class T>
void quantize_blocks(const T* w, int64_t numel, int block_shift, int64_t block0, int64_t block1, uint8_t* packed,
                     float* absmax) {
    const IndexSearch search;
    const int64_t blocksize = int64_t{1} << block_shift;
    const auto size = [=](int64_t block) {
        const int64_t left = numel - (block << block_shift);
        return left < blocksize ? left : blocksize;
    };
    for (int64_t first = block0; first < block1; first += kBlocksAtOnce) {
        const int64_t end = first + kBlocksAtOnce < block1 ? first + kBlocksAtOnce : block1;
        float largest[kBlocksAtOnce] = {}, inverse[kBlocksAtOnce];
        for (int64_t b = first; b < end; ++b) {
            const float value = max_abs(w + (b << block_shift), size(b));
            largest[b - first] = value < kSmallestAbsmax ? 0.0f : value;
        }
        for (int i = 0; i < kBlocksAtOnce; ++i) inverse[i] = 1.0f / largest[i];
        for (int64_t b = first; b < end; ++b) {
            absmax[b] = largest[b - first];
            const int64_t begin = b << block_shift;
            pack_block(search, w + begin, size(b), largest[b - first], inverse[b - first], packed + (begin >> 1));
        }
    }
}

template <class T>
void quantize(const T* w, int64_t numel, int block_shift, uint8_t* packed, float* absmax) {
    const int64_t blocks = (numel + (int64_t{1} << block_shift) - 1) >> block_shift;
    const int64_t grain = (int64_t{1} << 15) >> block_shift;
    parallel_ranges(blocks, grain, [&](int64_t block0, int64_t block1) {
        quantize_blocks(w, numel, block_shift, block0, block1, packed, absmax);
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
