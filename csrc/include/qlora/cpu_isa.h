// The instruction set of the CPU kernels, chosen once at run time.
#pragma once

namespace qlora {

// kAvx512Bf16Fma: avx512_bf16, except that many bf16 tokens use fp32 FMAs; chosen if vdpbf16ps is slow.
// kAmxBf16Emulated: the kernels of kAmxBf16 with emulated tile instructions, for tests on machines without AMX; never
// chosen automatically.
enum class Isa { kPortable, kAvx2, kAvx512, kAvx512Bf16, kAvx512Bf16Fma, kAmxBf16, kAmxBf16Emulated, kNeon };

// Returns the best one that this machine and its operating system support, or the one named by QLORA_CPU_ISA. Throws
// std::invalid_argument if the variable names none of this build, or one that cannot run here.
Isa cpu_isa();

// Overrides the choice for the rest of the process (for tests and benchmarks); nullptr or "" restores the automatic
// one.
void force_cpu_isa(const char* name);

const char* isa_name(Isa isa);

bool isa_supported(Isa isa);

}  // namespace qlora
