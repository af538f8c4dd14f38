// Whether this process may use AMX tiles with bf16.
#pragma once

namespace qlora {

// nullptr if it may; otherwise the reason in one sentence.
//
// Three parties decide: the processor (cpuid), the operating system (XCR0: it saves the tile state at a context
// switch), and the Linux kernel, which grants the state to a process that asks for it by arch_prctl. The first call
// asks; the answer is kept. A permission belongs to the process: all its threads and forked children have it, exec
// drops it.
const char* amx_unavailable();

}  // namespace qlora
