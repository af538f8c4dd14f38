// Meaning of PTX instructions that C++ has no operator for; translated kernels call these.
#pragma once

#include <atomic>
#include <limits>
#include <span>
#include <type_traits>

#include "banks.h"
#include "launch.h"
#include "matrix.h"
#include "number_formats.h"

namespace cuda_host::ptx {

struct Half {
    uint16_t bits;
    operator float() const { return fp16_to_float(bits); }
    static Half round(float value) { return {float_to_fp16(value)}; }
};
struct Bfloat16 {
    uint16_t bits;
    operator float() const { return bf16_to_float(bits); }
    static Bfloat16 round(float value) { return {float_to_bf16(value)}; }
};

// Both halves of packed operands; an instruction on one half ignores the upper result.
template <class T, class Function>
uint32_t map_halves(uint32_t a, uint32_t b, Function function) {
    uint32_t result = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const float value = function(T{uint16_t(a >> shift)}, T{uint16_t(b >> shift)});
        result |= uint32_t(T::round(value).bits) << shift;
    }
    return result;
}
template <class T>
uint32_t fma_halves(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t result = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        // The product of two 16-bit floats is exact in double.
        const double product = double(T{uint16_t(a >> shift)}) * double(T{uint16_t(b >> shift)});
        result |= uint32_t(T::round(float(product + double(T{uint16_t(c >> shift)}))).bits) << shift;
    }
    return result;
}

// The .ftz modifier: subnormal operands and results become zero of the same sign.
inline float flush_subnormal(float value) {
    return std::fpclassify(value) == FP_SUBNORMAL ? std::copysign(0.0f, value) : value;
}

template <class T>
T saturate(T value) {
    return value > 0 ? (value < 1 ? value : T(1)) : T(0);  // NaN becomes 0
}
template <class T>
T to_integer(double rounded) {
    using Limits = std::numeric_limits<T>;
    if (rounded != rounded) return 0;
    if (rounded <= double(Limits::min())) return Limits::min();
    return rounded >= double(Limits::max()) ? Limits::max() : T(rounded);
}
template <class To, class From>
To saturate_integer(From value) {
    using Limits = std::numeric_limits<To>;
    if (std::cmp_less(value, Limits::min())) return Limits::min();
    return std::cmp_greater(value, Limits::max()) ? Limits::max() : To(value);
}

inline uint32_t funnel_shift(bool left, bool wrap, uint32_t low, uint32_t high, uint32_t count) {
    count = wrap ? count & 31 : (count < 32 ? count : 32);
    const uint64_t both = uint64_t(high) << 32 | low;
    return left ? uint32_t((both << count) >> 32) : uint32_t(both >> count);
}
template <class T>
T extract_bits(T value, uint32_t position, uint32_t length) {
    constexpr uint32_t kBits = sizeof(T) * 8;
    using Unsigned = std::make_unsigned_t<T>;
    position &= 255;
    length &= 255;
    if (!length) return 0;
    if (position >= kBits) return std::is_signed_v<T> ? value >> (kBits - 1) : 0;
    length = std::min(length, kBits - position);
    return T((Unsigned(value) >> position) << (kBits - length)) >> (kBits - length);
}
template <class T>
T insert_bits(T field, T into, uint32_t position, uint32_t length) {
    constexpr uint32_t kBits = sizeof(T) * 8;
    position &= 255;
    length &= 255;
    if (!length || position >= kBits) return into;
    length = std::min(length, kBits - position);
    const T mask = (length >= kBits ? ~T(0) : (T(1) << length) - 1) << position;
    return (into & ~mask) | ((field << position) & mask);
}
inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
    uint32_t result = 0;
    for (int i = 0; i < 8; i++) {
        if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    }
    return result;
}
template <class T>
T reverse_bits(T value) {
    T result = 0;
    for (size_t i = 0; i < sizeof(T) * 8; i++) result |= (value >> i & 1) << (sizeof(T) * 8 - 1 - i);
    return result;
}

// A variable's place in shared memory; the last range is the dynamic array's and ends where the block's memory ends.
struct SharedRange {
    uint32_t begin, end;
};
inline uint8_t* shared_pointer(std::span<const SharedRange> ranges, uint64_t address, uint32_t bytes,
                               Where where = Where::current()) {
    Machine& m = machine();
    const uint32_t begin = uint32_t(address);
    if (bank_counter().enabled) bank_counter().access(m.current->linear, int(where.line()), begin, bytes);
    if (begin % bytes) m.fail("shared address %#x is not %u-byte aligned", begin, bytes);
    for (const SharedRange& range : ranges) {
        const uint64_t end = std::min<uint64_t>(range.end, m.dynamic_shared_bytes);
        if (begin >= range.begin && begin + uint64_t(bytes) <= end) {
            return reinterpret_cast<uint8_t*>(m.dynamic_shared) + begin;
        }
    }
    m.fail("shared access at %#x+%u is outside every shared variable (%zu bytes in all)", begin, bytes,
           m.dynamic_shared_bytes);
}
// For functions that check the address themselves.
inline void* shared_window(uint64_t address) { return machine().dynamic_shared + uint32_t(address); }
inline uint8_t* global_pointer(uint64_t address, uint32_t bytes) {
    if (address % bytes) machine().fail("global address %#lx is not %u-byte aligned", (unsigned long)address, bytes);
    return reinterpret_cast<uint8_t*>(address);
}
inline uint64_t generic_to_shared(uint64_t address) {
    return address - reinterpret_cast<uint64_t>(machine().dynamic_shared);
}
inline uint64_t shared_to_generic(uint64_t address) {
    return address + reinterpret_cast<uint64_t>(machine().dynamic_shared);
}

template <class T, class Update>
T atomic_update(void* address, Update update) {
    std::atomic_ref<T> cell(*static_cast<T*>(address));
    T old = cell.load();
    while (!cell.compare_exchange_weak(old, update(old))) {
    }
    return old;
}
template <class T>
T atomic_add(void* address, T value) {
    return atomic_update<T>(address, [value](T old) { return T(old + value); });
}
template <class T>
T atomic_min(void* address, T value) {
    return atomic_update<T>(address, [value](T old) { return old < value ? old : value; });
}
template <class T>
T atomic_max(void* address, T value) {
    return atomic_update<T>(address, [value](T old) { return old > value ? old : value; });
}
template <class T>
T atomic_and(void* address, T value) {
    return atomic_update<T>(address, [value](T old) { return T(old & value); });
}
template <class T>
T atomic_or(void* address, T value) {
    return atomic_update<T>(address, [value](T old) { return T(old | value); });
}
template <class T>
T atomic_xor(void* address, T value) {
    return atomic_update<T>(address, [value](T old) { return T(old ^ value); });
}
template <class T>
T atomic_exch(void* address, T value) {
    return std::atomic_ref<T>(*static_cast<T*>(address)).exchange(value);
}
template <class T>
T atomic_cas(void* address, T expected, T value) {
    std::atomic_ref<T>(*static_cast<T*>(address)).compare_exchange_strong(expected, value);
    return expected;
}

}  // namespace cuda_host::ptx
