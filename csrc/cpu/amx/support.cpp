#include "support.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#endif

namespace qlora {
namespace {

#if defined(__x86_64__) && defined(__linux__)

constexpr long kGetPermission = 0x1022;      // ARCH_GET_XCOMP_PERM
constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
constexpr long kTileData = 18;               // XFEATURE_XTILEDATA

const char* ask() {
    unsigned eax, ebx, ecx, edx;
    constexpr unsigned kOsXsave = 1u << 27, kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & (kAmxTile | kAmxBf16)) != (kAmxTile | kAmxBf16)) {
        return "the processor has no AMX-BF16";
    }
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & kOsXsave)) {
        return "the operating system does not manage extended processor state (OSXSAVE)";
    }
    uint32_t low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    constexpr uint32_t kTileStates = 1u << 17 | 1u << 18;
    if ((low & kTileStates) != kTileStates) return "the operating system does not save AMX tile state (XCR0)";
    // Without the permission, the first tile instruction raises SIGILL. The request also fails if a thread has a signal
    // stack (sigaltstack) that is too small for the larger frame, and in sandboxes that filter arch_prctl.
    if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) {
        return "the kernel denied the permission to use AMX tile data (arch_prctl)";
    }
    unsigned long granted = 0;
    if (syscall(SYS_arch_prctl, kGetPermission, &granted) != 0 || !(granted >> kTileData & 1)) {
        return "the kernel did not grant the permission to use AMX tile data (arch_prctl)";
    }
    return nullptr;
}

#else

const char* ask() { return "AMX is supported only on x86-64 processors under Linux"; }

#endif

}  // namespace

const char* amx_unavailable() {
    static const char* const reason = ask();
    return reason;
}

}  // namespace qlora
