// wgmma: products of a warpgroup (128 threads) that read their right operand from shared memory and run until a wait.
// Adversarial: sums are marked as pending (NaNs) at issue, and become numbers only in the wait that must complete their
// group. The right operand is read there, and must be what it was at issue.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "machine.h"

namespace cuda_host {

constexpr int kWarpgroupThreads = 128;

enum class Element16 { kFp16, kBf16 };

// The instruction without its registers. All threads of a warpgroup bring the same.
struct WgmmaShape {
    int n = 0;
    Element16 element = Element16::kBf16;
    bool accumulate = false, negate_a = false, negate_b = false, a_in_shared = false;
    bool a_mn_major = false, b_mn_major = false;  // in shared memory: contiguous along the rows instead of k
    uint64_t a = 0, b = 0;                        // descriptors; a only if a_in_shared

    bool operator==(const WgmmaShape&) const = default;
};

struct WgmmaProduct;

class Warpgroups {
  public:
    Warpgroups();
    ~Warpgroups();
    void start_block(int threads);

    // By each thread: its registers of a (null if a is in shared memory) and the addresses of the bits of n / 2 sums.
    void issue(const WgmmaShape& shape, const uint32_t* a, uint32_t* const* sums, Where where);
    // The same by translated PTX, with the addresses of the registers of a: their values may not change until the wait.
    void issue_registers(const WgmmaShape& shape, uint32_t* const* a, uint32_t* const* sums, Where where);
    void fence();
    void commit();
    // Waits until at most the `groups` youngest groups of the running thread are incomplete.
    void wait(int groups, Where where);
    // The same where translated PTX may have moved pending sums: to any of these registers.
    void wait_moved(int groups, uint32_t* const* registers, int count, Where where);
    // By translated PTX, which sees what the source cannot.
    [[noreturn]] void missing_fence(Where where);

  private:
    struct Group;
    struct Member;
    Group& group();
    Member& member();
    void record_operands(WgmmaProduct& product);
    void complete_product(WgmmaProduct& product);
    void finish(Member& member, Where where);

    std::vector<std::unique_ptr<Group>> groups_;
};

Warpgroups& warpgroups();

}  // namespace cuda_host
