#include "processor.h"

#include <cstring>

#ifdef __x86_64__
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qlora {
namespace {

constexpr uint32_t bit(int i) { return 1u << i; }

// Leaf 1, ecx.
constexpr uint32_t kFma = bit(12), kOsXsave = bit(27), kAvx = bit(28), kF16c = bit(29);
// Leaf 7, ebx; leaf 7.1, eax.
constexpr uint32_t kAvx2 = bit(5), kBmi2 = bit(8), kAvx512F = bit(16), kAvx512Dq = bit(17), kAvx512Bw = bit(30);
constexpr uint32_t kAvx512Vl = bit(31), kAvx512Bf16 = bit(5);
// Leaf 0x80000001, ecx: instructions that only AMD's cores and their licensed copies have.
constexpr uint32_t kSse4a = bit(6);

constexpr uint64_t kYmmState = 0x6, kZmmState = 0xe6;  // in XCR0

constexpr bool has_all(uint64_t flags, uint64_t wanted) { return (flags & wanted) == wanted; }

// Whether the core is AMD's. Hypervisors may present another vendor, but they pass on the core's instructions.
bool is_amd_core(const ProcessorSource& source) {
    const CpuidRegisters names = source.cpuid(0, 0);
    char vendor[12];
    memcpy(vendor, &names.ebx, 4);
    memcpy(vendor + 4, &names.edx, 4);
    memcpy(vendor + 8, &names.ecx, 4);
    if (memcmp(vendor, "GenuineIntel", sizeof vendor) == 0) return false;
    return memcmp(vendor, "AuthenticAMD", sizeof vendor) == 0 || memcmp(vendor, "HygonGenuine", sizeof vendor) == 0 ||
           has_all(source.cpuid(0x80000001, 0).ecx, kSse4a);
}

// On AMD's Zen 4, vdpbf16ps has twice the multiply-adds of fp32 FMAs: 470 and 235 GFLOP/s on two cores; Zen 5 was not
// measured. On Intel's cores it has half of them: 224 and 440 GFLOP/s on two cores of a Xeon. The rates are tabulated
// and not measured when a process starts, because the choice determines the bits of results, which must not depend on
// the load of the machine.
constexpr float kDotRateOfAmd = 2.0f, kDotRateOfOthers = 0.5f;

#ifdef __x86_64__

CpuidRegisters real_cpuid(uint32_t leaf, uint32_t subleaf) {
    CpuidRegisters r{};
    __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);  // leaves r unchanged if there is no such leaf
    return r;
}

uint64_t real_xcr0() {
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
#ifdef __APPLE__
    // macOS enables the state of the 512-bit registers at their first use.
    if (has_all(low, kYmmState)) low |= static_cast<uint32_t>(kZmmState);
#endif
    return uint64_t{high} << 32 | low;
}

#else

CpuidRegisters real_cpuid(uint32_t, uint32_t) { return {}; }
uint64_t real_xcr0() { return 0; }

#endif

#if defined(__x86_64__) && defined(__linux__)

// Without the permission, the first tile instruction raises SIGILL. The request fails if a thread has a signal stack
// (sigaltstack) that is too small for the larger frame, in sandboxes that filter arch_prctl, and in kernels
// before 5.16, which do not know it. A request that was granted is granted again.
bool really_request_tiles() {
    constexpr long kGetPermission = 0x1022;      // ARCH_GET_XCOMP_PERM
    constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) return false;
    unsigned long granted = 0;
    return syscall(SYS_arch_prctl, kGetPermission, &granted) == 0 && (granted >> kTileData & 1);
}

#else

bool really_request_tiles() { return false; }

#endif

}  // namespace

const ProcessorSource kThisMachine{real_cpuid, real_xcr0, really_request_tiles};

Processor read_processor(const ProcessorSource& source) {
    Processor p{};
    const uint32_t first = source.cpuid(1, 0).ecx;
    if (!has_all(first, kOsXsave)) return p;
    const uint64_t saved = source.xcr0();
    const CpuidRegisters extended = source.cpuid(7, 0);
    p.avx2 = has_all(first, kAvx | kFma | kF16c) && has_all(extended.ebx, kAvx2 | kBmi2) && has_all(saved, kYmmState);
    p.avx512 =
        p.avx2 && has_all(extended.ebx, kAvx512F | kAvx512Bw | kAvx512Vl | kAvx512Dq) && has_all(saved, kZmmState);
    // Leaf 7 states its largest subleaf; processors without subleaf 1 may return those of another leaf for it.
    p.avx512_bf16 = p.avx512 && extended.eax >= 1 && has_all(source.cpuid(7, 1).eax, kAvx512Bf16);
    p.dot_rate = is_amd_core(source) ? kDotRateOfAmd : kDotRateOfOthers;
    return p;
}

const Processor& this_processor() {
    static const Processor processor = read_processor(kThisMachine);
    return processor;
}

bool supports(const Processor& processor, Isa isa, const char* amx_reason) {
    switch (isa) {
        case Isa::kPortable:
            return true;
        case Isa::kNeon:  // part of the AArch64 base architecture
#ifdef __aarch64__
            return true;
#else
            return false;
#endif
        case Isa::kAvx2:
            return processor.avx2;
        case Isa::kAvx512:
            return processor.avx512;
        case Isa::kAvx512Bf16:
        case Isa::kAvx512Bf16Fma:
        case Isa::kAmxBf16Emulated:
            return processor.avx512_bf16;
        case Isa::kAmxBf16:
            return processor.avx512_bf16 && !amx_reason;
    }
    return false;
}

IsaChoice best_isa(const Processor& processor, const char* amx_reason) {
#ifdef __aarch64__
    return {Isa::kNeon, "NEON is part of AArch64"};
#endif
    if (supports(processor, Isa::kAmxBf16, amx_reason)) return {Isa::kAmxBf16, "AMX tiles are usable"};
    if (processor.avx512_bf16 && processor.dot_rate < 1.0f) {
        return {Isa::kAvx512Bf16Fma, "vdpbf16ps has half the rate of fp32 FMAs on cores that are not AMD's"};
    }
    if (processor.avx512_bf16) return {Isa::kAvx512Bf16, "vdpbf16ps has a higher rate than fp32 FMAs on AMD's cores"};
    if (processor.avx512) return {Isa::kAvx512, "the processor has AVX-512 without BF16"};
    if (processor.avx2) return {Isa::kAvx2, "the processor or its operating system has AVX2 and FMA without AVX-512"};
    return {Isa::kPortable, "the processor or its operating system has no AVX2 with FMA, F16C and BMI2"};
}

}  // namespace qlora
