#include "qlora/cpu_isa.h"

#include <stdexcept>
#include <string>

#include "amx/support.h"
#include "cpu_tensors.h"

namespace qlora::bindings {
namespace {

// Returns the instruction set in use. `force` selects another one for the rest of the process; "" restores the
// automatic choice.
std::string cpu_isa(std::optional<std::string> force) {
    if (force.has_value()) force_cpu_isa(force->c_str());
    return isa_name(qlora::cpu_isa());
}

// Returns in one sentence why the instruction set in use was chosen.
std::string cpu_isa_reason() { return qlora::cpu_isa_reason(); }

// Returns in one sentence why this process cannot use AMX tiles; empty if it can.
std::string cpu_amx_unavailable() {
    const char* reason = amx_unavailable();
    return reason ? reason : "";
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) {
    m.def("cpu_isa(str? force) -> str");
    m.def("cpu_isa_reason() -> str");
    m.def("cpu_amx_unavailable() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CompositeExplicitAutograd, m) {
    m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
    m.impl("cpu_isa_reason", TORCH_BOX(&cpu_isa_reason));
    m.impl("cpu_amx_unavailable", TORCH_BOX(&cpu_amx_unavailable));
}

}  // namespace qlora::bindings
