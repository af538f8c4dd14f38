#include "qlora/cpu_isa.h"

#include <stdexcept>
#include <string>

#include "cpu_tensors.h"

namespace qlora::bindings {
namespace {

// The instruction set in use. `force` names another one for the rest of the process, "" restores the automatic choice.
std::string cpu_isa(std::optional<std::string> force) {
    if (force.has_value()) force_cpu_isa(force->c_str());
    return isa_name(qlora::cpu_isa());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(qlora_kernels_C, m) { m.def("cpu_isa(str? force) -> str"); }

STABLE_TORCH_LIBRARY_IMPL(qlora_kernels_C, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

}  // namespace qlora::bindings
