#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "amx/support.h"
#include "kernels.h"
#include "qlora/cpu_isa.h"

namespace qlora {

#define QLORA_DECLARE_TABLE(isa)   \
    namespace isa {                \
    extern const Kernels kKernels; \
    }
QLORA_DECLARE_TABLE(portable)
#ifdef QLORA_X86_KERNELS
QLORA_DECLARE_TABLE(avx2)
QLORA_DECLARE_TABLE(avx512)
QLORA_DECLARE_TABLE(avx512_bf16)

// Tables that take most kernels from another table (amx/table.cpp, fma_for_bf16.cpp).
namespace avx512_bf16_fma {
const Kernels& kernels();
}
namespace amx_bf16 {
const Kernels& kernels();
}
namespace amx_bf16_emulated {
const Kernels& kernels();
}
#endif
#ifdef QLORA_ARM_KERNELS
QLORA_DECLARE_TABLE(neon)
#endif
#undef QLORA_DECLARE_TABLE

namespace {

// The instruction sets of this build in order of preference; the automatic choice takes the first supported one.
constexpr Isa kBestFirst[] = {
#ifdef QLORA_X86_KERNELS
    Isa::kAmxBf16,  Isa::kAvx512Bf16Fma, Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2,
#endif
#ifdef QLORA_ARM_KERNELS
    Isa::kNeon,
#endif
    Isa::kPortable,
};

// Instruction sets that are used only if they are named.
constexpr Isa kByNameOnly[] = {Isa::kAmxBf16Emulated};

// "avx512_bf16, avx512, avx2 or portable"
std::string choices() {
    std::string names;
    for (const Isa isa : kBestFirst) {
        if (!names.empty()) names += isa == Isa::kPortable ? " or " : ", ";
        names += isa_name(isa);
    }
    return names;
}

// Whether the automatic choice prefers fp32 FMAs to vdpbf16ps: on Intel's cores vdpbf16ps has half the rate of fp32
// FMAs (224 and 440 GFLOP/s on two cores of a Xeon), on AMD's Zen 4 and 5 twice the rate.
bool prefers_fma() {
#ifdef QLORA_X86_KERNELS
    __builtin_cpu_init();
    return __builtin_cpu_is("intel");
#else
    return false;
#endif
}

Isa best() {
    for (const Isa isa : kBestFirst) {
        if (isa_supported(isa) && (isa != Isa::kAvx512Bf16Fma || prefers_fma())) return isa;
    }
    return Isa::kPortable;
}

Isa choose(const char* name, const char* source) {
    if (!name || !*name) return best();
    for (const Isa isa : kByNameOnly) {
        if (strcmp(name, isa_name(isa)) == 0 && isa_supported(isa)) return isa;
    }
    for (const Isa isa : kBestFirst) {
        if (strcmp(name, isa_name(isa)) != 0) continue;
        if (isa_supported(isa)) return isa;
        const char* reason = "this CPU or its operating system lacks it";
        if (isa == Isa::kAmxBf16 && amx_unavailable()) reason = amx_unavailable();
        throw std::invalid_argument(std::string(source) + "=" + name + ": " + reason +
                                    "; unset it to use the best supported one");
    }
    throw std::invalid_argument(std::string(source) + " must be " + choices() + ", got " + name);
}

constexpr int kUndecided = -1;
std::atomic<int> chosen{kUndecided};

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::kAmxBf16:
            return "amx_bf16";
        case Isa::kAmxBf16Emulated:
            return "amx_bf16_emulated";
        case Isa::kAvx512Bf16:
            return "avx512_bf16";
        case Isa::kAvx512Bf16Fma:
            return "avx512_bf16_fma";
        case Isa::kAvx512:
            return "avx512";
        case Isa::kAvx2:
            return "avx2";
        case Isa::kNeon:
            return "neon";
        case Isa::kPortable:
            return "portable";
    }
    return "unknown";
}

// __builtin_cpu_supports checks XCR0 as well as cpuid: an operating system that does not save the wide registers counts
// as lacking the instructions.
bool isa_supported(Isa isa) {
    if (isa == Isa::kPortable) return true;
#if defined(QLORA_ARM_KERNELS)
    return isa == Isa::kNeon;  // part of the AArch64 base architecture
#elif defined(QLORA_X86_KERNELS)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    switch (isa) {
        case Isa::kAvx2:
            return avx2;
        case Isa::kAvx512:
            return avx512;
        case Isa::kAvx512Bf16:
        case Isa::kAvx512Bf16Fma:
        case Isa::kAmxBf16Emulated:
            return avx512 && __builtin_cpu_supports("avx512bf16");
        case Isa::kAmxBf16:
            return avx512 && __builtin_cpu_supports("avx512bf16") && !amx_unavailable();
        default:
            return false;
    }
#else
    return false;
#endif
}

Isa cpu_isa() {
    int isa = chosen.load(std::memory_order_relaxed);
    if (isa == kUndecided) {
        isa = static_cast<int>(choose(std::getenv("QLORA_CPU_ISA"), "QLORA_CPU_ISA"));
        chosen.store(isa, std::memory_order_relaxed);
    }
    return static_cast<Isa>(isa);
}

void force_cpu_isa(const char* name) { chosen.store(static_cast<int>(choose(name, "cpu_isa"))); }

const Kernels& cpu_kernels() {
    switch (cpu_isa()) {
#ifdef QLORA_X86_KERNELS
        case Isa::kAmxBf16:
            return amx_bf16::kernels();
        case Isa::kAmxBf16Emulated:
            return amx_bf16_emulated::kernels();
        case Isa::kAvx512Bf16Fma:
            return avx512_bf16_fma::kernels();
        case Isa::kAvx512Bf16:
            return avx512_bf16::kKernels;
        case Isa::kAvx512:
            return avx512::kKernels;
        case Isa::kAvx2:
            return avx2::kKernels;
#endif
#ifdef QLORA_ARM_KERNELS
        case Isa::kNeon:
            return neon::kKernels;
#endif
        default:
            return portable::kKernels;
    }
}

}  // namespace qlora
