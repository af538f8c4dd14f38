// Compares the codec, the dropout mask and the optimizer with their definitions, element by element. Their results are
// exact and equal on every instruction set.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>

#include "checks.h"
#include "kernels.h"
#include "qlora/cpu_isa.h"

namespace checks {
namespace {

using qlora::Bf16;
using qlora::DType;
using qlora::Fp16;

constexpr float kInf = std::numeric_limits<float>::infinity();

template <class T>
const char* name_of();
template <>
const char* name_of<float>() {
    return "fp32";
}
template <>
const char* name_of<Bf16>() {
    return "bf16";
}
template <>
const char* name_of<Fp16>() {
    return "fp16";
}

template <class T>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<float>() {
    return DType::kFloat32;
}
template <>
constexpr DType dtype_of<Bf16>() {
    return DType::kBfloat16;
}
template <>
constexpr DType dtype_of<Fp16>() {
    return DType::kFloat16;
}

// The number of the `n` increasing boundaries strictly below v.
int index_of(float v, const float* boundaries, int n) {
    int index = 0;
    for (int i = 0; i < n; ++i) index += v > boundaries[i];
    return index;
}

// NaN counts as the largest magnitude, inf as the second largest.
float largest_magnitude(const float* w, int64_t n) {
    uint32_t largest = 0;
    for (int64_t i = 0; i < n; ++i) largest = std::max(largest, qlora::float_bits(w[i]) & 0x7fffffff);
    const float value = qlora::bits_float(largest);
    return value < qlora::kSmallestAbsmax ? 0.0f : value;
}

template <class T>
void check_quantize(const std::vector<T>& w, int block_shift, const char* what) {
    const int64_t numel = static_cast<int64_t>(w.size()), blocksize = int64_t{1} << block_shift;
    const int64_t blocks = (numel + blocksize - 1) / blocksize;
    std::vector<uint8_t> packed(static_cast<size_t>((numel + 1) / 2)), want(packed.size());
    std::vector<float> absmax(static_cast<size_t>(blocks)), want_absmax(absmax.size());
    qlora::cpu_kernels().quantize_nf4(w.data(), dtype_of<T>(), numel, block_shift, packed.data(), absmax.data());
    std::vector<float> values(w.size());
    std::transform(w.begin(), w.end(), values.begin(), [](T v) { return qlora::to_float(v); });
    if (numel % 2) want.back() = qlora::kZeroIndex;
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t begin = b * blocksize, end = std::min(begin + blocksize, numel);
        want_absmax[b] = largest_magnitude(values.data() + begin, end - begin);
        const bool finite = want_absmax[b] > 0.0f && want_absmax[b] < kInf;
        const float inverse = 1.0f / want_absmax[b];
        for (int64_t i = begin; i < end; ++i) {
            const int index = finite ? index_of(values[i] * inverse, qlora::kBoundaries, 15) : qlora::kZeroIndex;
            want[i / 2] = static_cast<uint8_t>(want[i / 2] | index << (i % 2 ? 0 : 4));
        }
        // The payload bits of a NaN may differ.
        if (std::isnan(want_absmax[b]) && std::isnan(absmax[b])) absmax[b] = want_absmax[b];
    }
    char where[100];
    std::snprintf(where, sizeof where, "of %s, %s, shift %d", name_of<T>(), what, block_shift);
    expect(packed == want, "quantize_nf4's indices", where);
    expect(memcmp(absmax.data(), want_absmax.data(), absmax.size() * sizeof(float)) == 0, "quantize_nf4's absmax",
           where);
}

// All decision boundaries and their neighbours, next to a one, so that absmax is 1.
std::vector<float> boundaries() {
    std::vector<float> values{1.0f};
    for (const float b : qlora::kBoundaries) {
        values.insert(values.end(), {b, std::nextafter(b, -kInf), std::nextafter(b, kInf)});
    }
    values.resize(64);
    return values;
}

std::vector<float> specials() {
    std::vector<float> values = normal(8 * 32, 21);
    values[40] = kInf;
    values[70] = -kInf;
    values[100] = std::nanf("");
    values[101] = kInf;
    std::fill(values.begin() + 128, values.begin() + 160, 0.0f);
    std::fill(values.begin() + 160, values.begin() + 192, 0x1p-140f);  // below kSmallestAbsmax
    for (int i = 192; i < 224; ++i) values[i] *= 0x1p-126f;
    return values;
}

// Every bit pattern of a 16-bit type, in an order that mixes magnitudes.
template <class T>
std::vector<T> all_words() {
    std::vector<T> values(1 << 16);
    for (uint32_t i = 0; i < values.size(); ++i) values[i].bits = static_cast<uint16_t>(i * 40503);
    return values;
}

// Magnitudes of about `size`.
std::vector<float> magnitudes(float size) {
    std::vector<float> values = normal(70, 22);
    for (float& v : values) v = std::fabs(v) * size;
    return values;
}

// Values halfway between two numbers of bf16 or fp16, with the even one above or below, and close to halfway.
std::vector<float> ties() {
    std::vector<float> values;
    for (const uint32_t bits : {0x3f808000u, 0x3f818000u, 0x00018000u, 0x3f801000u, 0x3f803000u, 0x33c00000u}) {
        for (const int step : {-1, 0, 1}) values.push_back(qlora::bits_float(bits + static_cast<uint32_t>(step)));
    }
    return values;
}

template <class T>
void check_dequantize(const std::vector<float>& absmax, const char* what) {
    const int64_t blocks = static_cast<int64_t>(absmax.size()), numel = blocks * 32 - 5;
    std::vector<uint8_t> packed((numel + 1) / 2);
    for (size_t i = 0; i < packed.size(); ++i) packed[i] = static_cast<uint8_t>(i * 101 + i / 256);
    const qlora::NF4Weight weight{packed.data(), absmax.data(), nullptr, nullptr, nullptr, 1, numel, 5};
    std::vector<T> out(numel), want(numel);
    qlora::cpu_kernels().dequantize_nf4(weight, dtype_of<T>(), out.data());
    for (int64_t i = 0; i < numel; ++i) {
        const int q = i % 2 ? packed[i / 2] & 0xf : packed[i / 2] >> 4;
        want[i] = qlora::from_float<T>(qlora::kCode[q] * absmax[i / 32]);
    }
    char where[100];
    std::snprintf(where, sizeof where, "to %s, %s", name_of<T>(), what);
    expect(memcmp(out.data(), want.data(), numel * sizeof(T)) == 0, "dequantize_nf4", where);
}

// Constants of every magnitude that the dynamic map distinguishes, including boundaries.
void check_quantize_absmax() {
    constexpr int64_t kBlocks = 3 * 256 - 9;
    std::vector<float> absmax = normal(kBlocks, 23);
    for (int64_t i = 0; i < kBlocks; ++i) absmax[i] *= std::exp2(static_cast<float>(-i % 24));
    const auto on_boundaries = absmax.begin() + 256;
    *on_boundaries = 1.0f;
    std::copy_n(qlora::kAbsmaxBoundaries, 255, on_boundaries + 1);
    std::vector<uint8_t> q(kBlocks), want(kBlocks);
    std::vector<float> scale(3), want_scale(3);
    for (const float offset : {0.0f, 0.25f}) {
        qlora::cpu_kernels().quantize_absmax(absmax.data(), kBlocks, offset, q.data(), scale.data());
        for (int64_t group = 0; group < 3; ++group) {
            const int64_t begin = group * 256, end = std::min<int64_t>(begin + 256, kBlocks);
            std::vector<float> distance;
            for (int64_t i = begin; i < end; ++i) distance.push_back(absmax[i] - offset);
            want_scale[group] = largest_magnitude(distance.data(), end - begin);
            const float inverse = 1.0f / want_scale[group];
            for (int64_t i = begin; i < end; ++i) {
                const float v = distance[i - begin] * inverse;
                want[i] = static_cast<uint8_t>(index_of(v, qlora::kAbsmaxBoundaries, 255));
            }
        }
        expect(q == want, "quantize_absmax's indices", offset == 0.0f ? "without an offset" : "with an offset");
        expect(scale == want_scale, "quantize_absmax's scales", "");
    }
}

template <class T>
std::vector<uint8_t> bytes_of(const std::vector<T>& values) {
    std::vector<uint8_t> bytes(values.size() * sizeof(T));
    memcpy(bytes.data(), values.data(), bytes.size());
    return bytes;
}

// Two steps over a parameter whose last block is short; the second step decodes what the first one encoded. Returns all
// bytes that they write: the parameter's, then the states'.
template <class T>
std::vector<uint8_t> adamw_bytes(int64_t n, bool quantized, double beta1) {
    std::vector<T> param = rounded<T>(normal(n, 8)), grad = rounded<T>(normal(n, 7));
    const int64_t state = n * (quantized ? 1 : 4), blocks = (n + 255) / 256;
    const int64_t absmax = (2 * state + 3) / 4 * 4;
    std::vector<uint8_t> arena(static_cast<size_t>(quantized ? absmax + 8 * blocks : 2 * state));
    for (int step = 1; step <= 2; ++step) {
        const qlora::AdamWParam p{param.data(), grad.data(), dtype_of<T>(), static_cast<float>(step)};
        const int64_t constants = quantized ? absmax : -1;
        const qlora::AdamWSegment segment{0, 0, n, 0, state, constants, quantized ? absmax + 4 * blocks : -1, 0};
        const uint64_t seed = 99;
        qlora::AdamWStep s{};
        s.params = &p;
        s.segments = &segment;
        s.n_segments = 1;
        s.arena = arena.data();
        s.seed = dtype_of<T>() == DType::kBfloat16 ? &seed : nullptr;
        s.lr = 1e-3;
        s.eps = 1e-8;
        s.beta1 = beta1;
        s.beta2 = beta1 == 0.0 ? 0.0 : 0.999;
        s.weight_decay = beta1 == 0.0 ? 0.0 : 0.01;
        s.grad_multiplier = 1.0f;
        qlora::cpu_kernels().adamw_step(s);
    }
    std::vector<uint8_t> bytes = bytes_of(param);
    bytes.insert(bytes.end(), arena.begin(), arena.end());
    return bytes;
}

// With beta1 = beta2 = 0 the first state is the gradient, which is stored within one cell of the map.
template <class T>
bool state_is_gradient(int64_t n, bool quantized) {
    const std::vector<uint8_t> bytes = adamw_bytes<T>(n, quantized, 0.0);
    const uint8_t* arena = bytes.data() + n * static_cast<int64_t>(sizeof(T));
    const int64_t absmax = (2 * n + 3) / 4 * 4;
    const std::vector<float> gradient = normal(n, 7);
    float largest = 0.0f;
    for (const float g : gradient) largest = std::max(largest, std::fabs(g));
    bool close = true;
    for (int64_t i = 0; i < n; ++i) {
        float value, scale = 0.0f;
        if (quantized) {
            memcpy(&scale, arena + absmax + i / 256 * 4, sizeof scale);
            value = qlora::kAbsmaxCode[arena[i]] * scale;
        } else {
            memcpy(&value, arena + 4 * i, sizeof value);
        }
        close = close && std::fabs(value - gradient[i]) <= 0.03f * std::max(largest, scale);
    }
    return close;
}

template <class T>
void check_adamw_of(int64_t n, bool quantized) {
    char where[100];
    std::snprintf(where, sizeof where, "of %ld %s, %s states", long(n), name_of<T>(), quantized ? "8-bit" : "32-bit");
    expect(state_is_gradient<T>(n, quantized), "adamw_step's first state", where);
    const char* isa = qlora::isa_name(qlora::cpu_isa());
    const std::vector<uint8_t> ours = adamw_bytes<T>(n, quantized, 0.9);
    qlora::force_cpu_isa("portable");
    const std::vector<uint8_t> portable = adamw_bytes<T>(n, quantized, 0.9);
    qlora::force_cpu_isa(isa);
    expect(ours == portable, "adamw_step's bytes from the portable set's", where);
}

// Word w of the Philox4x32-10 call with counter (call, 0), by the paper's definition.
void philox_call(uint64_t seed, uint64_t call, uint32_t (&c)[4]) {
    uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
    c[0] = static_cast<uint32_t>(call);
    c[1] = static_cast<uint32_t>(call >> 32);
    c[2] = c[3] = 0;
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
        const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ key[0], static_cast<uint32_t>(b),
                                  static_cast<uint32_t>(a >> 32) ^ c[3] ^ key[1], static_cast<uint32_t>(a)};
        std::copy_n(next, 4, c);
        key[0] += 0x9E3779B9;
        key[1] += 0xBB67AE85;
    }
}

}  // namespace

void check_codec() {
    for (const int block_shift : {5, 6, 12}) {
        const std::vector<float> ragged = normal(1001, 20);
        check_quantize(ragged, block_shift, "ragged");
        check_quantize(rounded<Bf16>(ragged), block_shift, "ragged");
        check_quantize(rounded<Fp16>(ragged), block_shift, "ragged");
    }
    check_quantize(boundaries(), 6, "boundaries");
    check_quantize(specials(), 5, "specials");
    check_quantize(rounded<Bf16>(specials()), 5, "specials");
    check_quantize(rounded<Fp16>(specials()), 5, "specials");
    check_quantize(all_words<Bf16>(), 5, "every value");
    check_quantize(all_words<Fp16>(), 5, "every value");
    const auto to_every_type = [](const std::vector<float>& absmax, const char* what) {
        check_dequantize<float>(absmax, what);
        check_dequantize<Bf16>(absmax, what);
        check_dequantize<Fp16>(absmax, what);
    };
    to_every_type(magnitudes(1.0f), "ordinary");
    to_every_type(magnitudes(1e-6f), "subnormal in fp16");
    to_every_type(magnitudes(1e-39f), "subnormal in fp32");
    to_every_type(magnitudes(7e4f), "infinite in fp16");
    to_every_type(ties(), "ties");
    check_quantize_absmax();
}

void check_dropout() {
    constexpr int64_t kNumel = 8 * 1003 - 3;
    constexpr uint64_t kSeed = 0x123456789abcdef0;
    for (const uint32_t threshold : {1u, 20000u, 65535u}) {
        std::vector<uint8_t> bits((kNumel + 7) / 8);
        qlora::cpu_kernels().dropout_bits(kSeed, threshold, kNumel, bits.data());
        bool same = true;
        for (int64_t i = 0; i < kNumel; ++i) {
            uint32_t words[4];
            philox_call(kSeed, static_cast<uint64_t>(i) >> 3, words);
            const uint32_t draw = words[i % 8 / 2] >> (16 * (i % 2)) & 0xffff;
            same = same && (bits[i / 8] >> (i % 8) & 1) == (draw >= threshold);
        }
        expect(same, "dropout_bits", "from Philox4x32-10");
    }
}

void check_adamw() {
    for (const int64_t n : {1, 255, 256, 700}) {
        for (const bool quantized : {false, true}) {
            check_adamw_of<float>(n, quantized);
            check_adamw_of<Bf16>(n, quantized);
            check_adamw_of<Fp16>(n, quantized);
        }
    }
}

}  // namespace checks
