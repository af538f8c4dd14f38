// The emulated multiprocessor: threads, warps, the running block, and the order in which ready threads take turns.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <source_location>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

namespace cuda_host {

using Where = std::source_location;

constexpr int kWarpLanes = 32;
constexpr int kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 227 * 1024;  // sm_90; sm_80 has 163 KiB, sm_86 and sm_120 99 KiB
constexpr size_t kSharedAlignment = 1024;
constexpr size_t kDescriptorBytes = 256 * 1024;  // what the address of a matrix descriptor reaches
constexpr int kPoison = 0xFF;  // shared memory's content before it is written: NaN in every float format

enum class Order { kRandom, kUniform, kWarpPriority, kForward, kReverse };
enum class Status : uint8_t { kReady, kAtBarrier, kAtCollective, kDone };

// A cp.async in flight; the copy happens as late as the program allows.
struct PendingCopy {
    void* destination;
    const void* source;
    int bytes, source_bytes, group;
};

struct Thread {
    Fiber fiber;
    Status status = Status::kDone;
    uint3 index{};
    int linear = 0, lane = 0, warp = 0;
    const char* waiting_in = "";
    Where waiting_at;
    int barrier_predicate = 0, barrier_result = 0;
    std::vector<PendingCopy> copies;
    int copy_group = 0;
};

// Lanes of one warp that meet in one collective. Divergent parts of a warp may hold several at once.
struct Meeting {
    uint32_t mask = 0, arrived = 0;
    const char* operation = "";
};

struct Warp {
    static constexpr size_t kSlotBytes = 64;
    Meeting meetings[kWarpLanes];
    alignas(16) unsigned char input[kWarpLanes][kSlotBytes];
    alignas(16) unsigned char output[kWarpLanes][kSlotBytes];
};

class Machine {
  public:
    // Settings of the next launch.
    uint64_t seed = 1;
    Order order = Order::kRandom;

    // The running block, as threads see it.
    Thread* current = nullptr;
    uint3 block_index{};
    dim3 block_size, grid_size;
    char* dynamic_shared = nullptr;
    size_t dynamic_shared_bytes = 0;

    std::string error;

    // Runs every block of the grid to its end, one after another, or up to the first error.
    void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* argument);

    // Called by the running thread: record the error and never return. The block is abandoned.
    [[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 2, 3)));

    // Called by the running thread: a block barrier. Returns bit 0 any, bit 1 all, bits 2.. the count of predicates.
    int barrier(int predicate, const char* name, Where where);

    // Called by the running thread: wait until another lane completes the collective.
    void wait_in_collective(const char* operation, Where where);
    void wake(Thread& thread);
    void yield();

    Warp& warp_of(const Thread& thread) { return warps_[thread.warp]; }
    Thread& lane_of_current_warp(int lane) { return threads_[current->warp * kWarpLanes + lane]; }
    uint32_t random();

    // One ThreadSanitizer token for each warp of a block, and one for the block.
    void* warp_token(int warp) { return &tokens_[(block_serial_ * 33 + warp) & (sizeof tokens_ - 1)]; }
    void* block_token() { return warp_token(32); }

    // A ThreadSanitizer token that nothing else has used for long.
    void* fresh_token() { return &fresh_tokens_[fresh_serial_++ & (sizeof fresh_tokens_ - 1)]; }

    // Shared memory that belongs to the block for as long as it runs, of exactly these bytes, poisoned.
    void* block_shared(const void* key, size_t bytes);

    // Shared addresses: the dynamic memory from 0 on, then each block_shared, then the __shared__ variables, which no
    // descriptor reaches. -1 and null where the bytes are not all in one of them.
    int64_t shared_address(const void* pointer, size_t bytes) const;
    char* shared_pointer(uint32_t address, size_t bytes) const;
    // Calls visit(address, bytes) for what descriptors reach.
    template <class Visit>
    void for_each_shared(Visit visit) const {
        visit(0u, dynamic_shared_bytes);
        for (const BlockShared& shared : block_shared_) visit(shared.address, shared.bytes);
    }

  private:
    struct BlockShared {
        const void* key;
        char* memory;
        size_t bytes;
        uint32_t address;
    };

    void run_block(void (*entry)());
    void prepare_block(void (*entry)());
    size_t pick();
    Thread& take(size_t position);
    void release_barrier();
    std::string describe_deadlock() const;
    void suspend(Status status, const char* name, Where where);
    static void thread_main();

    std::vector<Thread> threads_;
    std::vector<Warp> warps_;
    std::vector<int> ready_;
    std::vector<uint32_t> warp_priority_;  // empty: every ready thread is equally likely
    std::vector<BlockShared> block_shared_;
    MainStack main_;
    void (*body_)(void*) = nullptr;
    void* argument_ = nullptr;
    int thread_count_ = 0, alive_ = 0, at_barrier_ = 0;
    uint64_t random_state_ = 1, block_serial_ = 0, fresh_serial_ = 0;
    char tokens_[65536] = {}, fresh_tokens_[65536] = {};
    char grid_token_ = 0;
};

Machine& machine();

inline int lane() { return machine().current->lane; }

}  // namespace cuda_host

// The built-in variables are objects rather than macros, for cudaLaunchConfig_t has members of the same names.
namespace cuda_host {

template <unsigned (*Read)()>
struct BuiltinNumber {
    operator unsigned() const { return Read(); }
};

#define CUDA_HOST_BUILTIN(TYPE, VALUE)                 \
    struct TYPE {                                      \
        static unsigned read_x() { return VALUE.x; }   \
        static unsigned read_y() { return VALUE.y; }   \
        static unsigned read_z() { return VALUE.z; }   \
        [[no_unique_address]] BuiltinNumber<read_x> x; \
        [[no_unique_address]] BuiltinNumber<read_y> y; \
        [[no_unique_address]] BuiltinNumber<read_z> z; \
    }
CUDA_HOST_BUILTIN(ThreadIndex, machine().current->index);
CUDA_HOST_BUILTIN(BlockIndex, machine().block_index);
CUDA_HOST_BUILTIN(BlockSize, machine().block_size);
CUDA_HOST_BUILTIN(GridSize, machine().grid_size);
#undef CUDA_HOST_BUILTIN

}  // namespace cuda_host

inline constexpr cuda_host::ThreadIndex threadIdx{};
inline constexpr cuda_host::BlockIndex blockIdx{};
inline constexpr cuda_host::BlockSize blockDim{};
inline constexpr cuda_host::GridSize gridDim{};
#define warpSize 32
