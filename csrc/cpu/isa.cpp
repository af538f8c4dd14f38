#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "amx/support.h"
#include "kernels.h"
#include "processor.h"
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

// The reason for which AMX cannot be used. The permission is requested only where AMX could be chosen.
const char* amx_reason() {
    return this_processor().avx512_bf16 ? amx_unavailable() : "the processor has no AVX512-BF16";
}

IsaChoice automatic() { return best_isa(this_processor(), amx_reason()); }

Isa choose(const char* name, const char* source) {
    if (!name || !*name) return automatic().isa;
    for (const Isa isa : kByNameOnly) {
        if (strcmp(name, isa_name(isa)) == 0 && isa_supported(isa)) return isa;
    }
    for (const Isa isa : kBestFirst) {
        if (strcmp(name, isa_name(isa)) != 0) continue;
        if (isa_supported(isa)) return isa;
        const char* reason = "this CPU or its operating system lacks it";
        if (isa == Isa::kAmxBf16) reason = amx_reason();
        throw std::invalid_argument(std::string(source) + "=" + name + ": " + reason +
                                    "; unset it to use the best supported one");
    }
    throw std::invalid_argument(std::string(source) + " must be " + choices() + ", got " + name);
}

constexpr int kUndecided = -1;
std::atomic<int> chosen{kUndecided};
std::atomic<bool> named{false};  // whether a name was chosen instead of the automatic choice

void set_choice(const char* name, const char* source) {
    chosen.store(static_cast<int>(choose(name, source)), std::memory_order_relaxed);
    named.store(name && *name, std::memory_order_relaxed);
}

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

bool isa_supported(Isa isa) { return supports(this_processor(), isa, isa == Isa::kAmxBf16 ? amx_reason() : nullptr); }

Isa cpu_isa() {
    if (chosen.load(std::memory_order_relaxed) == kUndecided) set_choice(std::getenv("QLORA_CPU_ISA"), "QLORA_CPU_ISA");
    return static_cast<Isa>(chosen.load(std::memory_order_relaxed));
}

void force_cpu_isa(const char* name) { set_choice(name, "cpu_isa"); }

const char* cpu_isa_reason() {
    cpu_isa();
    return named.load(std::memory_order_relaxed) ? "it was named, by QLORA_CPU_ISA or by a call" : automatic().reason;
}

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
