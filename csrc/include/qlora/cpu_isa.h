// Which instruction set the CPU kernels use. Decided once, at run time.
#pragma once

namespace qlora {

enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16, kNeon };

// The best one that this machine and its operating system support, or the one QLORA_CPU_ISA names.
// Throws std::invalid_argument if the variable names none of this build, or one that cannot run here.
Isa cpu_isa();

// Overrides the choice for the rest of the process (tests, benchmarks); nullptr or "" restores the automatic one.
void force_cpu_isa(const char* name);

const char* isa_name(Isa isa);

bool isa_supported(Isa isa);

}  // namespace qlora
