// cp.async, adversarial: the destination is poisoned at issue, the copy runs only in the wait that must complete it.
#pragma once

#include <cstring>

#include "machine.h"

namespace cuda_host {

inline void check_alignment(const void* address, size_t alignment, const char* what) {
    if (reinterpret_cast<uintptr_t>(address) % alignment) {
        machine().fail("%s: address %p is not %zu-byte aligned", what, address, alignment);
    }
}

// volatile, because g++ expands a fixed-size memset after the ThreadSanitizer pass, which then does not see the write.
inline void fill_visibly(void* destination, int value, int bytes) {
    auto* byte = static_cast<volatile uint8_t*>(destination);
    for (int i = 0; i < bytes; i++) byte[i] = uint8_t(value);
}

// The last bytes - source_bytes bytes of the destination become zero, as the instruction's src-size operand defines.
inline void cp_async(void* destination, const void* source, int bytes, int source_bytes) {
    Thread& self = *machine().current;
    check_alignment(destination, bytes, "cp.async destination");
    if (source_bytes) check_alignment(source, bytes, "cp.async source");
    fill_visibly(destination, kPoison, bytes);
    IgnoreAccesses ignore;
    self.copies.push_back({destination, source, bytes, source_bytes, self.copy_group});
}

inline void cp_async_commit() {
    IgnoreAccesses ignore;
    machine().current->copy_group++;
}

inline bool take_copy_due(int groups_in_flight, PendingCopy& copy) {
    IgnoreAccesses ignore;
    Thread& self = *machine().current;
    if (self.copies.empty() || self.copies.front().group >= self.copy_group - groups_in_flight) return false;
    copy = self.copies.front();
    self.copies.erase(self.copies.begin());
    return true;
}

// Waits until at most the `groups_in_flight` youngest committed groups are incomplete.
inline void cp_async_wait(int groups_in_flight) {
    PendingCopy copy;
    while (take_copy_due(groups_in_flight, copy)) {
        memcpy(copy.destination, copy.source, copy.source_bytes);
        fill_visibly(static_cast<char*>(copy.destination) + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
    }
}

}  // namespace cuda_host
