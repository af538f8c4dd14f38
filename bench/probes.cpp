// Peak rates of the machine: bandwidth of reading and copying memory far beyond the caches, and arithmetic in
// registers.
//
// Each probe runs on `threads` threads at once and returns the rate, in bytes or flops per second, of the best of
// several passes, because other processes can only slow a pass down. Arithmetic uses enough independent sums to hide
// the latency of two units; all are stored, so that the compiler can neither remove nor merge them.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include "amx/support.h"
#include "amx/tile.h"

namespace {

using Clock = std::chrono::steady_clock;

constexpr int kPasses = 8;
constexpr int kSums = 16;
constexpr int64_t kSteps = int64_t{1} << 22;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Runs work(thread) on all threads kPasses times and returns units / the fastest pass. Threads spin between passes,
// because waking one can take longer than a pass.
double best_rate(int threads, double units, const std::function<void(int)>& work) {
    std::atomic<int> started{0}, finished{0};
    std::vector<std::thread> others;
    for (int t = 1; t < threads; ++t) {
        others.emplace_back([&, t] {
            for (int pass = 1; pass <= kPasses; ++pass) {
                while (started.load(std::memory_order_acquire) < pass) _mm_pause();
                work(t);
                finished.fetch_add(1, std::memory_order_release);
            }
        });
    }
    double best = 0;
    for (int pass = 1; pass <= kPasses; ++pass) {
        const auto start = Clock::now();
        started.store(pass, std::memory_order_release);
        work(0);
        while (finished.load(std::memory_order_acquire) < pass * (threads - 1)) _mm_pause();
        best = std::max(best, units / seconds_since(start));
    }
    for (auto& other : others) other.join();
    return best;
}

struct Sink {
    alignas(64) float values[kSums][16];
};

__attribute__((target("avx512f,avx512bf16"))) void bf16_dot_512(Sink* sink) {
    __m512 sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = _mm512_set1_ps(static_cast<float>(i));
    const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3f813f80), b = (__m512bh)_mm512_set1_epi32(0x3f803f82);
    for (int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 16
        for (int i = 0; i < kSums; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], a, b);
    }
    for (int i = 0; i < kSums; ++i) _mm512_store_ps(sink->values[i], sums[i]);
}

__attribute__((target("avx512f"))) void fma_512(Sink* sink) {
    __m512 sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = _mm512_set1_ps(static_cast<float>(i));
    const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(1.001f);
    for (int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 16
        for (int i = 0; i < kSums; ++i) sums[i] = _mm512_fmadd_ps(sums[i], a, b);
    }
    for (int i = 0; i < kSums; ++i) _mm512_store_ps(sink->values[i], sums[i]);
}

// 12 sums: they and both operands fit in 16 registers.
__attribute__((target("avx2,fma"))) void fma_256(Sink* sink) {
    constexpr int kSums256 = 12;
    __m256 sums[kSums256];
    for (int i = 0; i < kSums256; ++i) sums[i] = _mm256_set1_ps(static_cast<float>(i));
    const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(1.001f);
    for (int64_t step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
        for (int i = 0; i < kSums256; ++i) sums[i] = _mm256_fmadd_ps(sums[i], a, b);
    }
    for (int i = 0; i < kSums256; ++i) _mm256_store_ps(sink->values[i], sums[i]);
}

// Steps of a product of 2 x 2 tiles with random operands in L1. Operands that do not change, or zeros, would run up to
// a fifth faster than real products.
void amx_tiles(Sink* sink) {
    using namespace qlora::QLORA_ISA;
    constexpr int kDepth = 8;
    alignas(64) static thread_local uint8_t left[kDepth][2][kTileBytes], right[kDepth][2][kTileBytes];
    uint32_t state = 1;
    for (auto* operand : {&left[0][0][0], &right[0][0][0]}) {
        for (size_t i = 0; i < sizeof left; i += 2) {
            state = state * 1664525u + 1013904223u;
            const auto word = static_cast<uint16_t>((state >> 16 & 0x80ff) | 0x3f00);  // magnitudes from 0.5 to 2
            memcpy(operand + i, &word, sizeof word);
        }
    }
    const TileSession session;
    zero_tile<0>(), zero_tile<1>(), zero_tile<2>(), zero_tile<3>();
    for (int64_t step = 0; step < kSteps / 64; ++step) {
        const int64_t k = step % kDepth;
        load_tile<4>(left[k][0]), load_tile<6>(right[k][0]), tile_dot<0, 4, 6>();
        load_tile<7>(right[k][1]), tile_dot<1, 4, 7>();
        load_tile<5>(left[k][1]), tile_dot<2, 5, 6>(), tile_dot<3, 5, 7>();
    }
    store_tile<0>(sink->values);
}

double arithmetic(int threads, double flops_per_step, void (*work)(Sink*)) {
    std::vector<Sink> sinks(threads);
    return best_rate(threads, flops_per_step * kSteps * threads, [&](int t) { work(&sinks[t]); });
}

// Reads `streams` places at once: a core's prefetchers follow several streams, and one alone does not use all
// bandwidth.
template <int streams>
__attribute__((target("avx2"))) void read_256(const char* from, size_t bytes, Sink* sink) {
    const size_t part = bytes / streams;
    __m256i sums[8] = {};
    for (size_t at = 0; at + 256 <= part; at += 256) {
        for (int stream = 0; stream < streams; ++stream) {
#pragma GCC unroll 8
            for (int i = 0; i < 8; ++i) {
                const auto* line = reinterpret_cast<const __m256i*>(from + stream * part + at + 32 * i);
                sums[i] = _mm256_xor_si256(sums[i], _mm256_loadu_si256(line));
            }
        }
    }
    for (int i = 0; i < 8; ++i) _mm256_store_si256(reinterpret_cast<__m256i*>(sink->values[i]), sums[i]);
}

// Stores past the caches; a normal store would first read the line that it overwrites.
__attribute__((target("avx2"))) void copy_256(char* to, const char* from, size_t bytes) {
    for (size_t at = 0; at + 128 <= bytes; at += 128) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const auto* source = reinterpret_cast<const __m256i*>(from + at + 32 * i);
            _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at + 32 * i), _mm256_load_si256(source));
        }
    }
    _mm_sfence();
}

}  // namespace

extern "C" {

// Returns 0 if the machine lacks the instructions.
double probe_bf16_dot(int threads) {
    if (!__builtin_cpu_supports("avx512bf16")) return 0;
    return arithmetic(threads, 64.0 * kSums, bf16_dot_512);
}

double probe_amx(int threads) {
    if (qlora::amx_unavailable()) return 0;
    constexpr double kFlops = 4 * 2.0 * 16 * 16 * 32;
    std::vector<Sink> sinks(threads);
    return best_rate(threads, kFlops * (kSteps / 64) * threads, [&](int t) { amx_tiles(&sinks[t]); });
}

double probe_fma(int threads, int wide) {
    if (!__builtin_cpu_supports("fma")) return 0;
    if (!wide || !__builtin_cpu_supports("avx512f")) return arithmetic(threads, 16.0 * 12, fma_256);
    return std::max(arithmetic(threads, 32.0 * kSums, fma_512), arithmetic(threads, 16.0 * 12, fma_256));
}

// bytes: size of the buffer, which is divided among the threads.
double probe_read(int threads, size_t bytes) {
    if (!__builtin_cpu_supports("avx2")) return 0;
    const size_t part = bytes / threads / 4096 * 4096;
    char* buffer = static_cast<char*>(std::aligned_alloc(4096, part * threads));
    std::memset(buffer, 1, part * threads);
    std::vector<Sink> sinks(threads);
    double rate = 0;
    for (const auto read : {read_256<1>, read_256<4>, read_256<8>}) {
        rate = std::max(rate, best_rate(threads, static_cast<double>(part) * threads,
                                        [&](int t) { read(buffer + part * t, part, &sinks[t]); }));
    }
    std::free(buffer);
    return rate;
}

// Counts bytes read plus bytes written.
double probe_copy(int threads, size_t bytes) {
    if (!__builtin_cpu_supports("avx2")) return 0;
    const size_t part = bytes / threads / 4096 * 4096;
    char* from = static_cast<char*>(std::aligned_alloc(4096, part * threads));
    char* to = static_cast<char*>(std::aligned_alloc(4096, part * threads));
    std::memset(from, 1, part * threads);
    std::memset(to, 2, part * threads);
    const double rate =
        best_rate(threads, 2.0 * part * threads, [&](int t) { copy_256(to + part * t, from + part * t, part); });
    std::free(from);
    std::free(to);
    return rate;
}
}
