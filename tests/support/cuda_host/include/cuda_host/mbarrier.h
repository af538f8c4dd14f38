// mbarrier objects of sm_90: phases that complete when arrivals and the bytes of asynchronous copies are all there.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "machine.h"

namespace cuda_host {

// An mbarrier. Its eight bytes in shared memory hold only a mark, which shows whether anything else wrote them.
struct Mbarrier {
    int expected = 0, pending = 0;  // arrivals of each phase, and those that the present one still waits for
    int64_t bytes = 0;              // tx-count: below zero while more bytes have come than were announced
    uint64_t phase = 0;             // the present, incomplete one
    int initialized_by = 0, failed_tests = 0;
    bool visible_to_copies = false;  // fenced since its initialization
    void* token = nullptr;           // of ThreadSanitizer, for the arrivals of the present phase
    void* completed_token = nullptr;
    std::vector<Thread*> waiting;
};

class Mbarriers {
  public:
    void start_block() { barriers_.clear(); }

    void init(void* address, uint32_t arrivals, Where where);
    void invalidate(void* address, Where where);
    // The fence after initialization, by the running thread.
    void fence_init();
    void expect(void* address, uint32_t bytes, Where where);
    // Returns the phase in which the arrival counts.
    uint64_t arrive(void* address, uint32_t count, Where where);
    // Bytes of an asynchronous copy arrive; returns the token to which the copy releases what it has written.
    void* complete(void* address, uint32_t bytes, Where where);
    // Returns when the phase of this parity has completed; orders memory as all of these do where it has.
    void wait(void* address, uint32_t parity, Where where);
    // The same, but may give up: a GPU does after a time of its own choice.
    bool try_wait(void* address, uint32_t parity, Where where);
    // Whether it has completed. Others run before a test that fails returns.
    bool test_wait(void* address, uint32_t parity, Where where);
    // Fails where `address` is no barrier to which an asynchronous copy may report.
    void check_copy_target(void* address, Where where);

    // The barriers for which threads wait, and what is missing; for the report of a deadlock.
    std::string describe() const;

  private:
    std::string describe(void* address, const Mbarrier& barrier) const;
    void access(const char* operation, void* address, Where where, bool write = false) const;
    bool test(void* address, uint32_t parity, Where where);
    Mbarrier& found(const char* operation, void* address, Where where);
    // Completes the phase if nothing is missing. Pending copies are made where a thread wants the phase.
    void advance(Mbarrier& barrier, void* address, bool wanted);

    std::map<void*, Mbarrier> barriers_;
};

Mbarriers& mbarriers();

}  // namespace cuda_host
