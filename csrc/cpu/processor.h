// The instruction sets that the processor and its operating system permit, and the automatic choice among them.
//
// All facts come from cpuid, XCR0 and one system call. A ProcessorSource provides them, so that tests can describe
// processors that the machine does not have.
#pragma once

#include <cstdint>

#include "qlora/cpu_isa.h"

namespace qlora {

struct CpuidRegisters {
    uint32_t eax, ebx, ecx, edx;
};

struct ProcessorSource {
    CpuidRegisters (*cpuid)(uint32_t leaf, uint32_t subleaf);  // zeros for a leaf that does not exist
    uint64_t (*xcr0)();                                        // called only if the operating system enables it
    bool (*request_tiles)();  // requests the permission to use AMX tile data; returns whether the process has it
};

// Each flag includes that the operating system saves the registers.
struct Processor {
    bool avx2, avx512, avx512_bf16;
    float dot_rate;  // multiply-adds of vdpbf16ps relative to those of fp32 FMAs
};

struct IsaChoice {
    Isa isa;
    const char* reason;
};

Processor read_processor(const ProcessorSource& source);

// The same for this machine; the first call reads the facts.
extern const ProcessorSource kThisMachine;
const Processor& this_processor();

// Whether a set can run. amx_reason: why there is no AMX, or nullptr (amx/support.h); used only for Isa::kAmxBf16.
bool supports(const Processor& processor, Isa isa, const char* amx_reason);

// The best set, and in one sentence why it is taken.
IsaChoice best_isa(const Processor& processor, const char* amx_reason);

// Returns in one sentence why cpu_isa() is the set in use.
const char* cpu_isa_reason();

}  // namespace qlora
