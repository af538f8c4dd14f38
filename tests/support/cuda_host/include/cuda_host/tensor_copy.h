// TMA: cp.async.bulk.tensor from global to shared memory, adversarial. The destination is poisoned at issue. The bytes
// come only when a thread waits for them at the copy's mbarrier, those of several copies in random order.
#pragma once

#include <vector>

#include "machine.h"
#include "tensor_map.h"

namespace cuda_host {

// The place of a byte in shared memory under a swizzle of `span` bytes (0, 32, 64, 128): bits 4 to 6 of the address are
// exclusive-ored with bits 7 to 9, as many as the span has.
inline uint32_t swizzled(uint32_t address, int span) {
    return span < 32 ? address : address ^ (address >> 7 & uint32_t(span / 16 - 1)) << 4;
}

struct PendingTensorCopy {
    TensorMap map;
    uint32_t destination;  // shared address
    int coordinate[TensorMap::kMaxRank];
    void* barrier;
    void* token;
    int thread;
    Where where;
};

class TensorCopies {
  public:
    void start_block() { pending_.clear(); }
    // Reports copies that nobody waited for.
    std::string left_over() const;

    // By one thread: copies the box of `map` at `coordinates` (innermost first) to `destination` in shared memory.
    void issue(void* destination, const void* map, std::initializer_list<int> coordinates, void* barrier, Where where);
    // Makes one pending copy of this barrier, of the machine's choice; false where there is none.
    bool make_one(void* barrier);

  private:
    void copy(const PendingTensorCopy& copy, void* end);

    std::vector<PendingTensorCopy> pending_;
};

TensorCopies& tensor_copies();

}  // namespace cuda_host
