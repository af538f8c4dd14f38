// Detection of AMX tiles with bf16 for this process.
#pragma once

#include "../processor.h"

namespace qlora {

// Returns nullptr if the process may use AMX, otherwise the reason in one sentence.
//
// It needs the processor (cpuid), an operating system that saves the tile state at context switches (XCR0), and the
// permission of the Linux kernel, which grants the state to processes that request it by arch_prctl.
const char* read_amx_unavailable(const ProcessorSource& source);

// The same for this machine. The first call requests the permission and caches the result. The permission belongs to
// the process: all threads, also those that were started before, and forked children have it, and exec drops it.
const char* amx_unavailable();

}  // namespace qlora
