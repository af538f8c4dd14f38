// Prints what csrc/cpu/processor.cpp finds on a described processor: the set, the reason, why there is no AMX, and how
// often the permission for tiles was requested.
//
//     check VENDOR LEAF1_ECX LEAF7_EAX LEAF7_EBX LEAF7_EDX LEAF7_1_EAX EXTENDED_ECX XCR0 PERMITTED
//
// Numbers are hexadecimal. PERMITTED: 1 if the kernel grants the permission.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "amx/support.h"

using namespace qlora;

namespace {

char vendor[13];
uint64_t numbers[8];
int requests = 0;

uint32_t number(int i) { return static_cast<uint32_t>(numbers[i]); }

CpuidRegisters described_cpuid(uint32_t leaf, uint32_t subleaf) {
    CpuidRegisters r{};
    if (leaf == 0) {
        memcpy(&r.ebx, vendor, 4);
        memcpy(&r.edx, vendor + 4, 4);
        memcpy(&r.ecx, vendor + 8, 4);
    } else if (leaf == 1) {
        r.ecx = number(0);
    } else if (leaf == 7 && subleaf == 0) {
        r = {number(1), number(2), 0, number(3)};
    } else if (leaf == 7) {
        r.eax = number(4);
    } else if (leaf == 0x80000001) {
        r.ecx = number(5);
    }
    return r;
}

uint64_t described_xcr0() {
    if (number(0) >> 27 & 1) return numbers[6];
    std::printf("xgetbv would raise SIGILL\n");
    std::exit(1);
}

bool described_permission() {
    ++requests;
    return numbers[7] == 1;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 10) return 2;
    strncpy(vendor, argv[1], 12);
    for (int i = 0; i < 8; ++i) numbers[i] = strtoull(argv[2 + i], nullptr, 16);
    const ProcessorSource source{described_cpuid, described_xcr0, described_permission};
    const char* amx_reason = read_amx_unavailable(source);
    const IsaChoice choice = best_isa(read_processor(source), amx_reason);
    std::printf("%s|%s|%s|%d\n", isa_name(choice.isa), choice.reason, amx_reason ? amx_reason : "", requests);
}
