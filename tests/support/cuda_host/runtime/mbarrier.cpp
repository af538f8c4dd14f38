// Phases of mbarriers, and the checks of their use.
#include "cuda_host/mbarrier.h"

#include <cstring>

#include "cuda_host/tensor_copy.h"

namespace cuda_host {
namespace {

constexpr int kMaxCount = (1 << 20) - 1;  // of arrivals, and of bytes of either sign (PTX manual, mbarrier)
constexpr int kMaxFailedTests = 1 << 20;
constexpr uint64_t kMark = 0x7265697272616272ull;

}  // namespace

Mbarriers& mbarriers() {
    static Mbarriers instance;
    return instance;
}

// Accesses are declared outside the scopes that hide accesses: an mbarrier that is initialized without a barrier of the
// block before its use is a race.
CUDA_HOST_RUNTIME void Mbarriers::access(const char* operation, void* address, Where where, bool write) const {
    {
        IgnoreAccesses ignore;
        if (reinterpret_cast<uintptr_t>(address) % 8) {
            machine().fail("%s at %s:%u: address %p is not 8-byte aligned", operation, where.file_name(), where.line(),
                           address);
        }
        if (machine().shared_address(address, 8) < 0) {
            machine().fail("%s at %s:%u: address %p is not in the block's shared memory", operation, where.file_name(),
                           where.line(), address);
        }
    }
    if (write) {
        declare_write(address, 8);
    } else {
        declare_read(address, 8);
    }
}

CUDA_HOST_RUNTIME Mbarrier& Mbarriers::found(const char* operation, void* address, Where where) {
    auto entry = barriers_.find(address);
    if (entry == barriers_.end()) {
        machine().fail("%s at %s:%u: the mbarrier is not initialized", operation, where.file_name(), where.line());
    }
    uint64_t mark;
    __builtin_memcpy(&mark, address, 8);
    if (mark != kMark) {
        machine().fail("%s at %s:%u: the mbarrier's memory was overwritten", operation, where.file_name(),
                       where.line());
    }
    return entry->second;
}

CUDA_HOST_RUNTIME void Mbarriers::check_copy_target(void* address, Where where) {
    access("cp.async.bulk", address, where);
    IgnoreAccesses ignore;
    if (!found("cp.async.bulk", address, where).visible_to_copies) {
        machine().fail("cp.async.bulk at %s:%u: fence.mbarrier_init is missing after the mbarrier's initialization",
                       where.file_name(), where.line());
    }
}

CUDA_HOST_RUNTIME void Mbarriers::init(void* address, uint32_t arrivals, Where where) {
    access("mbarrier.init", address, where, true);
    IgnoreAccesses ignore;
    if (arrivals < 1 || arrivals > uint32_t(kMaxCount)) {
        machine().fail("mbarrier.init at %s:%u: the arrivals must be 1 to 2^20 - 1, got %u", where.file_name(),
                       where.line(), arrivals);
    }
    if (barriers_.count(address)) {
        machine().fail("mbarrier.init at %s:%u: the mbarrier is initialized already; mbarrier.inval comes first",
                       where.file_name(), where.line());
    }
    Mbarrier& barrier = barriers_[address];
    barrier.expected = barrier.pending = int(arrivals);
    barrier.initialized_by = machine().current->linear;
    barrier.token = machine().fresh_token();
    barrier.completed_token = machine().fresh_token();
    __builtin_memcpy(address, &kMark, 8);
}

CUDA_HOST_RUNTIME void Mbarriers::invalidate(void* address, Where where) {
    access("mbarrier.inval", address, where, true);
    IgnoreAccesses ignore;
    if (!found("mbarrier.inval", address, where).waiting.empty()) {
        machine().fail("mbarrier.inval at %s:%u: threads wait for the mbarrier", where.file_name(), where.line());
    }
    barriers_.erase(address);
    memset(address, kPoison, 8);
}

CUDA_HOST_RUNTIME void Mbarriers::fence_init() {
    IgnoreAccesses ignore;
    for (auto& [address, barrier] : barriers_) {
        if (barrier.initialized_by == machine().current->linear) barrier.visible_to_copies = true;
    }
}

CUDA_HOST_RUNTIME void Mbarriers::expect(void* address, uint32_t bytes, Where where) {
    access("mbarrier.expect_tx", address, where);
    IgnoreAccesses ignore;
    Mbarrier& barrier = found("mbarrier.expect_tx", address, where);
    barrier.bytes += bytes;
    if (bytes > uint32_t(kMaxCount) || barrier.bytes > kMaxCount) {
        machine().fail("mbarrier.expect_tx at %s:%u: more than 2^20 - 1 bytes are expected", where.file_name(),
                       where.line());
    }
}

CUDA_HOST_RUNTIME uint64_t Mbarriers::arrive(void* address, uint32_t count, Where where) {
    access("mbarrier.arrive", address, where);
    IgnoreAccesses ignore;
    Mbarrier& barrier = found("mbarrier.arrive", address, where);
    if (count < 1 || int64_t(count) > barrier.pending) {
        machine().fail("mbarrier.arrive at %s:%u: %u arrivals where phase %lu waits for %d more of %d; too many arrive",
                       where.file_name(), where.line(), count, (unsigned long)barrier.phase, barrier.pending,
                       barrier.expected);
    }
    tsan_release(barrier.token);
    const uint64_t phase = barrier.phase;
    barrier.pending -= int(count);
    advance(barrier, address, !barrier.waiting.empty());
    return phase;
}

CUDA_HOST_RUNTIME void* Mbarriers::complete(void* address, uint32_t bytes, Where where) {
    IgnoreAccesses ignore;
    Mbarrier& barrier = found("complete_tx", address, where);
    barrier.bytes -= bytes;
    if (barrier.bytes < -kMaxCount) {
        machine().fail("complete_tx at %s:%u: 2^20 bytes or more came that were not expected", where.file_name(),
                       where.line());
    }
    return barrier.token;
}

CUDA_HOST_RUNTIME void Mbarriers::advance(Mbarrier& barrier, void* address, bool wanted) {
    while (wanted && barrier.pending == 0 && barrier.bytes != 0) {
        if (!tensor_copies().make_one(address)) return;
    }
    if (barrier.pending || barrier.bytes) return;
    barrier.phase++;
    barrier.failed_tests = 0;
    barrier.pending = barrier.expected;
    barrier.completed_token = barrier.token;
    barrier.token = machine().fresh_token();
    for (Thread* thread : barrier.waiting) machine().wake(*thread);
    barrier.waiting.clear();
}

CUDA_HOST_RUNTIME bool Mbarriers::test(void* address, uint32_t parity, Where where) {
    access("mbarrier wait", address, where);
    IgnoreAccesses ignore;
    Mbarrier& barrier = found("mbarrier wait", address, where);
    if (parity > 1) {
        machine().fail("mbarrier wait at %s:%u: the parity must be 0 or 1, got %u", where.file_name(), where.line(),
                       parity);
    }
    if ((barrier.phase & 1) == parity) return false;
    tsan_acquire(barrier.completed_token);
    return true;
}

CUDA_HOST_RUNTIME void Mbarriers::wait(void* address, uint32_t parity, Where where) {
    // Tested again after each wakening: as on a GPU, a thread that is late by two phases waits for another one.
    while (!test(address, parity, where)) {
        IgnoreAccesses ignore;
        Mbarrier& barrier = found("mbarrier wait", address, where);
        advance(barrier, address, true);
        if ((barrier.phase & 1) != parity) continue;
        barrier.waiting.push_back(machine().current);
        machine().wait_in_collective("mbarrier wait", where);
    }
}

CUDA_HOST_RUNTIME bool Mbarriers::try_wait(void* address, uint32_t parity, Where where) {
    if (!test(address, parity, where) && machine().random() % 4 == 0) return test_wait(address, parity, where);
    wait(address, parity, where);
    return true;
}

CUDA_HOST_RUNTIME bool Mbarriers::test_wait(void* address, uint32_t parity, Where where) {
    if (test(address, parity, where)) return true;
    {
        IgnoreAccesses ignore;
        Mbarrier& barrier = found("mbarrier wait", address, where);
        if (++barrier.failed_tests > kMaxFailedTests) {
            machine().fail("mbarrier.test_wait at %s:%u: %d tests have failed since the last phase%s",
                           where.file_name(), where.line(), kMaxFailedTests, describe(address, barrier).c_str());
        }
        advance(barrier, address, machine().random() & 1);
        machine().yield();
    }
    return test(address, parity, where);
}

std::string Mbarriers::describe(void* address, const Mbarrier& barrier) const {
    return "; mbarrier at shared address " + std::to_string(machine().shared_address(address, 8)) + ": " +
           std::to_string(barrier.waiting.size()) + " threads wait, phase " + std::to_string(barrier.phase) +
           " lacks " + std::to_string(barrier.pending) + " of " + std::to_string(barrier.expected) + " arrivals and " +
           std::to_string(barrier.bytes) + " bytes";
}

std::string Mbarriers::describe() const {
    std::string text;
    for (const auto& [address, barrier] : barriers_) {
        if (barrier.waiting.empty()) continue;
        text += describe(address, barrier);
    }
    return text;
}

}  // namespace cuda_host
