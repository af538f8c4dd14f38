// Detection of AMX tiles with bf16 for this process.
#pragma once

namespace qlora {

// Returns nullptr if the process may use AMX, otherwise the reason in one sentence.
//
// It needs the processor (cpuid), an operating system that saves the tile state at context switches (XCR0), and the
// permission of the Linux kernel, which grants the state to processes that request it by arch_prctl. The first call
// requests it and caches the result. The permission belongs to the process: all threads and forked children have it,
// and exec drops it.
const char* amx_unavailable();

}  // namespace qlora
