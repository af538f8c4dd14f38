#include "support.h"

namespace qlora {
namespace {

constexpr uint32_t kOsXsave = 1u << 27;                         // leaf 1, ecx
constexpr uint32_t kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;    // leaf 7, edx
constexpr uint64_t kTileStates = uint64_t{1} << 17 | 1u << 18;  // in XCR0

}  // namespace

const char* read_amx_unavailable(const ProcessorSource& source) {
    if ((source.cpuid(7, 0).edx & (kAmxTile | kAmxBf16)) != (kAmxTile | kAmxBf16)) {
        return "the processor has no AMX-BF16";
    }
    if (!(source.cpuid(1, 0).ecx & kOsXsave)) {
        return "the operating system does not manage extended processor state (OSXSAVE)";
    }
    if ((source.xcr0() & kTileStates) != kTileStates) return "the operating system does not save AMX tile state (XCR0)";
    if (!source.request_tiles()) {
#ifdef __linux__
        return "the kernel denied the permission to use AMX tile data (arch_prctl)";
#else
        return "AMX is supported only under Linux";
#endif
    }
    return nullptr;
}

const char* amx_unavailable() {
#ifdef __x86_64__
    static const char* const reason = read_amx_unavailable(kThisMachine);
    return reason;
#else
    return "AMX is supported only on x86-64 processors";
#endif
}

}  // namespace qlora
